"""Which objects may be read, where answers go, and what a refusal means."""

import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from typing import Any

import pytest
from obstore.store import MemoryStore

from worker.errors import PayloadError, SettingsError
from worker.payloads.objects import BucketStore, build_bucket_store
from worker.payloads.stores import PayloadStores, Store, build_payloads
from worker.policy.model import Fault
from worker.ports import OpenPayload
from worker.settings.schema import PayloadSettings, PubSubSettings, Settings
from worker.wire.object_uri import ObjectUri, parse_object_prefix


def stores(**settings: Any) -> tuple[PayloadStores, dict[str, Store]]:
    """Storage in memory, one bucket for each prefix."""
    made: dict[str, Store] = {}

    def build(prefix: ObjectUri, _: PayloadSettings) -> Store:
        return made.setdefault(str(prefix), BucketStore(MemoryStore(), timeout_s=5))

    return PayloadStores(PayloadSettings(**settings), subscription="s-worker", build=build), made


async def content(payloads: PayloadStores, uri: str) -> bytes:
    async with payloads.open(uri) as payload:
        return b"".join([chunk async for chunk in payload.chunks])


async def test_an_object_below_a_prefix_is_read() -> None:
    """By its key below the prefix; of another bucket with the same key nothing is known."""
    payloads, made = stores(request_prefixes=["gs://one/a", "s3://two"])
    await made["gs://one/a"].write("b/1.json", b"{}")
    payloads.check("gs://one/a/b/1.json")
    assert await content(payloads, "gs://one/a/b/1.json") == b"{}"
    with pytest.raises(PayloadError, match="payload_not_found"):
        await content(payloads, "s3://two/b/1.json")


@pytest.mark.parametrize("uri", ["gs://one/b/1", "gs://one/ab/1", "gs://other/a/1", "s3://one/a/1", "file:///a/1"])
def test_an_object_outside_every_prefix_is_not_even_looked_for(uri: str) -> None:
    """The requester is told, and nothing is asked of any storage."""
    payloads, _ = stores(request_prefixes=["gs://one/a"])
    with pytest.raises(ValueError, match="is not below a prefix"):
        payloads.check(uri)


def test_what_is_no_uri_of_an_object_is_refused() -> None:
    """Before any prefix is compared."""
    payloads, _ = stores(request_prefixes=["gs://one"])
    with pytest.raises(ValueError, match=r"must not have an empty segment, `.` or `..`"):
        payloads.check("gs://one/a/../b")


async def test_an_object_over_the_limit_is_not_read() -> None:
    """Its size is known before its content comes."""
    payloads, made = stores(request_prefixes=["gs://one"], max_bytes=1_000)
    await made["gs://one/"].write("fits", b"x" * 1_000)
    await made["gs://one/"].write("large", b"x" * 1_001)
    assert len(await content(payloads, "gs://one/fits")) == 1_000
    with pytest.raises(PayloadError, match="1001 bytes; 1000 are allowed") as caught:
        await content(payloads, "gs://one/large")
    assert caught.value.fault == "payload_too_large"


class Refusing:
    """A bucket that refuses some keys."""

    def __init__(self, *refused: str) -> None:
        self.refused = refused
        self.inner = BucketStore(MemoryStore(), timeout_s=5)

    @asynccontextmanager
    async def open(self, key: str) -> AsyncIterator[OpenPayload]:
        if key in self.refused:
            raise PayloadError(Fault.PAYLOAD_REFUSED, "403")
        async with self.inner.open(key) as payload:
            yield payload

    async def write(self, key: str, data: bytes) -> None:
        await self.inner.write(key, data)


@pytest.mark.parametrize("key", ["good", "absent"])
async def test_a_refusal_is_the_objects_only_where_others_are_served(key: str) -> None:
    """Until then a role is missing, and every message would be answered with an error."""
    bucket = Refusing("bad")
    await bucket.write("good", b"{}")
    payloads = PayloadStores(PayloadSettings(request_prefixes=["gs://one"]), subscription="s", build=lambda *_: bucket)
    with pytest.raises(PayloadError, match="No object below gs://one/ could be read yet") as caught:
        await content(payloads, "gs://one/bad")
    assert caught.value.fault == "payload_unavailable"
    with pytest.raises(PayloadError, match="payload_not_found") if key == "absent" else nullcontext():
        await content(payloads, f"gs://one/{key}")
    with pytest.raises(PayloadError) as caught:
        await content(payloads, "gs://one/bad")
    assert caught.value.fault == "payload_refused"


