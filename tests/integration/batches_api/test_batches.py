"""`/v1/batches` with the official client and with plain HTTP, on the store alone: nothing runs the batches."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from structlog.testing import capture_logs

from tests.support.batches_api import CHAT, ApiThread, error, jsonl, running_api
from tests.support.waiting import until
from worker.batches.api import storage
from worker.batches.api.auth import hash_of
from worker.batches.api.batches import LISTED_ERRORS
from worker.batches.ids import BATCH, make_id
from worker.batches.states import Status
from worker.batches.store import Fault, NewBatch, Outcome, Result, Store, StoreUnavailableError
from worker.settings.load import load_settings

WINDOW = "24h"


@pytest.fixture
def file_id(client: openai.OpenAI) -> str:
    return client.files.create(file=jsonl(10), purpose="batch").id


def create(client: openai.OpenAI, file_id: str, **fields: Any) -> Any:
    return client.batches.create(input_file_id=file_id, endpoint=CHAT, completion_window=WINDOW, **fields)


def ended(api: ApiThread, batch_id: str, *, succeeded: set[int], total: int, tenant: str = "default") -> None:
    """Have a batch complete with these records good and the others not; its files have no content."""
    store = api.store
    assert store.start_batch(batch_id, total=total, model="m")
    store.record(
        [
            Outcome(batch_id=batch_id, record=number, is_ok=True, status_code=200, body=b"{}")
            if number in succeeded
            else Outcome(batch_id=batch_id, record=number, is_ok=False, code="boom", message="it broke")
            for number in range(1, total + 1)
        ]
    )
    assert store.begin_finalizing(batch_id)
    bits = bytearray((total + 7) // 8)
    for number in succeeded:
        bits[(number - 1) // 8] |= 1 << (number - 1) % 8
    result = Result(completed=len(succeeded), failed=total - len(succeeded), succeeded=bytes(bits))
    assert store.finish_batch(
        batch_id, expected=Status.FINALIZING, to=Status.COMPLETED, result=result, retention_s=86_400
    )


def test_a_new_batch_is_validating_and_complete(client: openai.OpenAI, http: httpx.Client, file_id: str) -> None:
    """Every field is there, `null` where it is unset; `expires_at` is known at once."""
    made = create(client, file_id, metadata={"team": "search"})
    assert (made.object, made.status, made.endpoint, made.input_file_id) == ("batch", "validating", CHAT, file_id)
    assert made.completion_window == WINDOW
    assert made.expires_at == made.created_at + 86_400
    assert made.metadata == {"team": "search"}
    counts = made.request_counts
    assert (counts.total, counts.completed, counts.failed) == (0, 0, 0)
    assert made._request_id is not None
    fields = http.get(f"/v1/batches/{made.id}").json()
    assert set(fields) >= set(type(made).model_fields)
    unset = {name for name, value in fields.items() if value is None}
    assert unset == {
        *("model", "errors", "output_file_id", "error_file_id", "usage", "retry_of"),
        *(
            "in_progress_at",
            "finalizing_at",
            "completed_at",
            "failed_at",
            "expired_at",
            "cancelling_at",
            "cancelled_at",
        ),
    }
    assert client.batches.retrieve(made.id) == made


def test_a_batch_without_metadata_has_none(client: openai.OpenAI, file_id: str) -> None:
    """Absent and null are the same; an empty object is another value."""
    assert create(client, file_id).metadata is None
    assert create(client, file_id, metadata=None).metadata is None
    assert create(client, file_id, metadata={}).metadata == {}


def test_the_largest_metadata_is_taken_as_it_is(client: openai.OpenAI, file_id: str) -> None:
    """Sixteen pairs of the longest keys and values, in any script."""
    metadata = {f"{number:02}" + "ü" * 62: "語" * 512 for number in range(16)}
    assert client.batches.retrieve(create(client, file_id, metadata=metadata).id).metadata == metadata


def test_the_length_of_the_window_is_a_setting(tmp_path: Path) -> None:
    """The window is called 24h; `expires_at` tells its length."""
    with running_api(tmp_path, window_s=600) as api, api.client() as client:
        made = create(client, client.files.create(file=jsonl(1), purpose="batch").id)
        assert made.expires_at == made.created_at + 600


@pytest.mark.parametrize("file", ["file-unknown", "", "file-" + "0" * 32, "x" * 1000, "file-\0"])
def test_an_unknown_file_is_left_to_validation(client: openai.OpenAI, file: str) -> None:
    """As at OpenAI: 200, and the batch fails later."""
    assert create(client, file).status == "validating"


def test_unknown_fields_are_ignored(http: httpx.Client, file_id: str) -> None:
    """What another server knows does no harm here."""
    body = {"input_file_id": file_id, "endpoint": CHAT, "completion_window": WINDOW, "priority": 3}
    assert http.post("/v1/batches", json=body).status_code == 200


GOOD = {"input_file_id": "file-1", "endpoint": CHAT, "completion_window": WINDOW}
PAIRS = {f"k{number}": "" for number in range(17)}


@pytest.mark.parametrize(
    ("changes", "param", "code", "words"),
    [
        ({"input_file_id": ...}, "input_file_id", "missing_required_parameter", []),
        ({"input_file_id": None}, "input_file_id", "invalid_type", ["null"]),
        ({"input_file_id": 7}, "input_file_id", "invalid_type", ["an integer"]),
        ({"endpoint": ...}, "endpoint", "missing_required_parameter", []),
        ({"endpoint": ["/v1/x"]}, "endpoint", "invalid_type", ["an array"]),
        ({"endpoint": "/v1/x"}, "endpoint", "invalid_value", ["/v1/x", "supported values", CHAT]),
        ({"endpoint": "chat/completions"}, "endpoint", "invalid_value", ["supported values"]),
        ({"completion_window": ...}, "completion_window", "missing_required_parameter", ["completion_window"]),
        ({"completion_window": "48h"}, "completion_window", "invalid_value", ["completion_window", "24h"]),
        ({"completion_window": 24}, "completion_window", "invalid_type", []),
        ({"metadata": "a"}, "metadata", "invalid_type", ["an object"]),
        ({"metadata": []}, "metadata", "invalid_type", ["an object"]),
        ({"metadata": {"row": 1}}, "metadata.row", "invalid_type", ["row", "string", "an integer"]),
        ({"metadata": {"row": None}}, "metadata.row", "invalid_type", ["row", "string", "null"]),
        ({"metadata": {"row": True}}, "metadata.row", "invalid_type", ["a boolean"]),
        ({"metadata": {"row": {}}}, "metadata.row", "invalid_type", ["an object"]),
        ({"metadata": {"row": 1.5}}, "metadata.row", "invalid_type", ["a decimal"]),
        ({"metadata": PAIRS}, "metadata", "object_above_max_properties", ["16", "17"]),
        ({"metadata": {"k" * 65: ""}}, "metadata", "string_above_max_length", ["64", "65"]),
        ({"metadata": {"k": "v" * 513}}, "metadata.k", "string_above_max_length", ["512", "513"]),
        ({"metadata": {"k": "\0"}}, "metadata", "invalid_value", []),
        ({"output_expires_after": 3600}, "output_expires_after", "invalid_type", []),
        ({"output_expires_after": {"seconds": 3600}}, "output_expires_after.anchor", "missing_required_parameter", []),
        (
            {"output_expires_after": {"anchor": "created_at"}},
            "output_expires_after.seconds",
            "missing_required_parameter",
            [],
        ),
        (
            {"output_expires_after": {"anchor": "x", "seconds": 3600}},
            "output_expires_after.anchor",
            "invalid_value",
            ["created_at"],
        ),
        *(
            (
                {"output_expires_after": {"anchor": "created_at", "seconds": seconds}},
                "output_expires_after.seconds",
                code,
                [],
            )
            for seconds, code in [
                (3599, "integer_below_min_value"),
                (2_592_001, "integer_above_max_value"),
                ("3600", "invalid_type"),
                (True, "invalid_type"),
                (3600.5, "invalid_type"),
            ]
        ),
        ({"idempotency_key": 1}, "idempotency_key", "invalid_type", []),
        ({"idempotency_key": ""}, "idempotency_key", "invalid_value", []),
        ({"idempotency_key": "k" * 256}, "idempotency_key", "string_above_max_length", ["255"]),
        ({"idempotency_key": "retry-of:x"}, "idempotency_key", "invalid_value", []),
    ],
)
def test_what_no_batch_can_be_made_of_is_refused(
    http: httpx.Client, changes: dict[str, Any], param: str, code: str, words: list[str]
) -> None:
    """The parameter, the code, and the words that clients search for; nothing is created."""
    body = {key: value for key, value in (GOOD | changes).items() if value is not ...}
    found = error(http.post("/v1/batches", json=body), 400)
    assert (found["type"], found["param"], found["code"]) == ("invalid_request_error", param, code)
    for word in [*words, code]:
        assert word.lower() in found["message"].lower()
    assert http.get("/v1/batches").json()["data"] == []


@pytest.mark.parametrize("way", ["field", "header", "both"])
def test_an_idempotency_key_makes_one_batch(client: openai.OpenAI, file_id: str, way: str) -> None:
    """The key stands in the body, in a header or in both; the order of the metadata does not count."""
    extra: dict[str, Any] = {}
    if way != "header":
        extra["extra_body"] = {"idempotency_key": "key"}
    if way != "field":
        extra["extra_headers"] = {"Idempotency-Key": "key"}
    first = create(client, file_id, metadata={"a": "1", "b": "2"}, **extra)
    second = create(client, file_id, metadata={"b": "2", "a": "1"}, **extra)
    assert first.id == second.id
    assert len(list(client.batches.list())) == 1


def test_two_different_keys_in_one_request_are_refused(http: httpx.Client) -> None:
    """Nobody can say which of them counts."""
    reply = http.post("/v1/batches", json=GOOD | {"idempotency_key": "a"}, headers={"idempotency-key": "b"})
    assert error(reply, 400)["code"] == "idempotency_key_mismatch"


@pytest.mark.parametrize(
    "change", [{"metadata": {}}, {"metadata": {"a": "2"}}, {"input_file_id": "file-2"}, {"endpoint": "/v1/completions"}]
)
def test_a_key_with_other_parameters_is_a_conflict_that_is_not_repeated(
    api: ApiThread, http: httpx.Client, change: dict[str, Any]
) -> None:
    """A 409 that says `conflict`, and that the client must not send again by itself."""
    assert http.post("/v1/batches", json=GOOD | {"idempotency_key": "k"}).status_code == 200
    found = error(reply := http.post("/v1/batches", json=GOOD | {"idempotency_key": "k"} | change), 409)
    assert "conflict" in found["message"].lower()
    assert found["code"] is None
    assert reply.headers["x-should-retry"] == "false"
    sent: list[httpx.Request] = []
    own = httpx.Client(event_hooks={"request": [sent.append]})
    with (
        api.client(max_retries=2, http_client=own) as client,
        pytest.raises(openai.ConflictError, match=r"(?i)conflict"),
    ):
        client.post("/batches", body=GOOD | {"idempotency_key": "k"} | change, cast_to=object)
    assert len(sent) == 1


def test_many_creations_at_once_with_one_key_make_one_batch(api: ApiThread, file_id: str) -> None:
    """One id, and every answer is a 200."""

    def once(_: int) -> str:
        with api.client() as client:
            made: str = create(client, file_id, extra_body={"idempotency_key": "key"}).id
            return made

    with ThreadPoolExecutor(22) as threads:
        ids = set(threads.map(once, range(22)))
    assert len(ids) == 1
    with api.client() as client:
        assert len(list(client.batches.list())) == 1


def test_paging_sees_every_batch_of_one_second_once(api: ApiThread, client: openai.OpenAI, http: httpx.Client) -> None:
    """250 batches, newest first, in pages of any size; a limit out of range is brought into it."""
    store = Store(api.engine, clock=lambda: 1_800_000_000.0)
    ids = []
    for _ in range(250):
        batch, _ = store.create_batch(
            NewBatch(tenant="default", endpoint=CHAT, input_file_id="file-1", window_s=86_400)
        )
        ids.append(batch.id)
    for limit in (1, 37, 100):
        assert [batch.id for batch in client.batches.list(limit=limit)] == ids[::-1]
    assert len(http.get("/v1/batches").json()["data"]) == 20
    assert len(http.get("/v1/batches", params={"limit": 1000}).json()["data"]) == 100
    page = http.get("/v1/batches", params={"limit": -5}).json()
    assert (page["object"], page["first_id"], page["last_id"], page["has_more"]) == ("list", ids[-1], ids[-1], True)
    assert http.get("/v1/batches", params={"after": ids[0]}).json() == {
        "object": "list",
        "data": [],
        "first_id": None,
        "last_id": None,
        "has_more": False,
    }


@pytest.mark.parametrize("query", ["after=batch_1", "after=file-" + "0" * 32, "after=0", "limit=ten"])
def test_a_list_refuses_what_it_cannot_use(http: httpx.Client, query: str) -> None:
    """Never page one again."""
    error(http.get(f"/v1/batches?{query}"), 400)


@pytest.mark.parametrize("batch_id", ["batch_1", "batch_" + "0" * 32, "file-" + "0" * 32, "%00", "a%2Fb"])
def test_an_unknown_batch_is_not_found(http: httpx.Client, batch_id: str) -> None:
    """For every call that names one; clients search the message."""
    for method, path in [("GET", ""), ("POST", "/cancel"), ("POST", "/retry")]:
        found = error(http.request(method, f"/v1/batches/{batch_id}{path}"), 404)
        if "/" not in batch_id and "%2F" not in batch_id:
            assert "no batch found" in found["message"].lower()
            assert found["code"] is None


def test_a_cancel_is_accepted_once_and_changes_nothing_again(client: openai.OpenAI, file_id: str) -> None:
    """The second call returns the batch as it is."""
    made = create(client, file_id)
    first = client.batches.cancel(made.id)
    assert first.status == "cancelling"
    assert first.cancelling_at is not None
    assert client.batches.cancel(made.id) == first


@pytest.mark.parametrize("status", ["failed", "completed", "expired"])
def test_a_finished_batch_cannot_be_cancelled(api: ApiThread, http: httpx.Client, file_id: str, status: str) -> None:
    """A 409 with the status in its message, not to be sent again."""
    store = api.store
    if status == "expired":
        batch, _ = Store(api.engine, clock=lambda: 1000.0).create_batch(
            NewBatch(tenant="default", endpoint=CHAT, input_file_id=file_id, window_s=1)
        )
        assert store.finish_batch(
            batch.id, expected=Status.VALIDATING, to=Status.EXPIRED, result=Result(), retention_s=3600
        )
        batch_id = batch.id
    else:
        with api.client() as client:
            batch_id = create(client, file_id).id
        if status == "failed":
            store.fail_batch(batch_id, [Fault(code="empty_file", message="no record")])
        else:
            ended(api, batch_id, succeeded={1, 2}, total=2)
    before = http.get(f"/v1/batches/{batch_id}").json()
    assert before["status"] == status
    found = error(reply := http.post(f"/v1/batches/{batch_id}/cancel"), 409)
    assert "cannot cancel" in found["message"].lower()
    assert status in found["message"]
    assert (found["type"], found["code"]) == ("invalid_request_error", None)
    assert reply.headers["x-should-retry"] == "false"
    assert http.get(f"/v1/batches/{batch_id}").json() == before


def test_a_failed_batch_names_every_bad_line(api: ApiThread, client: openai.OpenAI, file_id: str) -> None:
    """50,000 of them; a list of batches has the first ones."""
    made = create(client, file_id)
    api.store.fail_batch(
        made.id,
        [
            Fault(code="invalid_json_line", message=f"Line {number} is not valid JSON.", line=number)
            for number in range(1, 50_001)
        ],
    )
    failed = client.batches.retrieve(made.id)
    assert failed.status == "failed"
    assert failed.errors is not None
    assert failed.errors.data is not None
    assert [each.line for each in failed.errors.data] == list(range(1, 50_001))
    assert failed.errors.data[0].code == "invalid_json_line"
    (listed,) = client.batches.list()
    assert listed.errors is not None
    assert listed.errors.data is not None
    assert len(listed.errors.data) == LISTED_ERRORS


def test_a_running_batch_shows_its_progress_and_failures(api: ApiThread, http: httpx.Client, file_id: str) -> None:
    """Counts move while it runs, and what failed is told by code with an example."""
    with api.client() as client:
        batch_id = create(client, file_id).id
    store = api.store
    store.start_batch(batch_id, total=10, model="m")
    store.announce(batch_id, published=0, upto=6)
    store.advance(batch_id, published=0, upto=6, offset=600, lines=6)
    store.record(
        [
            Outcome(batch_id=batch_id, record=1, is_ok=True, status_code=200, body=b"{}"),
            Outcome(batch_id=batch_id, record=2, is_ok=False, code="rate_limit_exceeded", message="slow down"),
            Outcome(batch_id=batch_id, record=3, is_ok=False, code="rate_limit_exceeded", message="slow down"),
        ]
    )
    store.note(batch_id, waiting_for="the backend")
    found = http.get(f"/v1/batches/{batch_id}").json()
    assert found["status"] == "in_progress"
    assert found["model"] == "m"
    assert found["request_counts"] == {"total": 10, "completed": 1, "failed": 2}
    assert found["progress"]["published"] == 6
    assert found["progress"]["in_flight"] == 3
    assert found["progress"]["waiting_for"] == "the backend"
    (failure,) = found["failures"]
    assert failure == {
        "code": "rate_limit_exceeded",
        "count": 2,
        "example_line": 2,
        "example_message": "slow down",
    }


def test_a_retry_runs_the_failed_lines_once_more(api: ApiThread, client: openai.OpenAI, file_id: str) -> None:
    """The same lines, byte for byte, in a batch and a file of their own; a second call makes no second batch."""
    data = b"\xef\xbb\xbf\n" + jsonl(9).replace(b"\n", b"\r\n", 3) + jsonl(10).splitlines()[9]
    made = create(client, client.files.create(file=("in.jsonl", data), purpose="batch").id, metadata={"a": "b"})
    ended(api, made.id, succeeded={1, 3, 4, 5, 6, 7, 8}, total=10)
    again = client.post(f"/batches/{made.id}/retry", cast_to=type(made))
    assert again.id != made.id
    assert (again.status, again.endpoint, again.metadata) == ("validating", CHAT, {"a": "b"})
    assert again.retry_of == made.id
    lines = data.removeprefix(b"\xef\xbb\xbf\n").split(b"\n")
    wanted = lines[1].removesuffix(b"\r") + b"\n" + lines[8] + b"\n" + lines[9] + b"\n"
    assert client.files.content(again.input_file_id).read() == wanted
    files = [file.id for file in client.files.list()]
    assert client.post(f"/batches/{made.id}/retry", cast_to=type(made)).id == again.id
    assert [file.id for file in client.files.list()] == files
    other = client.post(
        f"/batches/{made.id}/retry", cast_to=type(made), options={"headers": {"Idempotency-Key": "second"}}
    )
    assert other.id not in {made.id, again.id}


def test_only_failed_lines_of_an_ended_batch_can_be_retried(
    api: ApiThread, client: openai.OpenAI, http: httpx.Client, file_id: str
) -> None:
    """A 409 says why not, and no file is made."""
    running, failed, good = create(client, file_id).id, create(client, file_id).id, create(client, file_id).id
    api.store.fail_batch(failed, [Fault(code="empty_file", message="no record")])
    ended(api, good, succeeded={1, 2}, total=2)
    for batch_id, word in [(running, "validating"), (failed, "failed"), (good, "completed")]:
        found = error(http.post(f"/v1/batches/{batch_id}/retry"), 409)
        assert "cannot retry" in found["message"].lower()
        assert word in found["message"]
    assert [file.id for file in client.files.list()] == [file_id]


def test_a_retry_needs_the_content_of_the_input(
    api: ApiThread, client: openai.OpenAI, http: httpx.Client, file_id: str, tmp_path: Path
) -> None:
    """A deleted input whose content is gone cannot be sent again; one whose content is still there can."""
    made = create(client, file_id)
    ended(api, made.id, succeeded=set(), total=10)
    client.files.delete(file_id)
    assert http.post(f"/v1/batches/{made.id}/retry").status_code == 200
    (tmp_path / "files" / "uploads" / file_id).unlink()
    found = error(http.post(f"/v1/batches/{made.id}/retry", headers={"idempotency-key": "2"}), 409)
    assert "deleted" in found["message"]


def test_a_limit_of_enqueued_tokens_is_told_at_creation(tmp_path: Path) -> None:
    """A 429 with a hint; the end of a batch gives its tokens back."""
    data = jsonl(10)
    with running_api(tmp_path, max_enqueued_tokens=len(data) // 4) as api, api.client() as client, api.http() as http:
        file_id = client.files.create(file=data, purpose="batch").id
        first = create(client, file_id, extra_body={"idempotency_key": "k"})
        reply = http.post("/v1/batches", json=GOOD | {"input_file_id": file_id})
        found = error(reply, 429)
        assert (found["type"], found["code"]) == ("rate_limit_error", "token_limit_exceeded")
        assert int(reply.headers["retry-after"]) <= 120
        assert create(client, file_id, extra_body={"idempotency_key": "k"}).id == first.id
        ended(api, first.id, succeeded={1}, total=1)
        create(client, file_id)


def test_a_limit_of_batches_an_hour(tmp_path: Path) -> None:
    """A 429 with a hint."""
    with running_api(tmp_path, creates_per_hour=2) as api, api.http() as http:
        assert [http.post("/v1/batches", json=GOOD).status_code for _ in range(3)] == [200, 200, 429]
        reply = http.post("/v1/batches", json=GOOD)
        assert error(reply, 429)["code"] == "rate_limit_exceeded"
        assert int(reply.headers["retry-after"]) <= 120


def test_limits_of_requests_and_uploads(tmp_path: Path) -> None:
    """Counted for each tenant; the client waits by itself as it is told."""
    with running_api(tmp_path, requests_per_minute=60, uploads_per_minute=1) as api, api.client() as client:
        client.files.create(file=jsonl(1), purpose="batch")
        with pytest.raises(openai.RateLimitError, match="uploads") as caught:
            client.files.create(file=jsonl(1), purpose="batch")
        assert int(caught.value.response.headers["retry-after"]) == 60
        with api.http() as http:
            refused = until(lambda: (reply := http.get("/v1/files")).status_code == 429 and reply)
            assert error(refused, 429)["code"] == "rate_limit_exceeded"
        assert refused.headers["retry-after"] == "1"


def test_each_limit_can_be_switched_off(tmp_path: Path) -> None:
    """By 0, from a file or a variable as well; nothing is counted then."""
    off = {"requests_per_minute": 0, "uploads_per_minute": 0, "creates_per_hour": 0}
    environ = {f"WORKER_BATCHES__{name.upper()}": "0" for name in off}
    required = {"pubsub.request_subscription": "s", "pubsub.response_topic": "t", "backend.base_url": "http://b"}
    settings = load_settings(environ=environ, flags=required).batches
    assert {name: getattr(settings, name) for name in off} == off
    with running_api(tmp_path, **off) as api, api.client() as client, api.http() as http:
        for _ in range(3):
            client.files.create(file=jsonl(1), purpose="batch")
        assert [http.post("/v1/batches", json=GOOD).status_code for _ in range(5)] == [200] * 5


@pytest.fixture
def tenants(tmp_path: Path) -> Iterator[tuple[ApiThread, openai.OpenAI, openai.OpenAI]]:
    """The API with keys, and clients of two tenants."""
    with running_api(tmp_path, auth="keys") as api:
        for tenant in ("one", "two"):
            api.store.add_key(key_hash=hash_of(f"key-{tenant}"), tenant=tenant, name="first")
        with api.client(api_key="key-one") as one, api.client(api_key="key-two") as two:
            yield api, one, two


def test_a_tenant_sees_nothing_of_another(tenants: tuple[ApiThread, openai.OpenAI, openai.OpenAI]) -> None:
    """What is another's is not found, in the same words as what does not exist."""
    api, one, two = tenants
    file = one.files.create(file=jsonl(3), purpose="batch")
    made = create(one, file.id, extra_body={"idempotency_key": "k"})
    ended(api, made.id, succeeded={1}, total=3, tenant="one")
    assert list(two.files.list()) == []
    assert list(two.batches.list()) == []
    calls = [
        lambda: two.files.retrieve(file.id),
        lambda: two.files.content(file.id),
        lambda: two.files.delete(file.id),
        lambda: two.batches.retrieve(made.id),
        lambda: two.batches.cancel(made.id),
        lambda: two.post(f"/batches/{made.id}/retry", cast_to=object),
    ]
    for call in calls:
        with pytest.raises(openai.NotFoundError):
            call()
    foreign = create(two, file.id, extra_body={"idempotency_key": "k"})
    assert foreign.id != made.id
    stored = api.store.get_batch("two", foreign.id)
    assert stored is not None
    assert stored.input_key is None
    assert one.files.content(file.id).read() == jsonl(3)


