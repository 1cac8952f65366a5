"""Events: signed so that the official client accepts them, told until they are accepted."""

import base64
import json
from typing import Any

import openai
import pytest
from aiohttp import web

from tests.support.batches import create, opened_store, sqlite_url
from worker.batches.events import EVENT_BACKOFF, GIVE_UP_S, EventTeller
from worker.batches.store import Fault
from worker.errors import PublishRetryableError

SIGNING_KEY = "whsec_" + base64.b64encode(b"a key of some length").decode()


class Receiver:
    """A webhook."""

    def __init__(self) -> None:
        self.status = 200
        self.requests: list[tuple[bytes, dict[str, str]]] = []

    async def handle(self, request: web.BaseRequest) -> web.Response:
        self.requests.append((await request.read(), dict(request.headers)))
        return web.Response(status=self.status, headers={"location": "/elsewhere"} if self.status == 302 else {})


@pytest.fixture
async def receiver():
    made = Receiver()
    runner = web.ServerRunner(web.Server(made.handle))
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    made.url = f"http://127.0.0.1:{runner.addresses[0][1]}/hook"
    yield made
    await runner.cleanup()


class Topic:
    def __init__(self) -> None:
        self.messages: list[tuple[bytes, Any]] = []
        self.is_away = False

    async def publish(self, data: bytes, attributes: Any) -> str:
        if self.is_away:
            raise PublishRetryableError("away")
        self.messages.append((data, attributes))
        return "1"


@pytest.fixture
def store(tmp_path, time_):
    with opened_store(sqlite_url(tmp_path), clock=time_) as opened:
        yield opened


@pytest.fixture
def ended(store):
    batch = create(store)
    store.fail_batch(batch.id, [Fault(code="c", message="m")])
    return batch


async def test_the_official_client_accepts_the_webhook(store, ended, receiver, time_):
    teller = EventTeller(store, webhook_url=receiver.url, signing_key=SIGNING_KEY)
    assert await teller.tell() == 1
    assert await teller.tell() == 0
    await teller.aclose()
    ((body, headers),) = receiver.requests
    event = openai.OpenAI(api_key="x", webhook_secret=SIGNING_KEY).webhooks.unwrap(body.decode(), headers)
    assert event.type == "batch.failed"
    assert event.data.id == ended.id
    assert event.created_at == time_.now
    with pytest.raises(openai.InvalidWebhookSignatureError):
        openai.OpenAI(api_key="x", webhook_secret=SIGNING_KEY).webhooks.unwrap(body.decode() + " ", headers)


@pytest.mark.parametrize("status", [500, 404, 302])
async def test_a_webhook_that_refuses_is_told_again_with_the_same_id(store, ended, receiver, time_, status):
    receiver.status = status
    topic = Topic()
    teller = EventTeller(store, webhook_url=receiver.url, signing_key=SIGNING_KEY, publisher=topic, clock=time_)
    await teller.tell()
    receiver.status = 200
    time_.now += EVENT_BACKOFF.max_s
    await teller.tell()
    time_.now += EVENT_BACKOFF.max_s
    assert await teller.tell() == 0
    await teller.aclose()
    assert len({headers["webhook-id"] for _, headers in receiver.requests}) == 1
    assert len(receiver.requests) == 2
    assert len(topic.messages) == 1  # it had accepted


async def test_a_topic_that_is_away_is_told_again(store, ended, time_):
    topic = Topic()
    topic.is_away = True
    teller = EventTeller(store, publisher=topic, clock=time_)
    await teller.tell()
    topic.is_away = False
    time_.now += EVENT_BACKOFF.max_s
    await teller.tell()
    ((data, attributes),) = topic.messages
    event = json.loads(data)
    assert event == {
        "id": event["id"],
        "object": "event",
        "type": "batch.failed",
        "created_at": event["created_at"],
        "data": {"id": ended.id},
    }
    assert attributes == {"event_id": event["id"], "type": "batch.failed"}


async def test_a_webhook_that_refuses_for_days_is_given_up(store, ended, receiver, time_, logs):
    receiver.status = 500
    teller = EventTeller(store, webhook_url=receiver.url, signing_key=SIGNING_KEY, clock=time_)
    await teller.tell()
    time_.now += GIVE_UP_S
    await teller.tell()
    time_.now += GIVE_UP_S
    assert await teller.tell() == 0
    await teller.aclose()
    assert "batch_event_given_up" in {entry["event"] for entry in logs}


async def test_nobody_to_tell_is_told_once(store, ended):
    teller = EventTeller(store)
    assert await teller.tell() == 1
    assert await teller.tell() == 0
