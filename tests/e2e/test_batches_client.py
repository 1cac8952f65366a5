"""
The official client against everything: the API, coordinator and collector, the embedded broker, a worker, a backend.

Every status and every code of a failed validation; what has ended is checked against every rule of a finished batch.
"""

import json
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args, get_type_hints

import httpx
import openai
import pytest
from openai.types import Completion, CreateEmbeddingResponse, ImagesResponse, ModerationCreateResponse
from openai.types.batch_create_params import BatchCreateParams
from openai.types.chat import ChatCompletion
from openai.types.responses import Response
from pydantic import BaseModel

from tests.support.batch_invariants import Watch
from tests.support.batch_stage import (
    CHAT,
    BatchStage,
    batch_stage,
    chat_file,
    chat_line,
    create,
    finished,
    upload,
    wait_final,
)
from tests.support.batches import sqlite_url
from tests.support.waiting import until
from worker.emulators.openai.images import png
from worker.settings.schema import Settings

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

EMBEDDINGS = "/v1/embeddings"


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BatchStage]:
    """One of everything, for all tests here."""
    folder = tmp_path_factory.mktemp("batches")
    with batch_stage(folder, sqlite_url(folder), batches__check_models=False, batches__drain_s=5) as opened:
        opened.rig.worker(backend__window__initial=16)
        yield opened


@pytest.fixture(scope="module")
def client(stage: BatchStage) -> Iterator[openai.OpenAI]:
    with stage.client(stage.start()) as opened:
        yield opened


def lines(*records: Any) -> bytes:
    """Return a file of these lines: objects, or bytes as they are."""
    return b"".join((each if isinstance(each, bytes) else json.dumps(each).encode()) + b"\n" for each in records)


def line(**changes: Any) -> dict[str, Any]:
    """Return a good line with changes; `...` removes a field."""
    return {key: value for key, value in (chat_line("a", "hello") | changes).items() if value is not ...}


BODY = line()["body"]


def body(**changes: Any) -> dict[str, Any]:
    """Return a good line whose body has changes."""
    return line(body={key: value for key, value in (BODY | changes).items() if value is not ...})


@contextmanager
def slow(stage: BatchStage, latency: str) -> Iterator[None]:
    """Have the backend take its time inside the block."""
    stage.rig.sim.control({"settings": {"latency": latency}})
    try:
        yield
    finally:
        stage.rig.sim.control({"settings": {"latency": "0ms"}})


def test_a_batch_completes_in_the_order_of_its_lines(client: openai.OpenAI) -> None:
    """Every read on the way fits the one before; usage is the sum of the answers'."""
    content = chat_file(300, "ok")
    batch_id = create(client, upload(client, content), metadata={"team": "search"})
    watch = Watch()
    wait_final(client, batch_id, watch=watch)
    assert watch.reads[0]["status"] == "validating"
    done = finished(client, batch_id, content)
    assert done.batch["status"] == "completed"
    assert done.batch["error_file_id"] is None
    assert done.batch["usage"]["total_tokens"] > 0
    assert done.batch["progress"] is None
    assert done.output is not None
    assert [each["custom_id"] for each in done.output.lines] == [f"ok-{number}" for number in range(300)]


def test_unusual_files_are_understood(client: openai.OpenAI) -> None:
    """Byte order mark, CRLF, blank lines, U+2028 in a string, no last newline, any custom_id."""
    odd = [line(custom_id=name) for name in ("ü\u2028\u0085", " ", '"', "x" * 500, "\U0001f600")]
    content = b"\xef\xbb\xbf\n" + lines(*odd).replace(b"\n", b"\r\n\r\n") + json.dumps(line(custom_id="last")).encode()
    content = content.replace(b"\\u2028", "\u2028".encode()).replace(b"\\u0085", "\u0085".encode())
    done = finished(client, create(client, upload(client, content)), content)
    assert done.batch["request_counts"] == {"total": 6, "completed": 6, "failed": 0}


