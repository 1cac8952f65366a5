"""A run over a simulated endpoint of SageMaker in trouble: everything is answered, and variants can be compared."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.aws_tokens import REGION
from worker.emulators.openai import SimBackendThread, SimOptions
from worker.emulators.openai.options import EXAMPLE_KEY

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

COUNT = 60
TROUBLE: list[dict[str, Any]] = [
    {"mode": "sagemaker_error", "error": "ThrottlingException", "count": 8},
    {"mode": "sagemaker_error", "error": "ModelNotReadyException", "count": 2},
    {"mode": "sagemaker_error", "error": "ExpiredTokenException", "count": 2},
    {"mode": "sagemaker_error", "error": "ModelError", "original_status": 503, "count": 2},
    {"mode": "frames", "break": "cut_frame", "after_bytes": 700, "count": 2},
    {"mode": "frames", "break": "bad_crc", "after_bytes": 700, "count": 2},
    {"mode": "frames", "break": "model_stream_error", "error_code": "StreamBroken", "count": 1},
]
CONFIG = """
backend:
  sagemaker: {endpoint: any, variants: {blue: 2, green: 1}, custom_attributes: "row={metadata.row}"}
"""


def test_every_line_is_answered_whatever_the_service_does(tmp_path: Path) -> None:
    """Throttled, not ready, refused, broken in the middle: held or sent again, and in the end each is a good answer."""
    requests, output, config = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "worker.yaml"
    body = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
    lines = [
        {"path": "/v1/chat/completions", "metadata": {"row": row}, "body": {**body, "stream": row % 2 == 0}}
        for row in range(COUNT)
    ]
    requests.write_text("\n".join(map(json.dumps, lines)) + "\n")
    config.write_text(CONFIG)
    key_id, secret = EXAMPLE_KEY.split(":")
    environ = {**os.environ, "AWS_ACCESS_KEY_ID": key_id, "AWS_SECRET_ACCESS_KEY": secret, "AWS_REGION": REGION}
    environ["AWS_EC2_METADATA_DISABLED"] = "true"
    with SimBackendThread(SimOptions.of(sagemaker=True, variants="blue,green", latency="20ms")) as sim:
        sim.control({"behaviours": TROUBLE})
        environ["WORKER_BACKEND__BASE_URL"] = sim.base_url
        command = [sys.executable, "-m", "worker"]
        run = [*command, "local", "--config", config, "--keep-going", requests, output]
        done = subprocess.run(run, capture_output=True, text=True, env=environ, timeout=200, check=False)
        assert done.returncode == 0, done.stderr
        counts = sim.snapshot()
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert {answer["metadata"]["row"] for answer in answers} == set(range(COUNT))
    assert {answer["status_code"] for answer in answers} == {200}
    assert all(answer["body"]["choices"][0]["message"]["content"] for answer in answers)
    assert set(counts["by_mode"]) == {"sagemaker_error", "frames"}
    assert set(counts["by_path"]) == {"/endpoints/any/invocations", "/endpoints/any/invocations-response-stream"}
    report = [*command, "report", "--json", output]
    told = json.loads(subprocess.run(report, capture_output=True, text=True, timeout=60, check=True).stdout)
    assert set(told["variants"]) == {"blue", "green"}
    assert sum(group["answers"] for group in told["variants"].values()) == COUNT
