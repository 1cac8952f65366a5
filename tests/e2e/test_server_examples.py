"""Each file of examples/servers answers a request of the simulated server that speaks like the real one."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from worker.emulators.openai import SimBackendThread, SimOptions

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

ROOT = Path(__file__).parents[2]
DIALECTS = {
    "azure-openai": "azure",
    "litellm": "litellm",
    "llama-cpp": "llamacpp",
    "ollama": "ollama",
    "openai": "openai",
    "sagemaker": "openai",
    "sglang": "sglang",
    "tgi": "tgi",
    "vllm": "vllm",
}
BODY = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "examples" / "servers").glob("*.yaml")))
def test_a_request_is_answered_with_the_example(name: str, tmp_path: Path) -> None:
    """Only the address (its host, not its path) and the place of the key are this machine's."""
    text = (ROOT / "examples" / "servers" / f"{name}.yaml").read_text("utf-8")
    key = tmp_path / "api-key"
    key.write_text("sk-example")
    is_sagemaker = name == "sagemaker"
    options = SimOptions.of(
        control_port=0,
        dialect=DIALECTS[name],
        sagemaker=is_sagemaker,
        api_key="sk-example" if "api_key_file" in text else None,
    )
    (tmp_path / "in.jsonl").write_text(
        json.dumps({"path": "/v1/chat/completions", "metadata": {}, "body": BODY}) + "\n"
    )
    with SimBackendThread(options) as sim:
        address = sim.base_url.removesuffix("/v1")
        environ = dict(os.environ)
        if is_sagemaker:
            id_, _, secret = options.aws_key.partition(":")
            environ |= {"AWS_ACCESS_KEY_ID": id_, "AWS_SECRET_ACCESS_KEY": secret, "WORKER_BACKEND__BASE_URL": address}
        text = text.replace("/var/run/secrets/backend/api-key", str(key))
        text = re.sub(r"base_url: https?://[^/\s]+", f"base_url: {address}", text)
        (tmp_path / "worker.yaml").write_text(text)
        done = subprocess.run(
            [sys.executable, "-m", "worker", "local", "in.jsonl", "out.jsonl", "--config", "worker.yaml"],
            cwd=tmp_path, env={**environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        seen = sim.snapshot()
    (answer,) = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text("utf-8").splitlines()]
    assert answer["status_code"] == 200, answer
    assert answer["body"]["choices"][0]["message"]["content"]
    assert seen["generations"]["completed"] == 1, seen
