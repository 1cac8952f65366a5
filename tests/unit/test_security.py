"""SECURITY.md: each row of the threat model names tests that exist; those that belong to no room of their own are here."""

import ast
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.fakes import FakeBackend, status
from tests.support.pipeline import Pipeline, data, message
from tests.support.raw_http import Connection, answer, raw_server
from tests.support.virtual_time import virtual_time
from worker.backends.openai import HttpBackend
from worker.ports import AttemptResult, BackendRequest, Settlement
from worker.settings.schema import RequestSettings, RouteMatch, RouteSettings
from worker.wire.body import RequestBody
from worker.wire.http import MAX_PATH_CHARS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "SECURITY.md").read_text("utf-8")
ROWS = re.findall(r"^\| (?!attempt|who|--|\*\*|whoever)(.+?) \| (.+) \| (.+) \|$", PAGE, re.MULTILINE)
DEEP = b"[" * 100_000 + b"]" * 100_000


def test_every_row_names_tests_that_exist() -> None:
    """Each threat names a test that exists."""
    assert len(ROWS) > 20
    missing = []
    for attempt, _, tests in ROWS:
        named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", tests)
        assert named, attempt
        for path, name in named:
            tree = ast.parse((ROOT / path).read_text("utf-8"))
            functions = {
                node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            }
            if name not in functions:
                missing.append(f"{path}::{name}")
    assert missing == []


@pytest.mark.parametrize(
    "path",
    ["/v1/load_lora_adapter", "/metrics", "/v1/models", "/v1/chat/completions/../../admin", "/v1//chat/completions"],
)
@virtual_time
async def test_only_inference_paths_reach_a_backend(path: str) -> None:
    """Anything else is answered with a 400, without asking the backend."""
    pipeline = Pipeline()
    assert await pipeline.handle(message(data(path=path))) is Settlement.ACK
    assert (pipeline.answer.json["status_code"], pipeline.backend.requests) == (400, [])


@pytest.mark.parametrize(
    "payload",
    [
        DEEP,
        b'{"path":"/v1/chat/completions","body":' + b'{"a":' * 50_000 + b"1" + b"}" * 50_000 + b"}",
        b'{"path":"/v1/chat/completions","metadata":{"a":' + DEEP + b'},"body":{"model":"m"}}',
    ],
    ids=["the message", "its body", "its metadata"],
)
@virtual_time
async def test_a_deep_message_is_answered_and_ends_nothing(payload: bytes) -> None:
    """Nesting that no parser follows is a 400 or passes unread; the next message is served."""
    pipeline = Pipeline()
    assert await pipeline.handle(message(payload)) is Settlement.ACK
    assert await pipeline.handle() is Settlement.ACK
    statuses = [re.match(rb'{"status_code":(\d+)', published.data) for published in pipeline.answers]
    assert [match[1] for match in statuses if match][1:] == [b"200"]
    pipeline.assert_nothing_leaks()


@pytest.mark.parametrize(
    "pattern", ["*a" * 40 + "b", "*" * 40 + "b", "[!b]*" * 40 + "b"], ids=["letters", "stars", "sets"]
)
@virtual_time
async def test_a_shell_pattern_costs_no_more_than_its_text(pattern: str) -> None:
    """The longest path and a huge model against patterns that make a matcher try all ways, which would take years."""
    paths = RequestSettings(allowed_paths=[pattern, "*"])
    pipeline = Pipeline(matches=[RouteMatch(models=[pattern])], request=paths)
    path, model = "/" + "a" * (MAX_PATH_CHARS - 1), "a" * 100_000
    started = time.process_time()
    assert await pipeline.handle(message(data({"model": model}, path=path))) is Settlement.ACK
    assert time.process_time() - started < 5
    assert pipeline.answer.json["status_code"] == 404


async def test_a_redirect_is_not_followed() -> None:
    """It would carry the key and the body to a place that no operator named."""
    asked = []

    async def script(connection: Connection) -> None:
        asked.append(await connection.read_request())
        await connection.send(answer(b"", f"Location: {server.url}/elsewhere", status="307 Temporary Redirect"))

    result = AttemptResult()
    async with raw_server(script) as server:
        backend = HttpBackend(RouteSettings(name="r", base_url=server.url))
        try:
            await backend.invoke(BackendRequest(path="/v1/x", body=RequestBody(b"{}")), result)
        finally:
            await backend.aclose()
    assert (result.status, len(asked)) == (307, 1)


@pytest.mark.parametrize(
    "case",
    [
        "answered",
        "answered with an error",
        "nacked",
        "not a request",
        "a broken message",
        "refused by its path",
    ],
)
@virtual_time
async def test_no_line_of_the_log_holds_a_body_or_metadata(case: str, logs: list[Any]) -> None:
    """Whatever becomes of a message: neither its prompt nor its metadata, nor the words of its answer."""
    prompt, secret, words = "prompt-4711", "metadata-4712", "answer-4713"
    body = {"model": "m", "messages": [{"role": "user", "content": prompt}]}
    good = data(body, metadata={"token": secret})
    payload = {
        "not a request": json.dumps({"metadata": {"token": secret}, "body": body}).encode(),
        "a broken message": good[:-3],
        "refused by its path": data(body, metadata={"token": secret}, path="/v1/other"),
    }.get(case, good)
    text = json.dumps({"choices": [{"message": {"content": words}}], "error": None}).encode()
    backend = {
        "answered with an error": FakeBackend(status(400, b'{"error":{"message":"no"}}')),
        "nacked": FakeBackend(status(500, b'{"error":{"message":"no"}}')),
    }.get(case, FakeBackend(status(200, text)))
    pipeline = Pipeline(backend)
    await pipeline.handle(message(payload, attempt=1))
    assert logs
    shown = repr(logs)
    assert not [word for word in (prompt, secret, words) if word in shown]


def test_nobody_is_sent_to_an_index_for_this_project() -> None:
    """Its name belongs to nobody there: whoever takes it could have anything installed."""
    files = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "deploy").rglob("*.md")]
    pattern = re.compile(r"(pip|uv|pipx)\b[^\n]*install[^\n]*pubsub-inference-worker")
    sent = [path for path in (*files, *(ROOT / "worker").rglob("*.py")) if pattern.search(path.read_text("utf-8"))]
    assert sent == []
