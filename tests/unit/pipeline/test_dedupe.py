"""Not answering twice: by which key a request is recognised, and what is remembered of which answer."""

import asyncio
import sys
import types
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from tests.support.fakeclock import FakeClock
from tests.support.pipeline import a_delivery
from tests.support.virtual_time import loop_time, settle, virtual_time
from worker.delivery import Delivery, Reply
from worker.errors import SettingsError
from worker.pipeline.dedupe import REDIS_RETRY_S, REDIS_TIMEOUT_S, Dedupe, Deduper, MemoryStore, RedisStore, build_store
from worker.settings.schema import DedupeSettings
from worker.telemetry.metrics import Metrics
from worker.wire.body import RequestBody
from worker.wire.message import ReceivedMessage, RequestMessage

GOOD = Reply(status_code=200, body=b"{}")
FOR_NOW = Reply(status_code=503, body=b"{}", error_class="overloaded", retryable=True)
FINAL = Reply(status_code=400, body=b"{}", error_class="invalid_request")
CONFLICT = Reply(status_code=409, body=b"{}", error_class="idempotency_conflict")


def _delivery(
    message_id: str = "m", metadata: bytes = b'{"id":"a"}', body: bytes = b"{}", path: str = "/p"
) -> Delivery:
    request = RequestMessage(path=path, body=RequestBody(body), metadata=metadata)
    return a_delivery(request, ReceivedMessage(message_id=message_id, data=b""))


def _deduper(metadata_key: str | None = None) -> Deduper:
    return Deduper(MemoryStore(DedupeSettings()), metadata_key)


@virtual_time
async def test_an_answered_message_is_known_by_its_id() -> None:
    """Unknown before its answer, known after it, whatever the answer was."""
    for reply in (GOOD, FOR_NOW, FINAL, CONFLICT):
        deduper = _deduper()
        assert await deduper.get(_delivery()) is Dedupe.MISS
        await deduper.put(_delivery(), reply)
        assert await deduper.get(_delivery()) is Dedupe.HIT
        assert await deduper.get(_delivery("other")) is Dedupe.MISS


@virtual_time
async def test_what_is_no_request_is_known_by_its_id_too() -> None:
    """A refused message has no metadata to look into."""
    deduper, delivery = _deduper("id"), _delivery()
    delivery.request = None
    await deduper.put(delivery, FINAL)
    assert await deduper.get(delivery) is Dedupe.HIT


@virtual_time
async def test_a_key_of_the_requester_is_known_under_another_message_id() -> None:
    """The same key with the same request was answered; with another one it is a conflict."""
    deduper = _deduper("id")
    await deduper.put(_delivery("1"), GOOD)
    assert await deduper.get(_delivery("2")) is Dedupe.HIT
    assert await deduper.get(_delivery("3", body=b'{"x":1}')) is Dedupe.CONFLICT
    assert await deduper.get(_delivery("4", path="/q")) is Dedupe.CONFLICT
    assert await deduper.get(_delivery("5", metadata=b'{"id":"b"}')) is Dedupe.MISS


@virtual_time
async def test_an_error_for_now_uses_up_no_key() -> None:
    """Its redelivery is known, the same request under a new message is tried again."""
    deduper = _deduper("id")
    await deduper.put(_delivery("1"), FOR_NOW)
    assert await deduper.get(_delivery("1")) is Dedupe.HIT
    assert await deduper.get(_delivery("2")) is Dedupe.MISS


@virtual_time
async def test_a_final_error_uses_up_its_key() -> None:
    """The same request would get the same answer."""
    deduper = _deduper("id")
    await deduper.put(_delivery("1"), FINAL)
    assert await deduper.get(_delivery("2")) is Dedupe.HIT


@virtual_time
async def test_a_conflict_leaves_the_key_to_its_owner() -> None:
    """The 409 is remembered by its message id; the key still stands for the first request."""
    deduper, owner, thief = _deduper("id"), _delivery("1"), _delivery("2", body=b'{"x":1}')
    await deduper.put(owner, GOOD)
    await deduper.put(thief, CONFLICT)
    assert await deduper.get(thief) is Dedupe.HIT
    assert await deduper.get(_delivery("3")) is Dedupe.HIT
    assert await deduper.get(_delivery("4", body=b'{"x":1}')) is Dedupe.CONFLICT