async def test_an_answer_has_one_place() -> None:
    """Named by subscription and message, so that the message's next answer takes it."""
    payloads, made = stores(reply_prefix="gs://one/answers/")
    assert payloads.can_write
    await payloads.write("17", b'{"first":1}')
    stored = await payloads.write("17", b'{"second":1}')
    assert stored.uri == "gs://one/answers/s-worker/17.json"
    assert stored.sha256 == hashlib.sha256(b'{"second":1}').hexdigest()
    async with made["gs://one/answers"].open("s-worker/17.json") as payload:
        assert [chunk async for chunk in payload.chunks] == [b'{"second":1}']


async def test_an_answer_in_a_whole_bucket_needs_no_folder() -> None:
    """There is no empty segment in its URI; an id that is no name is written as its digest."""
    payloads, _ = stores(reply_prefix="s3://one")
    assert (await payloads.write("17", b"{}")).uri == "s3://one/s-worker/17.json"
    odd = (await payloads.write("../17", b"{}")).uri
    assert odd == f"s3://one/s-worker/{hashlib.sha256(b'../17').hexdigest()}.json"


async def test_an_answer_that_is_refused_waits_like_one_in_an_outage() -> None:
    """The worker's role is missing, which concerns every answer."""

    class ReadOnly(Refusing):
        async def write(self, key: str, data: bytes) -> None:
            raise PayloadError(Fault.PAYLOAD_REFUSED, "403")

    payloads = PayloadStores(PayloadSettings(reply_prefix="gs://one"), subscription="s", build=lambda *_: ReadOnly())
    with pytest.raises(PayloadError, match="payload_unavailable: 403"):
        await payloads.write("17", b"{}")


def test_without_a_reply_prefix_nothing_is_written() -> None:
    """Requests alone may go by reference."""
    payloads, _ = stores(request_prefixes=["gs://one"])
    assert not payloads.can_write


def test_every_fault_of_the_settings_is_named_once() -> None:
    """Options that the library does not know, of two services at once."""
    settings = Settings(
        pubsub=PubSubSettings(request_subscription="projects/p/subscriptions/s"),
        payloads=PayloadSettings(
            request_prefixes=["s3://one", "s3://two", "gs://one"],
            reply_prefix="az://one",
            s3_options={"no_such_option": "secret-value"},
            az_options={"account_name": "a", "access_key": "not base64 secret-value"},
        ),
    )
    with pytest.raises(SettingsError) as caught:
        build_payloads(settings)
    assert [fault.partition(":")[0] for fault in caught.value.faults] == ["payloads.s3_options", "payloads.az_options"]
    assert "no_such_option" in caught.value.faults[0]
    assert "secret-value" not in str(caught.value)


def test_an_extra_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders need none."""
    monkeypatch.setitem(__import__("sys").modules, "worker.payloads.objects", None)
    build_payloads(Settings(payloads=PayloadSettings(request_prefixes=["file:///srv"])))
    with pytest.raises(SettingsError, match="gs://one/: the extra `payloads` is not installed"):
        build_payloads(Settings(payloads=PayloadSettings(request_prefixes=["gs://one"])))


@pytest.mark.parametrize("prefix", ["gs://bucket/a", "s3://bucket", "az://container/a"])
async def test_a_server_that_is_away_is_an_outage(prefix: str) -> None:
    """No retries of the library, no wait, and no signature of a URL in the error's text."""
    closed = "http://127.0.0.1:9"
    settings = PayloadSettings(
        gs_options={"base_url": closed, "bearer_token": "t"},
        s3_options={"endpoint": closed, "access_key_id": "a", "secret_access_key": "b"},
        az_options={"endpoint": closed, "account_name": "a", "sas_key": "sig=secret&se=2030"},
    )
    store = build_bucket_store(parse_object_prefix(prefix), settings)
    with pytest.raises(PayloadError) as caught:
        async with store.open("1.json"):
            pass
    assert caught.value.fault == "payload_unavailable"
    assert "error sending request" in caught.value.detail
    assert "secret" not in caught.value.detail
    with pytest.raises(PayloadError, match="payload_unavailable"):
        await store.write("1.json", b"{}")
