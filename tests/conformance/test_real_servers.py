"""
Real servers, where this machine has them: an assembled answer equals the whole one, and every error has its class.

None of them is among the project's dependencies, and some bring a web framework of their own: install each in an
environment of its own and name its program, and where it needs one a small model:

    LITELLM=/opt/litellm/bin/litellm            pip install 'litellm[proxy]'; its answers are mocks
    LLAMA_PYTHON=/opt/llama/bin/python          pip install xllamacpp gguf; llama.cpp's server, with a model made on the spot
    LLAMA_SERVER=/opt/llama/bin/llama-server    LLAMA_MODEL=/models/any.gguf
    VLLM=/opt/vllm/bin/vllm                     VLLM_MODEL=/models/any, or the name of a model that it has already

Without the variable the program is looked for on the PATH.  What is not there is skipped with a reason.
"""

import json
import os
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.emulator import free_port
from tests.support.policy import classify
from tests.support.random_bodies import canon
from tests.support.waiting import until
from worker.backends.openai import HttpBackend
from worker.errors import BackendError
from worker.policy.model import ErrorEvent, Fault
from worker.ports import AttemptResult, BackendRequest
from worker.settings.schema import RouteSettings
from worker.wire.body import RequestBody

START_S = 300.0
KEY = "sk-of-the-tests"
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "Say hi."}]
NOT_COMPARED = frozenset({"timings", "metrics"})
"""Top level of an answer: how long it took."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(START_S + 120)]


@dataclass(frozen=True)
class Server:
    """A server that is installed here, how it is started, and what it is asked."""

    variable: str
    program: str
    model_variable: str | None = None
    health: str = "/health"
    environment: Mapping[str, str] = field(default_factory=dict)
    good: tuple[tuple[str, dict[str, Any]], ...] = ()
    """Path and body; the same body gets the same text twice."""
    bad: tuple[tuple[str, dict[str, Any], str], ...] = ()
    """Path, body and the class of the error."""
    not_compared: frozenset[str] = NOT_COMPARED

    def command(self, program: str, model: str, port: int, folder: Path) -> list[str]:
        """Return what starts it on loopback."""
        at = ["--host", "127.0.0.1", "--port", str(port)]
        match self.program:
            case "litellm":
                config = folder / "litellm.yaml"
                config.write_text(yaml.safe_dump(LITELLM_CONFIG))
                return [program, "--config", str(config), *at, "--telemetry", "False"]
            case "llama.cpp":
                script = Path(__file__).parents[1] / "support" / "llama_server.py"
                return [program, str(script), *at, "--ctx-size", "512", "--parallel", "1", "--api-key", KEY]
            case "llama-server":
                return [program, "--model", model, *at, "--ctx-size", "512", "--parallel", "1", "--api-key", KEY]
            case _:
                return [program, "serve", model, *at, "--api-key", KEY, "--served-model-name", "m", "--seed", "1"]


def mock(name: str, response: str = "Hello there, this is an answer.", **more: Any) -> dict[str, Any]:
    """One of LiteLLM's models that answers itself."""
    parameters = {"model": f"openai/{name}", "api_key": "x", "mock_response": response, **more}
    return {"model_name": name, "litellm_params": parameters}


CALL = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
LITELLM_CONFIG = {
    "model_list": [
        mock("mock"),
        mock("mock-tools", "", mock_tool_calls=[CALL]),
        mock("limited", "litellm.RateLimitError"),
        mock("long", "litellm.ContextWindowExceededError"),
        mock("failing", "litellm.InternalServerError"),
        # Port 9 of this machine is the discard service, which nothing listens on.
        {
            "model_name": "down",
            "litellm_params": {"model": "openai/x", "api_key": "x", "api_base": "http://127.0.0.1:9/v1"},
        },
    ],
    "general_settings": {"master_key": KEY},
    "litellm_settings": {"num_retries": 0},
}