def test_refused_requests_become_error_lines(client: openai.OpenAI) -> None:
    """The backend's 400s are in the error file; the batch is completed all the same."""
    records = [chat_line(str(number), "hi", **({"max_tokens": -1} if number % 3 else {})) for number in range(30)]
    content = lines(*records)
    done = finished(client, create(client, upload(client, content)), content)
    assert done.batch["request_counts"] == {"total": 30, "completed": 10, "failed": 20}
    assert done.error is not None
    assert {each["response"]["status_code"] for each in done.error.lines} == {400}
    (failure,) = done.batch["failures"]
    assert (failure["count"], failure["example_line"]) == (20, 2)


def test_a_batch_whose_every_request_failed_is_completed(client: openai.OpenAI) -> None:
    """There is no output file, and no usage."""
    content = lines(*(chat_line(str(number), "hi", max_tokens=-1) for number in range(5)))
    done = finished(client, create(client, upload(client, content)), content)
    assert done.batch["status"] == "completed"
    assert (done.batch["output_file_id"], done.batch["usage"]) == (None, None)


def test_failed_lines_are_retried_with_the_same_ids_and_bodies(client: openai.OpenAI) -> None:
    """A batch of the failed lines alone, which ends like any other."""
    records = [chat_line(str(number), "hi", **({"max_tokens": -1} if number % 4 == 1 else {})) for number in range(20)]
    content = lines(*records)
    first = finished(client, create(client, upload(client, content)), content)
    again = client.post(f"/batches/{first.batch['id']}/retry", cast_to=type(client.batches.retrieve(first.batch["id"])))
    repeated = client.files.content(again.input_file_id).content
    assert repeated == lines(*records[1::4])
    done = finished(client, again.id, repeated)
    assert done.batch["request_counts"]["total"] == first.batch["request_counts"]["failed"] == 5
    assert done.batch["retry_of"] == first.batch["id"]
    # Also when the result files of the first are gone.
    client.files.delete(first.batch["error_file_id"])
    client.files.delete(first.batch["output_file_id"])
    other = client.post(
        f"/batches/{first.batch['id']}/retry", cast_to=type(again), options={"headers": {"Idempotency-Key": "k"}}
    )
    assert client.files.content(other.input_file_id).content == repeated
    finished(client, other.id, repeated)


def test_result_files_expire_as_the_batch_asked(client: openai.OpenAI) -> None:
    """From their own creation; a deleted one leaves the batch as it is."""
    content = chat_file(3, "expiring")
    batch_id = create(client, upload(client, content), output_expires_after={"anchor": "created_at", "seconds": 7200})
    done = finished(client, batch_id, content, expires_after_s=7200)
    client.files.delete(done.batch["output_file_id"])
    assert client.batches.retrieve(batch_id).to_dict() == done.batch
    with pytest.raises(openai.NotFoundError):
        client.files.content(done.batch["output_file_id"])


def test_the_input_may_be_deleted_at_once(client: openai.OpenAI) -> None:
    """The batch goes on."""
    content = chat_file(50, "deleted")
    file_id = upload(client, content)
    batch_id = create(client, file_id)
    client.files.delete(file_id)
    assert finished(client, batch_id, content).batch["request_counts"]["completed"] == 50


def test_a_running_batch_is_cancelled_with_what_it_has(client: openai.OpenAI, stage: BatchStage) -> None:
    """What is published is drained and kept; the rest is told as cancelled."""
    content = chat_file(3_000, "cancelled")
    with slow(stage, "200ms"):
        batch_id = create(client, upload(client, content))
        watch = Watch()

        def has_begun() -> bool:
            watch.add(client.batches.retrieve(batch_id).to_dict())
            return watch.reads[-1]["request_counts"]["completed"] > 20

        until(has_begun)
        assert client.batches.cancel(batch_id).status == "cancelling"
        wait_final(client, batch_id, watch=watch)
    done = finished(client, batch_id, content)
    assert done.batch["status"] == "cancelled"
    assert 20 < done.batch["request_counts"]["completed"] < 3_000
    assert {each["error"]["code"] for each in done.error.lines} == {"batch_cancelled"}  # type: ignore[union-attr]
    assert client.batches.cancel(batch_id).status == "cancelled"