@pytest.mark.parametrize("header", [None, "Bearer wrong-key-abc", "Basic a2V5", "Bearer", "key-one"])
def test_without_a_good_key_nothing_is_answered_or_logged(
    tenants: tuple[ApiThread, openai.OpenAI, openai.OpenAI], header: str | None
) -> None:
    """A 401 for every route of the API; the key stands neither in the reply nor in the log."""
    api, _, _ = tenants
    with capture_logs() as lines, api.http(headers={"authorization": header} if header else {}) as http:
        for method, path in [
            ("GET", "/v1/files"),
            ("POST", "/v1/files"),
            ("GET", "/v1/batches"),
            ("POST", "/v1/batches"),
            ("GET", f"/v1/batches/{make_id(BATCH)}"),
            ("GET", "/v1/models"),
        ]:
            found = error(http.request(method, path), 401)
            assert found["type"] == "authentication_error"
            assert "abc" not in found["message"]
        assert http.get("/openapi.json").status_code == 200
    assert "wrong-key-abc" not in json.dumps(lines, default=str)


def test_keys_never_stand_in_the_log(tenants: tuple[ApiThread, openai.OpenAI, openai.OpenAI]) -> None:
    """Nor do the contents of files."""
    _, one, _ = tenants
    with capture_logs() as lines:
        create(one, one.files.create(file=jsonl(1), purpose="batch").id, metadata={"a": "confidential"})
        until(lambda: len(lines) >= 2)
    text = json.dumps(lines, default=str)
    assert "batch_api_request" in text
    assert "key-one" not in text
    assert "confidential" not in text
    assert "hello" not in text