@pytest.mark.parametrize("metadata", [b"{}", b'{"id":null}', b'{"id": null}'])
def test_without_a_value_the_message_id_is_the_key(metadata: bytes) -> None:
    """A key that is absent or null identifies nothing: such requests are no duplicates of each other."""

    @virtual_time
    async def run() -> None:
        deduper = _deduper("id")
        await deduper.put(_delivery("1", metadata), GOOD)
        assert await deduper.get(_delivery("2", metadata, b'{"x":1}')) is Dedupe.MISS
        assert await deduper.get(_delivery("1", metadata)) is Dedupe.HIT

    run()


def test_a_value_of_the_requester_is_no_message_id() -> None:
    """Keys of the two kinds never meet."""
    assert _deduper("id").key(_delivery(metadata=b'{"id":"m"}')) != _deduper().key(_delivery("m"))


@virtual_time
async def test_without_a_store_nothing_is_known() -> None:
    """`dedupe.store: none` answers as often as is delivered."""
    deduper = Deduper(build_store(DedupeSettings(store="none"), Metrics()))
    await deduper.put(_delivery(), GOOD)
    assert await deduper.get(_delivery()) is Dedupe.MISS
    await deduper.aclose()


def _memory(clock: FakeClock) -> MemoryStore:
    return MemoryStore(DedupeSettings(capacity=3, ttl_s=60.0), now=clock.now)


async def test_a_question_writes_nothing(clock: FakeClock) -> None:
    """Only a published answer is remembered."""
    store = _memory(clock)
    assert await store.get("k", "f") is Dedupe.MISS
    assert await store.get("k", "f") is Dedupe.MISS


async def test_entries_end_with_their_time(clock: FakeClock) -> None:
    """Counted from the last `put`, not from the last question."""
    store = _memory(clock)
    await store.put("k", "f")
    clock.advance(59.9)
    assert await store.get("k", "f") is Dedupe.HIT
    clock.advance(0.1)
    assert await store.get("k", "f") is Dedupe.MISS


async def test_a_second_put_renews(clock: FakeClock) -> None:
    """Time and fingerprint are those of the latest answer."""
    store = _memory(clock)
    await store.put("k", "f")
    clock.advance(50.0)
    await store.put("k", "g")
    clock.advance(50.0)
    assert await store.get("k", "g") is Dedupe.HIT
    assert await store.get("k", "f") is Dedupe.CONFLICT


async def test_the_least_recently_used_leaves_first(clock: FakeClock) -> None:
    """A question counts as use."""
    store = _memory(clock)
    for key in "abc":
        await store.put(key, "f")
    await store.get("a", "f")
    await store.put("d", "f")
    known = [await store.get(key, "f") for key in "abcd"]
    assert known == [Dedupe.HIT, Dedupe.MISS, Dedupe.HIT, Dedupe.HIT]


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.sampled_from("fg"), st.booleans(), st.floats(0, 40))))
def test_the_memory_never_holds_too_much_and_never_lies(steps: list[tuple[str, str, bool, float]]) -> None:
    """A hit or a conflict is always about the latest `put` of that key, within its time."""

    @virtual_time
    async def run() -> None:
        clock = FakeClock()
        store = _memory(clock)
        model: dict[str, tuple[str, float]] = {}
        for key, fingerprint, put, pause in steps:
            clock.advance(pause)
            if put:
                await store.put(key, fingerprint)
                model[key] = (fingerprint, clock.now())
                continue
            answer = await store.get(key, fingerprint)
            if answer is not Dedupe.MISS:
                latest, at = model[key]
                assert clock.now() - at < 60.0
                assert (answer is Dedupe.HIT) is (latest == fingerprint)
        known = [key for key in "abcdef" if await store.get(key, "f") is not Dedupe.MISS]
        assert len(known) <= 3

    run()


# Redis: the client library is an extra, so a small working stand-in takes its place.


class _Server:
    """What `redis.asyncio` offers of what is used, with a switch to be down."""

    class RedisError(Exception):
        pass

    def __init__(self) -> None:
        self.entries: dict[str, tuple[str, int]] = {}
        self.is_down = False
        self.hangs = False
        self.is_closed = False
        self.calls = 0

    def from_url(self, url: str, **_: object) -> "_Server":
        if not url.startswith("redis://"):
            raise ValueError(f"bad URL {url}")
        return self

    async def _arrive(self, error: Exception) -> None:
        self.calls += 1
        if self.hangs:
            await asyncio.Event().wait()
        if self.is_down:
            raise error

    async def get(self, key: str) -> str | None:
        await self._arrive(self.RedisError("down"))
        entry = self.entries.get(key)
        return entry[0] if entry else None

    async def set(self, key: str, value: str, *, px: int) -> None:
        await self._arrive(ConnectionRefusedError("down"))
        self.entries[key] = (value, px)

    async def aclose(self) -> None:
        self.is_closed = True