def test_a_batch_expires_with_what_it_has(client: openai.OpenAI, stage: BatchStage) -> None:
    """Its time ends while it runs; the rest is told as expired."""
    content = chat_file(3_000, "expired")
    with stage.client(stage.start("api", batches__window_s=6)) as hurried, slow(stage, "1s"):
        batch_id = create(hurried, upload(hurried, content))
        wait_final(hurried, batch_id)
    done = finished(client, batch_id, content)
    assert done.batch["status"] == "expired"
    assert done.batch["request_counts"]["completed"] > 0
    assert {each["error"]["code"] for each in done.error.lines} == {"batch_expired"}  # type: ignore[union-attr]
    with pytest.raises(openai.ConflictError, match="expired"):
        client.batches.cancel(batch_id)


def test_a_validating_batch_is_cancelled_without_files(tmp_path: Path) -> None:
    """Nothing has begun: counts of nothing."""
    with batch_stage(tmp_path, sqlite_url(tmp_path)) as stage, stage.client(stage.start("api")) as client:
        batch_id = create(client, upload(client, chat_file(3)))
        assert client.batches.cancel(batch_id).status == "cancelling"
        stage.start("coordinator")
        done = finished(client, batch_id, chat_file(3))
        assert done.batch["status"] == "cancelled"
        assert done.batch["in_progress_at"] is None