class Flaky:
    """A store whose next calls fail; `lost` ones do what they should before."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.failures = 0
        self.is_lost = False

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)

        def call(*args: Any, **options: Any) -> Any:
            if self.failures > 0:
                self.failures -= 1
                if self.is_lost:
                    method(*args, **options)
                raise StoreUnavailableError("the database system is shutting down")
            return method(*args, **options)

        return call


@pytest.fixture
def flaky(api: ApiThread) -> Flaky:
    found = api.storage.store = Flaky(api.store)  # type: ignore[assignment]
    return found


def test_a_database_that_is_away_is_a_503(flaky: Flaky, http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a hint, for every route that needs the database."""
    monkeypatch.setattr(storage, "INSIST_S", 0.1)
    flaky.failures = 10_000
    for method, path, body in [
        ("GET", "/v1/batches", None),
        ("GET", f"/v1/batches/{make_id(BATCH)}", None),
        ("POST", f"/v1/batches/{make_id(BATCH)}/cancel", None),
        ("GET", "/v1/files", None),
        ("POST", "/v1/batches", GOOD),
    ]:
        reply = http.request(method, path, json=body)
        assert error(reply, 503)["type"] == "server_error"
        assert 1 <= int(reply.headers["retry-after"]) <= 120
    flaky.failures = 0
    assert http.get("/v1/batches").json()["data"] == []


@pytest.mark.parametrize("is_lost", [False, True], ids=["refused", "confirmation-lost"])
def test_a_creation_outlasts_a_short_outage(flaky: Flaky, http: httpx.Client, is_lost: bool) -> None:
    """The answer is a 200 and there is one batch, also when the first commit was stored and its confirmation lost."""
    flaky.failures, flaky.is_lost = 2, is_lost
    made = http.post("/v1/batches", json=GOOD)
    assert made.status_code == 200
    assert [batch["id"] for batch in http.get("/v1/batches").json()["data"]] == [made.json()["id"]]


@pytest.mark.parametrize("is_lost", [False, True], ids=["refused", "confirmation-lost"])
def test_an_upload_outlasts_a_short_outage(
    flaky: Flaky, client: openai.OpenAI, is_lost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is one file, with its content."""
    flaky.is_lost = is_lost
    original = storage._Source.pieces

    async def failing_after(self: Any) -> Any:
        async for piece in original(self):
            yield piece
        flaky.failures = 2

    monkeypatch.setattr(storage._Source, "pieces", failing_after)
    made = client.files.create(file=jsonl(3), purpose="batch")
    assert [file.id for file in client.files.list()] == [made.id]
    assert client.files.content(made.id).read() == jsonl(3)