GREEDY = {"model": "m", "temperature": 0, "seed": 1, "max_tokens": 8}
GOOD = (
    (CHAT, {**GREEDY, "messages": HI}),
    (CHAT, {**GREEDY, "messages": HI, "logprobs": True, "top_logprobs": 2}),
    (CHAT, {**GREEDY, "messages": [*HI, {"role": "assistant", "content": "hé ☃"}, *HI]}),
    (TEXT, {**GREEDY, "prompt": "One two"}),
    (TEXT, {**GREEDY, "prompt": ["One two", "Three"]}),
    (TEXT, {**GREEDY, "prompt": "One two", "stop": [" "]}),
)
LONG = {**GREEDY, "messages": [{"role": "user", "content": "word " * 20_000}]}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
LLAMA_GOOD = (
    # Not several prompts: it says the usage of each in a stream, and of the first one in a whole answer.
    *((path, body) for path, body in GOOD if not isinstance(body.get("prompt"), list)),
    (CHAT, {**GREEDY, "max_tokens": 30, "messages": HI, "response_format": {"type": "json_object"}}),
    (TEXT, {**GREEDY, "prompt": "One two", "logprobs": 2}),
)
LLAMA_BAD = (
    (CHAT, LONG, "context_length"),
    (TEXT, {**GREEDY, "prompt": "word " * 3000}, "context_length"),
    (CHAT, {**GREEDY, "messages": "hi"}, "invalid_request"),
    (CHAT, {**GREEDY, "messages": HI, "max_tokens": "ten"}, "invalid_request"),
    (CHAT, {**GREEDY, "messages": HI, "n": 2}, "invalid_request"),
    (CHAT, {**GREEDY, "messages": [{"role": "user", "content": [IMAGE]}]}, "invalid_request"),  # as a 500
    ("/v1/embeddings", {"model": "m", "input": "hi"}, "invalid_request"),  # as a 501
)
SERVERS = (
    Server(
        variable="LITELLM",
        program="litellm",
        health="/health/liveliness",
        environment={"LITELLM_LOCAL_MODEL_COST_MAP": "True"},  # or it asks the network for prices
        good=(
            (CHAT, {"model": "mock", "messages": HI}),
            (CHAT, {"model": "mock", "messages": HI, "max_tokens": 5, "user": "u"}),
            (CHAT, {"model": "mock-tools", "messages": HI}),
            (TEXT, {"model": "mock", "prompt": "Say hi."}),
            (TEXT, {"model": "mock", "prompt": ["Say hi.", "Say no."]}),
            (CHAT, {"model": "mock", "messages": HI, "n": 2}),
        ),
        bad=(
            (CHAT, {"model": "limited", "messages": HI}, "rate_limited"),
            (CHAT, {"model": "long", "messages": HI}, "context_length"),
            (CHAT, {"model": "failing", "messages": HI}, "server_error"),
            (CHAT, {"model": "down", "messages": HI}, "connect"),
            (CHAT, {"model": "nope", "messages": HI}, "model_not_found"),
            (TEXT, {"model": "nope", "prompt": "Say hi."}, "model_not_found"),
            ("/v1/responses", {"model": "nope", "input": "Say hi."}, "model_not_found"),
            ("/v1/responses", {"model": "down", "input": "Say hi."}, "connect"),
            ("/v1/embeddings", {"model": "down", "input": "Say hi."}, "connect"),
            (CHAT, {"model": "mock"}, "invalid_request"),
        ),
        not_compared=NOT_COMPARED | {"usage"},  # of a mock, made up in another way for streams
    ),
    Server(variable="LLAMA_PYTHON", program="llama.cpp", good=LLAMA_GOOD, bad=LLAMA_BAD),
    Server(
        variable="LLAMA_SERVER", program="llama-server", model_variable="LLAMA_MODEL", good=LLAMA_GOOD, bad=LLAMA_BAD
    ),
    Server(
        variable="VLLM",
        program="vllm",
        model_variable="VLLM_MODEL",
        good=GOOD,
        bad=(
            (CHAT, LONG, "context_length"),
            (CHAT, {**GREEDY, "messages": HI, "temperature": -1}, "invalid_request"),
            (CHAT, {**GREEDY, "messages": HI, "model": "nope"}, "model_not_found"),
        ),
    ),
)


