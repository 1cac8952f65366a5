"""
Tells that a batch has ended: to a webhook, signed as OpenAI signs, and to a topic.

An event is stored with the final status, so none is lost and none comes before the status can be read.  It is told
until each place has accepted it, at least once, with the same id each time; a webhook that refuses for three days is
given up, as at OpenAI.

Source: https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md; openai-python's
`webhooks.unwrap` verifies what is made here.
"""

import asyncio
import base64
import hashlib
import hmac
import random
import time
from collections.abc import Callable

import aiohttp
import msgspec

from worker.batches.metrics import BatchMetrics
from worker.batches.store import Event, Store
from worker.errors import BrokerError
from worker.policy.backoff import Backoff
from worker.ports import Publisher
from worker.telemetry.logs import get_logger
from worker.wire.http import is_success

GIVE_UP_S = 3 * 86_400.0
WEBHOOK_TIMEOUT_S = 15.0
EVENT_BACKOFF = Backoff(base_s=2.0, max_s=600.0, jitter=0.5)
"""A receiver that restarts is told within seconds, one that is gone is asked every ten minutes."""

_log = get_logger("batches.events")


def payload_of(event: Event) -> bytes:
    """Return an event in OpenAI's shape."""
    return msgspec.json.encode(
        {
            "id": event.id,
            "object": "event",
            "type": event.type,
            "created_at": event.created_at,
            "data": {"id": event.batch_id},
        }
    )


def signed_headers(event_id: str, payload: bytes, signing_key: str, timestamp: int) -> dict[str, str]:
    """
    Return the headers by which a receiver knows who posts.

    Args:
        event_id: Of the event.
        payload: The body.
        signing_key: `whsec_` and a key in base64.
        timestamp: Unix seconds now; receivers refuse what is five minutes old.
    """
    key = base64.b64decode(signing_key.removeprefix("whsec_"))
    digest = hmac.new(key, b"%s.%d.%s" % (event_id.encode(), timestamp, payload), hashlib.sha256).digest()
    return {
        "content-type": "application/json",
        "webhook-id": event_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": f"v1,{base64.b64encode(digest).decode()}",
    }


class EventTeller:
    """
    Tells events that are due.

    Args:
        store: Has them.
        webhook_url: Where they are posted; `None`: nowhere.
        signing_key: Signs them.
        publisher: Their topic; `None`: none.
        metrics: Count them; of its own when `None`.
        clock: Unix seconds, for the signature.
    """

    def __init__(
        self,
        store: Store,
        *,
        webhook_url: str | None = None,
        signing_key: str | None = None,
        publisher: Publisher | None = None,
        metrics: BatchMetrics | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._metrics = metrics or BatchMetrics()
        self._store = store
        self._webhook_url = webhook_url
        self._signing_key = signing_key or ""
        self._publisher = publisher
        self._clock = clock
        self._session: aiohttp.ClientSession | None = None

    async def tell(self) -> int:
        """
        Tell what is due; return how many events that was.

        Raises:
            StoreUnavailableError: Retryable; some may be told again.

        Cancellation: an event may be told and not noted, and is told again.
        """
        events = await asyncio.to_thread(self._store.due_events)
        await asyncio.gather(*(self._tell(event) for event in events))
        return len(events)

    async def _tell(self, event: Event) -> None:
        payload = payload_of(event)
        webhook = self._webhook_url is None or event.webhook_at is not None or await self._post(event, payload)
        topic = self._publisher is None or event.topic_at is not None or await self._publish(event, payload)
        if self._webhook_url is not None and event.webhook_at is None:
            self._metrics.events_total.labels("webhook", "ok" if webhook else "failed").inc()
        if self._publisher is not None and event.topic_at is None:
            self._metrics.events_total.labels("topic", "ok" if topic else "failed").inc()
        again_after_s = None
        if not (webhook and topic):
            if self._clock() - event.created_at < GIVE_UP_S:
                again_after_s = EVENT_BACKOFF.delay_s(event.attempts + 1, random.random())  # noqa: S311 - no secret
            else:
                _log.error("batch_event_given_up", event_id=event.id, batch_id=event.batch_id)
        await asyncio.to_thread(
            self._store.event_told,
            event.id,
            webhook=webhook and event.webhook_at is None,
            topic=topic and event.topic_at is None,
            again_after_s=again_after_s,
        )

    async def _post(self, event: Event, payload: bytes) -> bool:
        assert self._webhook_url is not None
        if self._session is None:
            self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=WEBHOOK_TIMEOUT_S))
        headers = signed_headers(event.id, payload, self._signing_key, int(self._clock()))
        try:
            async with self._session.post(
                self._webhook_url, data=payload, headers=headers, allow_redirects=False
            ) as answer:
                status = answer.status
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            _log.warning("batch_webhook_failed", event_id=event.id, error=f"{type(error).__name__}: {error}")
            return False
        if not is_success(status):
            _log.warning("batch_webhook_failed", event_id=event.id, error=f"status {status}")
            return False
        return True

    async def _publish(self, event: Event, payload: bytes) -> bool:
        assert self._publisher is not None
        try:
            await self._publisher.publish(payload, {"event_id": event.id, "type": event.type})
        except BrokerError as error:
            _log.warning("batch_event_not_published", event_id=event.id, error=str(error))
            return False
        return True

    async def aclose(self) -> None:
        """Close the connections; idempotent.  Cancellation: they may stay open until the process ends."""
        if self._session is not None:
            await self._session.close()
