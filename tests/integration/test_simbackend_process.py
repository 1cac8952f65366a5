"""`inference-worker simbackend` as people start it: on uvloop, with signals and exit codes."""

import errno
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest

from worker.emulators.openai.engine_model import LLAMA_8B_H100

pytestmark = pytest.mark.slow
CHAT = b'{"model": "m", "messages": [{"role": "user", "content": "hi"}]}'


@contextmanager
def running(*arguments: str) -> Iterator[tuple["subprocess.Popen[str]", int, int]]:
    """Start a server on any port and yield the process with its two ports."""
    command = [sys.executable, "-W", "error", "-m", "worker", "simbackend", "--port", "0", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            ports = [re.search(r":(\d+)/", process.stdout.readline()) for _ in range(2)]
            assert ports[0]
            assert ports[1]
            yield process, int(ports[0][1]), int(ports[1][1])
        finally:
            process.kill()


def ask(port: int, method: str, path: str, body: bytes | None = None) -> tuple[int, Any]:
    """Return status and JSON of one request on a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request(method, path, body)
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_it_with_0(number: int) -> None:
    """A server with a request in flight ends at once, without a word on standard error."""
    with running("--latency", "60s") as (process, port, _), socket.create_connection(("127.0.0.1", port)) as client:
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(CHAT)
        client.sendall(head + CHAT)
        while ask(port, "GET", "/sim/stats")[1]["in_flight"] != 1:
            pass
        os.kill(process.pid, number)
        _, errors = process.communicate(timeout=20)
        assert (process.returncode, errors) == (0, "")


def test_faults_work_on_the_fast_loop() -> None:
    """Reset and refusal, which need the socket itself, work with uvloop as they do with asyncio."""
    with running("--latency", "0", "--models", "m") as (_, port, control_port):
        assert ask(port, "POST", "/v1/chat/completions", CHAT)[0] == 200
        assert ask(control_port, "POST", "/sim/control", b'{"mode": "reset"}')[0] == 200
        with pytest.raises(ConnectionResetError):
            ask(port, "POST", "/v1/chat/completions", CHAT)
        for _ in range(3):
            assert ask(control_port, "POST", "/sim/control", b'{"mode": "refuse"}')[1]["listening"] is False
            with pytest.raises(OSError, match="refused") as raised:
                ask(port, "POST", "/v1/chat/completions", CHAT)
            assert raised.value.errno == errno.ECONNREFUSED
            assert ask(control_port, "POST", "/sim/reset", b"")[1]["listening"] is True
            assert ask(port, "POST", "/v1/chat/completions", CHAT)[0] == 200


def test_an_engine_runs_on_the_fast_loop() -> None:
    """Eight answers at once take the model's time at least, and then the engine is empty."""
    with running("--engine", "llama-8b-h100", "--answer-tokens", "100") as (_, port, _), ThreadPoolExecutor(8) as pool:
        began = time.monotonic()
        answers = list(pool.map(lambda _: ask(port, "POST", "/v1/chat/completions", CHAT), range(8)))
        took_s = time.monotonic() - began
        (tokens,) = {answer["usage"]["completion_tokens"] for _, answer in answers}
        assert took_s >= tokens * LLAMA_8B_H100.iteration_s
        engine = ask(port, "GET", "/sim/stats")[1]["engine"]
        assert engine == {"running": 0, "waiting": 0, "kv_usage": 0.0, "preemptions": 0}


def test_unusable_options_end_it_with_2() -> None:
    """Every fault is named and nothing is started."""
    command = [
        sys.executable,
        "-m",
        "worker",
        "simbackend",
        "--latency",
        "soon",
        "--dialect",
        "klingon",
        "--engine",
        "h",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 2
    assert "latency:" in done.stderr
    assert "dialect:" in done.stderr
    assert "engine:" in done.stderr


def test_a_rehearsal_without_an_account() -> None:
    """AWS's own client against `--sagemaker`: answered when it has the key, refused otherwise, and broken when told so."""
    import boto3
    from botocore.config import Config
    from botocore.exceptions import ClientError

    from worker.emulators.openai.options import EXAMPLE_KEY

    key_id, secret = EXAMPLE_KEY.split(":")
    with running("--sagemaker", "--latency", "0", "--variants", "blue,green", "--endpoints", "ep") as (
        _,
        port,
        control,
    ):
        options = {
            "region_name": "us-east-1",
            "endpoint_url": f"http://127.0.0.1:{port}",
            "aws_access_key_id": key_id,
            "config": Config(retries={"total_max_attempts": 1}),
        }
        client = boto3.client("sagemaker-runtime", aws_secret_access_key=secret, **options)
        asked = {"EndpointName": "ep", "Body": CHAT, "TargetVariant": "green"}
        response = client.invoke_endpoint(**asked)
        assert json.loads(response["Body"].read())["choices"]
        assert response["InvokedProductionVariant"] == "green"
        assert ask(control, "POST", "/sim/control", b'{"mode": "sagemaker_error", "error": "ModelError"}')[0] == 200
        with pytest.raises(ClientError, match="ModelError"):
            client.invoke_endpoint(**asked)
        client.close()
        other = boto3.client("sagemaker-runtime", aws_secret_access_key="another", **options)
        assert ask(control, "POST", "/sim/reset")[0] == 200
        with pytest.raises(ClientError, match="InvalidSignatureException"):
            other.invoke_endpoint(**asked)
        other.close()