BAD = {
    "not-json": (b"{", "invalid_json_line", None, ["not", "valid json"]),
    "nan": (json.dumps(line()).replace('"hello"', "NaN").encode(), "invalid_json_line", None, ["valid json"]),
    "utf8": (b'{"custom_id": "\xff"}', "invalid_json_line", None, ["valid json"]),
    "surrogate": (json.dumps(line(custom_id="\ud800")).encode(), "invalid_json_line", None, ["valid json"]),
    "deep": (b"[" * 50_000, "invalid_json_line", None, ["valid json"]),
    "digits": (b'{"a": ' + b"9" * 5_000 + b"}", "invalid_json_line", None, ["valid json"]),
    "no-custom-id": (line(custom_id=...), "missing_required_parameter", "custom_id", ["missing", "custom_id"]),
    "no-method": (line(method=...), "missing_required_parameter", "method", ["missing", "method"]),
    "no-url": (line(url=...), "missing_required_parameter", "url", ["missing", "url"]),
    "no-body": (line(body=...), "missing_required_parameter", "body", ["missing", "body"]),
    "array": ([], "invalid_request", None, []),
    "custom-id-type": (line(custom_id=7), "invalid_request", "custom_id", []),
    "custom-id-empty": (line(custom_id=""), "invalid_request", "custom_id", []),
    "method-get": (line(method="GET"), "invalid_request", "method", []),
    "body-type": (line(body="text"), "invalid_request", "body", []),
    "no-model": (body(model=...), "invalid_request", "body.model", ["model"]),
    "model-type": (body(model=7), "invalid_request", "body.model", ["model"]),
    "no-messages": (body(messages=...), "invalid_request", "body.messages", ["messages"]),
    "messages-type": (body(messages="hi"), "invalid_request", "body.messages", ["messages"]),
    "other-url": (line(url=EMBEDDINGS), "invalid_url", "url", ["does not match", "endpoint"]),
    "stream": (body(stream=True), "streaming_unsupported", "body.stream", ["streaming", "not supported"]),
    "stream-text": (body(stream="yes"), "streaming_unsupported", "body.stream", ["streaming"]),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_line_fails_the_batch_by_its_number(client: openai.OpenAI, case: str) -> None:
    """Code, param and the words that clients search for; nothing of the file is run."""
    bad, code, param, words = BAD[case]
    content = lines(line(custom_id="first"), b"", bad)
    done = finished(client, create(client, upload(client, content)), None)
    (fault,) = done.batch["errors"]["data"]
    assert (done.batch["status"], fault["line"], fault["code"], fault["param"]) == ("failed", 3, code, param)
    for word in words:
        assert word in fault["message"].lower()


def test_every_fault_of_a_file_is_told_in_order(client: openai.OpenAI) -> None:
    """By line, then by field; one for each that is independent."""
    content = lines(
        line(),
        line(custom_id=..., method="GET", url="/v1/x", body=...),
        line(),
        b"nothing",
        line(custom_id="b", body={"stream": True}),
    )
    done = finished(client, create(client, upload(client, content)), None)
    assert [(each["line"], each["code"], each["param"]) for each in done.batch["errors"]["data"]] == [
        (2, "missing_required_parameter", "custom_id"),
        (2, "invalid_request", "method"),
        (2, "invalid_url", "url"),
        (2, "missing_required_parameter", "body"),
        (3, "duplicate_custom_id", "custom_id"),
        (4, "invalid_json_line", None),
        (5, "invalid_request", "body.model"),
        (5, "invalid_request", "body.messages"),
        (5, "streaming_unsupported", "body.stream"),
    ]


def test_an_unknown_file_fails_the_batch(client: openai.OpenAI) -> None:
    """Unknown, deleted, or of another purpose."""
    deleted = upload(client, chat_file(1))
    client.files.delete(deleted)
    result = finished(client, create(client, upload(client, chat_file(1))), chat_file(1)).batch["output_file_id"]
    for file_id in ("file-unknown", deleted, result):
        done = finished(client, create(client, file_id), None)
        (fault,) = done.batch["errors"]["data"]
        assert (fault["code"], fault["param"], fault["line"]) == ("invalid_request", "input_file_id", None)
        assert "cannot find file" in fault["message"].lower()


def test_fifty_thousand_bad_lines_are_all_named(client: openai.OpenAI) -> None:
    """With their numbers."""
    content = b"".join(b'{"custom_id": "%d"}\n' % number for number in range(50_000))
    done = wait_final(client, create(client, upload(client, content)))
    faults = done["errors"]["data"]
    assert done["status"] == "failed"
    assert len(faults) == 150_000
    assert sorted({each["line"] for each in faults}) == list(range(1, 50_001))


def test_one_line_too_many_fails_the_batch(client: openai.OpenAI, stage: BatchStage) -> None:
    """50,001 lines; 50,001 inputs of embeddings over fewer lines."""
    many = chat_file(50_001)
    done = finished(client, create(client, upload(client, many)), None)
    assert [each["code"] for each in done.batch["errors"]["data"]] == ["too_many_tasks"]
    inputs = [
        {"custom_id": str(number), "method": "POST", "url": EMBEDDINGS, "body": {"model": "m", "input": ["a"] * count}}
        for number, count in enumerate([25_000, 25_000, 1])
    ]
    batch_id = create(client, upload(client, lines(*inputs)), endpoint=EMBEDDINGS)
    done = finished(client, batch_id, None)
    assert [each["code"] for each in done.batch["errors"]["data"]] == ["too_many_tasks"]


def test_an_unknown_model_fails_the_batch_where_the_list_is_known(tmp_path: Path) -> None:
    """The line's number and the model's name."""
    with (
        batch_stage(tmp_path, sqlite_url(tmp_path)) as stage,
        stage.client(stage.start(batches__models_url=stage.rig.sim.base_url)) as client,
    ):
        served = client.models.list().data[0].id
        content = lines(chat_line("a", "hi", model=served), chat_line("b", "hi", model="gpt-unknown"))
        done = finished(client, create(client, upload(client, content)), None)
    (fault,) = done.batch["errors"]["data"]
    assert (fault["code"], fault["param"], fault["line"]) == ("model_not_found", "body.model", 2)
    assert "gpt-unknown" in fault["message"]
    assert "not supported" in fault["message"]


ENDPOINTS = get_args(get_type_hints(BatchCreateParams)["endpoint"])
"""What the client's own type lets a batch name: a newer client adds its cases here."""
PIXEL = {"image_url": "data:image/png;base64," + b64encode(png(1, 1, b"red")).decode()}
BODIES: dict[str, tuple[type[BaseModel] | None, list[dict[str, Any]]]] = {
    CHAT: (ChatCompletion, [{"messages": BODY["messages"]}, {"messages": BODY["messages"], "max_tokens": -1}]),
    "/v1/completions": (
        Completion,
        [{"prompt": "hello"}, {"prompt": ["hello", "there"]}, {"prompt": "hello", "max_tokens": -1}],
    ),
    "/v1/responses": (
        Response,
        [
            {"input": "hello"},
            {"input": [{"role": "user", "content": "hello"}]},
            {"input": "hello", "max_output_tokens": 0},
        ],
    ),
    EMBEDDINGS: (
        CreateEmbeddingResponse,
        [{"input": "hello"}, {"input": [[1, 2, 3], [4]]}, {"input": "hello", "dimensions": 0}],
    ),
    "/v1/moderations": (
        ModerationCreateResponse,
        [
            {"input": "hello"},
            {"input": ["hello", "there"], "model": None},
            {
                "input": [
                    {"type": "text", "text": "hello"},
                    {"type": "image_url", "image_url": {"url": PIXEL["image_url"]}},
                ]
            },
            {"input": [7]},
        ],
    ),
    "/v1/images/generations": (
        ImagesResponse,
        [
            {"prompt": "a cat"},
            {"prompt": "a cat", "n": 2, "size": "256x128", "model": None},
            {"prompt": "a cat", "n": 0},
        ],
    ),
    "/v1/images/edits": (
        ImagesResponse,
        [
            {"prompt": "a hat", "images": [PIXEL]},
            {"prompt": "a hat", "images": [{"file_id": "file-1"}]},
            {"prompt": "a hat"},
        ],
    ),
}
OTHER: tuple[type[BaseModel] | None, list[dict[str, Any]]] = (None, [{"prompt": "hello", "input": "hello"}])
"""For an endpoint that the simulated server does not have."""


def without_identity(value: Any) -> Any:
    """Return an answer without what differs each time."""
    if isinstance(value, dict):
        varying = {"id", "created", "created_at", "completed_at"}
        return {key: without_identity(each) for key, each in value.items() if key not in varying}
    return [without_identity(each) for each in value] if isinstance(value, list) else value


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_every_endpoint_ends_each_line_as_the_server_answers_it(
    client: openai.OpenAI, stage: BatchStage, endpoint: str
) -> None:
    """The server's answer, in the shape of the client's type, or its error: what it says to the same body over HTTP."""
    kind, bodies = BODIES.get(endpoint, OTHER)
    bodies = [{key: value for key, value in {"model": "m", **each}.items() if value is not None} for each in bodies]
    records = [
        {"custom_id": str(place), "method": "POST", "url": endpoint, "body": each} for place, each in enumerate(bodies)
    ]
    done = finished(client, create(client, upload(client, lines(*records)), endpoint=endpoint), lines(*records))
    assert done.batch["status"] == "completed"
    ended = {
        each["custom_id"]: each["response"]
        for file in (done.output, done.error)
        if file is not None
        for each in file.lines
    }
    statuses = []
    for record in records:
        direct = httpx.post(stage.rig.sim.base_url + endpoint, json=record["body"])
        response = ended[record["custom_id"]]
        assert response["status_code"] == direct.status_code
        statuses.append(direct.status_code)
        if direct.is_success:
            assert without_identity(response["body"]) == without_identity(direct.json())
            assert kind is not None
            kind.model_validate(response["body"])
        else:
            assert response["body"] == direct.json()
    assert statuses == ([404] if kind is None else [200] * (len(bodies) - 1) + [400])


def test_every_endpoint_of_the_client_is_on_by_default() -> None:
    """At the API and at the worker."""
    settings = Settings.model_validate({})
    assert set(ENDPOINTS) <= set(settings.batches.endpoints)
    assert set(settings.batches.endpoints) <= set(settings.request.allowed_paths)


def test_a_small_batch_does_not_wait_for_a_large_one(client: openai.OpenAI, stage: BatchStage) -> None:
    """It ends while the large one is running."""
    with slow(stage, "100ms"):
        large = create(client, upload(client, chat_file(4_000, "large")))
        until(lambda: client.batches.retrieve(large).status == "in_progress")
        small = create(client, upload(client, chat_file(10, "small")))
        wait_final(client, small)
        assert client.batches.retrieve(large).status == "in_progress"
        client.batches.cancel(large)
    finished(client, small, chat_file(10, "small"))
    finished(client, large, chat_file(4_000, "large"))