@dataclass(frozen=True)
class Running:
    """A server that answers."""

    server: Server
    url: str

    async def ask(self, path: str, body: dict[str, Any], stream: str, key: str = KEY) -> tuple[AttemptResult, str]:
        """Make one attempt; returns the result and the class of its error, `""` for a good answer."""
        route = {"name": "r", "base_url": self.url, "api_key": key, "stream": stream, "timeouts": {"total_s": 60}}
        backend, result, fault = HttpBackend(RouteSettings.model_validate(route)), AttemptResult(), None
        try:
            await backend.invoke(BackendRequest(path=path, body=RequestBody(json.dumps(body).encode())), result)
        except BackendError as error:
            fault = Fault(error.fault)
        finally:
            await backend.aclose()
        event = ErrorEvent(
            backend="r",
            path=path,
            phase=result.phase,
            status=result.status,
            headers=result.headers,
            body=result.body,
            fault=fault,
            in_stream=result.in_stream,
            has_partial=result.content_events > 0,
        )
        return result, classify(event).error_class or ""


def installed(server: Server) -> tuple[str, str]:
    """Return the program and the model; skips the test if one is missing."""
    program = os.environ.get(server.variable) or shutil.which(server.program)
    if program is None:
        pytest.skip(f"{server.program} is not installed here, and {server.variable} names none")
    model = os.environ.get(server.model_variable, "") if server.model_variable is not None else ""
    if server.model_variable is not None and not model:
        pytest.skip(f"{server.model_variable} names no model for {server.program}")
    return program, model


@contextmanager
def started(server: Server, folder: Path) -> Iterator[str]:
    """Run a server until the end of the block; yields its base URL."""
    program, model = installed(server)
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "NO_PROXY": "*", **server.environment}
    log = folder / "server.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            server.command(program, model, port, folder), cwd=folder, env=environment, stdout=out, stderr=out
        )
    try:
        until(lambda: process.poll() is not None or _answers(url + server.health), START_S, server.program)
        assert process.poll() is None, log.read_text("utf-8", "replace")[-2000:]
        yield url
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


@pytest.fixture(scope="module", params=SERVERS, ids=[server.program for server in SERVERS])
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Each server in turn."""
    with started(request.param, tmp_path_factory.mktemp(request.param.program)) as url:
        yield Running(request.param, url)


def comparable(body: bytes, server: Server) -> Any:
    """What of an answer is the same each time: not how long it took, nor what an earlier request left in a cache."""
    answer = {key: value for key, value in canon(json.loads(body)).items() if key not in server.not_compared}
    details = (answer.get("usage") or {}).get("prompt_tokens_details")
    if details is not None:
        details.pop("cached_tokens", None)
    return answer


async def test_an_assembled_answer_is_the_whole_one(running: Running) -> None:
    """However the stream comes to be asked for."""
    for path, body in running.server.good:
        whole, error = await running.ask(path, body, "never")
        assert error == "", whole.body
        expected = comparable(whole.body, running.server)
        asking = {**body, "stream": True, "stream_options": {"include_usage": True}}
        for stream, asked in (("auto", body), ("as_requested", asking), ("never", asking)):
            result, error = await running.ask(path, asked, stream)
            assert (error, comparable(result.body, running.server)) == ("", expected), (stream, asked)
            assert result.usage.output, (stream, asked)


async def test_every_error_has_its_class(running: Running) -> None:
    """The same one, whether a stream was asked for or not."""
    for path, body, error_class in running.server.bad:
        for stream, asked in (("never", body), ("auto", body), ("as_requested", {**body, "stream": True})):
            result, error = await running.ask(path, asked, stream)
            assert error == error_class, (asked.get("model"), stream, result.status, result.body)


async def test_a_wrong_key_is_the_operators_trouble(running: Running) -> None:
    """Whatever the status."""
    path, body = running.server.good[0]
    for stream in ("never", "auto"):
        result, error = await running.ask(path, body, stream, key="sk-wrong")
        assert error == "auth", (result.status, result.body)