REDIS = DedupeSettings(store="redis", redis_url=SecretStr("redis://:secret@r/0"), ttl_s=60.0)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> _Server:
    """The library, as an import finds it."""
    stand_in = _Server()
    library = types.ModuleType("redis")
    library.asyncio = stand_in
    monkeypatch.setitem(sys.modules, "redis", library)
    return stand_in


@virtual_time
async def test_redis_remembers_for_the_time_to_live(server: _Server) -> None:
    """Entries carry their time to live and are seen by every process."""
    one, other = Deduper(build_store(REDIS, Metrics()), "id"), Deduper(build_store(REDIS, Metrics()), "id")
    await one.put(_delivery("1"), GOOD)
    assert await other.get(_delivery("2")) is Dedupe.HIT
    assert await other.get(_delivery("2", body=b'{"x":1}')) is Dedupe.CONFLICT
    assert {px for _, px in server.entries.values()} == {60_000}
    await one.aclose()
    assert server.is_closed


def _store() -> tuple[RedisStore, Metrics]:
    metrics = Metrics()
    return RedisStore(REDIS, metrics, now=loop_time), metrics


def _skipped(metrics: Metrics) -> tuple[float, float]:
    child = metrics.dedupe_skipped_total.labels
    return child("get").value, child("put").value


@virtual_time
async def test_a_redis_that_is_down_prevents_no_answer(server: _Server) -> None:
    """Not found and not remembered: the answer matters more than that it might be a second one."""
    store, metrics = _store()
    server.is_down = True
    assert await store.get("a", "-") is Dedupe.MISS
    await store.put("a", "-")
    assert _skipped(metrics) == (1, 1)
    server.is_down = False
    await asyncio.sleep(REDIS_RETRY_S)
    assert await store.get("a", "-") is Dedupe.MISS
    await store.put("a", "-")
    assert await store.get("a", "-") is Dedupe.HIT


@virtual_time
async def test_a_redis_that_fails_is_not_asked_for_a_while(server: _Server, logs: list[Any]) -> None:
    """One message in a quarter of a minute asks it, the others do not; told once at its end and once at its return."""
    store, metrics = _store()
    server.is_down = True
    for _ in range(3 * int(REDIS_RETRY_S)):
        for _ in range(10):
            assert await store.get("a", "-") is Dedupe.MISS
        await asyncio.sleep(1)
    assert server.calls == 3
    assert _skipped(metrics) == (30 * int(REDIS_RETRY_S), 0)
    server.is_down = False
    for _ in range(10):
        await store.put("a", "-")
    assert server.calls == 13
    assert [line["event"] for line in logs] == ["dedupe_store_unreachable", "dedupe_store_recovered"]


@virtual_time
async def test_a_redis_that_hangs_costs_one_message_a_wait(server: _Server) -> None:
    """Those under way when it begins to hang wait out the timeout, later ones nothing, and of those one tries again."""
    store, _ = _store()
    server.hangs = True
    assert await store.get("a", "-") is Dedupe.MISS
    assert loop_time() == REDIS_TIMEOUT_S
    await store.get("a", "-")
    assert loop_time() == REDIS_TIMEOUT_S
    await asyncio.sleep(REDIS_RETRY_S)
    trying = asyncio.ensure_future(store.get("a", "-"))
    await settle()
    began = loop_time()
    await store.get("a", "-")
    assert (loop_time(), server.calls) == (began, 2)
    await trying


def test_redis_without_its_library_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """An extra that is not installed is a fault of the settings."""
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(SettingsError, match=r"dedupe\.store: redis: the extra `redis` is not installed"):
        build_store(REDIS, Metrics())


def test_a_redis_url_that_is_none_is_told_without_its_password(server: _Server) -> None:
    """The URL holds a password, so the fault names the key alone."""
    settings = DedupeSettings(store="redis", redis_url=SecretStr("http://:secret@r"))
    with pytest.raises(SettingsError, match=r"dedupe\.redis_url") as raised:
        build_store(settings, Metrics())
    assert "secret" not in str(raised.value)
    assert raised.value.__suppress_context__
