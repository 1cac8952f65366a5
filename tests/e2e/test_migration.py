"""docs/migration.md: messages of other workers, as they are, through this one, and its answers in their format."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from worker.emulators.openai import SimBackendThread, SimOptions

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "migration"
CHAT = {"model": "llama", "messages": [{"role": "user", "content": "Hello"}], "seed": 12345678901234567890}
KUBEAI = {"metadata": {"row": 1.5, "b": 2, "a": 10**20}, "path": "/v1/chat/completions", "body": CHAT}
LLM_D: dict[str, Any] = {
    "id": "r-1",
    "created": 1764400000,
    "deadline": 4102444800,
    "payload": CHAT,
    "metadata": {"team": "search"},
    "endpoint": "/v1/chat/completions",
}
TOO_LATE = {**LLM_D, "id": "r-2", "deadline": 1764400001}


def answers(folder: Path, requests: list[dict[str, Any]], *options: str) -> list[dict[str, Any]]:
    """Send requests through the worker; return the answers in their order."""
    (folder / "in.jsonl").write_text("".join(json.dumps(request) + "\n" for request in requests))
    with SimBackendThread(SimOptions.of(control_port=0)) as sim:
        address = ["--backend-url", sim.base_url, "--keep-going"]
        done = subprocess.run(
            [sys.executable, "-m", "worker", "local", "in.jsonl", "out.jsonl", *address, *options],
            cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (folder / "out.jsonl").read_text("utf-8").splitlines()]
    return sorted(rows, key=lambda row: int(row["id"].split("-")[1]))


def transform(name: str, message: dict[str, Any]) -> dict[str, Any]:
    """Apply a transform to a message `{data, attributes}`, as Pub/Sub would."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("no Node to run the transform")
    (entry,) = yaml.safe_load((FOLDER / name).read_text("utf-8"))
    udf = entry["javascriptUdf"]
    program = f"{udf['code']}\nprocess.stdout.write(JSON.stringify({udf['functionName']}({json.dumps(message)}, {{}})))"
    done = subprocess.run([node, "-e", program], capture_output=True, text=True, check=True)
    changed: dict[str, Any] = json.loads(done.stdout)
    return changed


def test_kubeais_message_is_a_request_as_it_is(tmp_path: Path) -> None:
    """Metadata come back equal, numbers that are no 64-bit integers too."""
    (answer,) = answers(tmp_path, [KUBEAI])
    assert answer["status_code"] == 200
    assert answer["metadata"] == KUBEAI["metadata"]


def test_a_file_of_llm_ds_requests_is_answered_by_the_template(tmp_path: Path) -> None:
    """Endpoint, payload, deadline and id arrive; the id comes back."""
    template = str(FOLDER / "llm-d-async.template.json")
    good, late = answers(tmp_path, [LLM_D, TOO_LATE], "--template", template)
    assert (good["status_code"], good["metadata"]) == (200, {"id": "r-1", "metadata": {"team": "search"}})
    assert (late["status_code"], late["metadata"]["id"]) == (504, "r-2")


def test_a_live_topic_is_translated_both_ways(tmp_path: Path) -> None:
    """An old request becomes a new one that the worker answers, and its answer an old result."""
    attributes = {"traceparent": "00-1-2-01"}
    sent = [
        transform("llm-d-async-requests.yaml", {"data": json.dumps(old), "attributes": attributes})
        for old in (LLM_D, TOO_LATE, {**LLM_D, "id": "r-3", "endpoint": ""})
    ]
    assert all(message["attributes"] == attributes for message in sent)
    good, late, unnamed = answers(tmp_path, [json.loads(message["data"]) for message in sent])
    assert good["metadata"] == {"id": "r-1", "metadata": {"team": "search", **attributes}}
    assert (good["status_code"], late["status_code"], unnamed["status_code"]) == (200, 504, 200)

    def result(answer: dict[str, Any], **attributes: str) -> dict[str, Any]:
        message = {"data": json.dumps(answer), "attributes": attributes}
        changed: dict[str, Any] = json.loads(transform("llm-d-async-results.yaml", message)["data"])
        return changed

    old = result(good, status_code="200")
    assert json.loads(old.pop("payload")) == good["body"]
    assert old == {"id": "r-1", "status_code": 200}
    old = result(late, error_class="deadline_exceeded")
    assert (old["id"], old["error_code"]) == ("r-2", "DEADLINE_EXCEEDED")
    assert old["error_message"] == late["body"]["error"]["message"]
    assert result(late, error_class="server_error")["error_code"] == "INFERENCE_ERROR"


def test_a_message_of_this_worker_passes_unchanged() -> None:
    """So producers can change one by one."""
    message = {"data": json.dumps(KUBEAI), "attributes": {"a": "b"}}
    assert transform("llm-d-async-requests.yaml", message) == message
