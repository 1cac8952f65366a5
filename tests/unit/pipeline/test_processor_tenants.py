"""Tenants that are told apart: what stops one of them stops no other."""

import asyncio

import msgspec
import pytest

from tests.support.fakes import GOOD, Answer, FakeBackend, status
from tests.support.pipeline import Pipeline, data, message
from tests.support.virtual_time import settle, virtual_time
from worker.pipeline.routes import MAX_TENANT_CHARS, RequestReader
from worker.ports import BackendRequest, Settlement
from worker.settings.schema import RequestSettings
from worker.wire.message import ReceivedMessage

BY_ATTRIBUTE = RequestSettings(tenant_attribute="tenant")
BY_METADATA = RequestSettings(tenant_metadata_key="tenant")
BUSY = status(429, b'{"error":{"message":"Rate limit reached for tenant","code":"rate_limit_exceeded"}}')


def read(rules: RequestSettings, metadata: object = None, **attributes: str) -> str | None:
    """Return the lane of a request for the model `m`."""
    content = data(metadata={} if metadata is None else metadata)
    received = ReceivedMessage(message_id="1", data=content, attributes=attributes)
    return RequestReader(rules).read(received).lane


@pytest.mark.parametrize(
    ("rules", "metadata", "attributes", "lane"),
    [
        (RequestSettings(), {"tenant": "a"}, {"tenant": "a"}, "m"),
        (BY_ATTRIBUTE, {"tenant": "b"}, {"tenant": "a"}, "a/m"),
        (BY_ATTRIBUTE, {"tenant": "b"}, {}, "m"),
        (BY_ATTRIBUTE, {}, {"tenant": "x" * 1000}, "x" * MAX_TENANT_CHARS + "/m"),
        (BY_METADATA, {"tenant": "b"}, {"tenant": "a"}, "b/m"),
        (BY_METADATA, {"tenant": 7}, {}, "7/m"),
        (BY_METADATA, {"tenant": {"id": 7}}, {}, '{"id":7}/m'),
        (BY_METADATA, {"tenant": "ü/ö"}, {}, "ü/ö/m"),
        (BY_METADATA, {"tenant": None}, {}, "m"),
        (BY_METADATA, {}, {"tenant": "a"}, "m"),
    ],
)
def test_the_tenant_is_read_where_the_settings_say(
    rules: RequestSettings, metadata: object, attributes: dict[str, str], lane: str
) -> None:
    """From an attribute or from the metadata; without one the model alone is the lane."""
    assert read(rules, metadata, **attributes) == lane


@virtual_time
async def test_a_tenant_at_its_limit_keeps_no_other_back() -> None:
    """A Retry-After that all messages of one tenant hear pauses that tenant's window, and nothing else."""

    def answer(request: BackendRequest) -> Answer:
        user = msgspec.json.decode(request.body.data)["user"]
        return Answer(status=429, body=BUSY.body, headers={"retry-after": "3600"}) if user == "noisy" else GOOD

    pipeline = Pipeline(FakeBackend(then=answer), request=BY_ATTRIBUTE)

    def start(tenant: str) -> "asyncio.Task[Settlement]":
        body = data({"model": "m", "user": tenant, "messages": []})
        return pipeline.start(message(body, attempt=1, attributes={"tenant": tenant}))

    noisy = [start("noisy") for _ in range(20)]
    await settle()
    quiet = [start("quiet") for _ in range(20)]
    await settle()
    assert [task.result() for task in quiet if task.done()] == [Settlement.ACK] * 20
    assert not any(task.done() for task in noisy)
    assert pipeline.gate.lanes["noisy/m"].waiting > 0
    assert pipeline.gate.lanes["quiet/m"].window.closed_until is None
    pipeline.processor.begin_drain()
    await asyncio.gather(*noisy)
