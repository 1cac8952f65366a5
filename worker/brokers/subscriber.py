"""
The subscription: Google's high-level client below, asyncio above.

One streaming pull at a time, supervised.  The client extends leases, batches acks and reconnects; `LoopScheduler`
brings its messages to the event loop, where each becomes one task that ends in exactly one ack or nack.  There is no
thread per message.  `flow_control` bounds what arrives; what arrives beyond `max_in_flight` waits here, leased.

How a stream ends (google-cloud-pubsub 2.44) and what happens here:

* The library shuts it down by itself, for instance after a minute of failing acks: the next stream is opened at once,
  the old one keeps its leases until its running messages are settled.  Not if it was the extending that failed: then
  they had run out before, and come again over the next stream, where they join what runs.
* The subscription is gone or refused (`stream.PERMANENT`): `run` raises `BrokerResourceError`.
* The credentials are refused: they are renewed, and the stream is opened again for ten minutes.
* We stop: `drain`.
"""

import asyncio
import functools
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import grpc
from google.api_core import exceptions
from google.cloud import pubsub_v1
from google.cloud.pubsub_v1.subscriber.message import Message

from worker.brokers.flow_control import LimitedTransport, OutstandingMessages
from worker.brokers.stream import Stream, received
from worker.errors import BrokerResourceError
from worker.flow.clock import wait_for
from worker.policy.backoff import Backoff
from worker.ports import Handler, Settlement
from worker.settings.schema import PubSubSettings
from worker.telemetry.logs import get_logger
from worker.telemetry.metrics import Metrics

REOPEN_BACKOFF = Backoff(base_s=0.1, max_s=30.0, jitter=0.0)
"""First and longest wait before a stream that ended by itself is opened again."""
HEALTHY_AFTER_S = 60.0
"""A stream that lived this long resets the backoff."""
STOP_BOUND_S = 3.0
"""Longest wait for the streams to close; the library joins its consumer thread for 1 s."""
SETTLE_S = 75.0
"""Default of the last wait, for the client library's shutdown: its ack RPCs retry for 60 s while the broker is away."""
LAST_ACKS_S = 2.0
"""
What is left for acks when a drain is hurried, or when the last answers took all of that time.

Source: an answer without its ack is given twice.
"""
RENEWED_SHARE = 0.5
"""A stream is renewed when what it delivered fills more than this share of its limit, and extra messages do so too."""

_log = get_logger("broker")


class PubSubSubscriber:
    """
    A subscription; see `worker.ports.Subscriber` for the contract.

    Args:
        channel: An open synchronous channel; closed at the end of the drain.
        subscription: Full name, `projects/P/subscriptions/S`.
        settings: Sizes and lease limits.
        metrics: Counts lost leases and reopened streams.
        settle_s: Seconds that a drain has, once the grace is over or nothing runs any more, to get the last acks out.
        renew_credentials: Called when the credentials were refused, before the next stream; raises nothing.
    """

    def __init__(
        self,
        channel: grpc.Channel,
        subscription: str,
        settings: PubSubSettings,
        metrics: Metrics,
        *,
        settle_s: float = SETTLE_S,
        renew_credentials: Callable[[], None] = lambda: None,
    ) -> None:
        self.subscription = subscription
        self._settings = settings
        self._metrics = metrics
        self._renew_credentials = renew_credentials
        self._refused_since: float | None = None
        self._channel = channel
        self._outstanding = OutstandingMessages(settings)
        transport = LimitedTransport(channel, self._outstanding, is_emulator=settings.emulator_host is not None)
        self._client: Any = pubsub_v1.SubscriberClient(transport=transport)
        self._streams: set[Stream] = set()
        self._stream: Stream | None = None
        self._renewing = asyncio.Event()
        self._waiting: deque[tuple[Stream, Message, float]] = deque()
        self._tasks: set[asyncio.Task[Settlement]] = set()
        self._handler: Handler | None = None
        self._stopping = asyncio.Event()
        self._grace_over = asyncio.Event()
        self._grace_timer: asyncio.TimerHandle | None = None
        self._drained: asyncio.Task[None] | None = None
        self._settle_s = settle_s
        self._closing: asyncio.Timeout | None = None
        self._on_stopped: Callable[[], None] | None = None
        self.is_open = False

    async def max_delivery_attempts(self) -> int | None:
        """
        Return the dead-letter policy's limit; see `worker.ports.Subscriber.max_delivery_attempts`.

        Cancellation: the RPC ends in its thread, within 30 s.
        """
        try:
            found = await asyncio.to_thread(
                self._client.get_subscription, request={"subscription": self.subscription}, timeout=30
            )
        except exceptions.PermissionDenied:
            _log.warning(
                "dead_letter_policy_unreadable",
                subscription=self.subscription,
                wanted="pubsub.subscriptions.get",
                role="roles/pubsub.viewer",
            )
            return None
        except exceptions.NotFound as error:
            raise BrokerResourceError(f"the subscription {self.subscription} does not exist") from error
        except (exceptions.GoogleAPICallError, exceptions.RetryError) as error:
            raise ConnectionError(f"{self.subscription}: {error}") from error
        policy = found.dead_letter_policy
        return (policy.max_delivery_attempts or 5) if policy.dead_letter_topic else None  # 0 means 5

    async def run(self, handler: Handler, on_stopped: Callable[[], None] | None = None) -> None:
        """
        Deliver until drained; see `worker.ports.Subscriber.run`.

        Cancellation: drains without grace first.
        """
        self._handler, self._on_stopped = handler, on_stopped
        reopens = 1
        try:
            while not self._stopping.is_set():
                self._renewing.clear()
                self._stream = stream = Stream(self._client, self.subscription, self._settings, self._arrived)
                self._streams.add(stream)
                self._outstanding.on_hold = stream.on_hold  # what an ended stream has on hold comes back by itself
                self.is_open = True
                await self._first(stream.ending.wait(), self._stopping.wait(), self._renewing.wait())
                if self._stopping.is_set():
                    break
                if self._renewing.is_set() and not stream.ending.is_set():
                    stream.cancel()
                    continue
                self.is_open = False
                reopens = 1 if time.monotonic() - stream.opened_at > HEALTHY_AFTER_S else reopens
                backoff = REOPEN_BACKOFF.ceiling_s(reopens)
                await asyncio.wait({stream.closed}, timeout=backoff)  # at once when nothing of it is running
                stream.raise_if_permanent(
                    was_deferred=self._outstanding.is_deferred, unauthenticated_s=self._unauthenticated_s(stream)
                )
                self._metrics.subscription_reopens_total.inc()
                _log.warning("pull_reopened", error=str(stream.error or ""))
                await wait_for(self._stopping, backoff)
                reopens += 1
                self._streams = {known for known in self._streams if not known.closed.done()}
        except asyncio.CancelledError:
            await self.drain(0)
            raise
        finally:
            self.is_open = False
        if self._drained is not None:
            await asyncio.shield(self._drained)

    def _unauthenticated_s(self, stream: Stream) -> float:
        """Have refused credentials renewed; return how long they have been refused, 0 if they were not."""
        now = time.monotonic()
        if not stream.is_unauthenticated:
            self._refused_since = None
            return 0.0
        if self._refused_since is None or now - stream.opened_at > HEALTHY_AFTER_S:
            self._refused_since = now
        self._renew_credentials()
        return now - self._refused_since

    @staticmethod
    async def _first(*waits: Any) -> None:
        tasks = [asyncio.ensure_future(wait) for wait in waits]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _arrived(self, stream: Stream, message: Message) -> None:
        """Begin one delivery, or let it wait for its turn; runs on the event loop and must not raise."""
        self._outstanding.add(message.size)
        stream.messages += 1
        self._metrics.leased_messages.inc()
        if self._stopping.is_set():  # it came between our stop and the library's
            self._nack(stream, message)
        elif len(self._tasks) < self._max_handlers:
            self._start(stream, message, time.monotonic())
        else:
            self._waiting.append((stream, message, time.monotonic()))

    @property
    def _max_handlers(self) -> int:
        return self._settings.max_in_flight + self._outstanding.extra

    def allow_extra(self, messages: int) -> None:
        """
        See `worker.ports.Subscriber.allow_extra`.

        The server counts what is leased by stream, and its limits are those of the stream's first request.  So where
        extra messages have used up most of the latest stream's limit, that one stops pulling, and another begins.
        """
        self._outstanding.extra = messages
        self._start_next()
        stream, limit = self._stream, self._settings.max_in_flight
        if (
            messages > 0
            and stream is not None
            and stream.messages > RENEWED_SHARE * limit
            and len(self._tasks) - messages < RENEWED_SHARE * limit
            and self._outstanding.leaves_room()
        ):
            self._renewing.set()

    def _nack(self, stream: Stream, message: Message) -> None:
        message.nack()
        self._let_go(stream, message)

    def _let_go(self, stream: Stream, message: Message) -> None:
        self._outstanding.remove(message.size)
        stream.messages -= 1
        self._metrics.leased_messages.dec()
        stream.scheduler.settled()

    def _start(self, stream: Stream, message: Message, received_at: float) -> None:
        task = asyncio.get_running_loop().create_task(self._deliver(message, received_at))
        self._tasks.add(task)
        task.add_done_callback(functools.partial(self._delivered, stream, message))

    def _start_next(self) -> None:
        while self._waiting and not self._stopping.is_set() and len(self._tasks) < self._max_handlers:
            stream, message, since = self._waiting.popleft()
            if time.monotonic() - since < self._settings.max_lease_duration_s:
                self._start(stream, message, since)
            else:
                self._nack(stream, message)

    async def _deliver(self, message: Message, received_at: float) -> Settlement:
        assert self._handler is not None
        try:
            return await self._handler(received(message, received_at))
        except Exception:  # noqa: BLE001 - whatever it is, the delivery is nacked and the pull goes on
            self._metrics.internal_errors_total.inc()
            _log.exception("handler_failed", message_id=message.message_id)
            return Settlement.NACK

    def _delivered(self, stream: Stream, message: Message, task: "asyncio.Task[Settlement]") -> None:
        """
        Settle a delivery whose task has ended.

        Not inside the task: one that is cancelled before its first step never runs a line of its own, and its message
        would stay leased, with the library waiting for it.
        """
        is_ended = not task.cancelled() and task.exception() is None
        self._settle(message, task.result() if is_ended else Settlement.NACK)
        self._tasks.discard(task)
        self._let_go(stream, message)
        if self._waiting:
            self._start_next()

    def _settle(self, message: Message, verdict: Settlement) -> None:
        if verdict is Settlement.NACK:
            message.nack()
            return
        result = message.ack_with_response()
        if not result.done():  # an exactly-once subscription
            result.add_done_callback(self._ack_ended)
        elif result.exception() is not None:
            self._ack_ended(result)

    def _ack_ended(self, result: Any) -> None:
        """Count an ack that came too late; called on a library thread."""
        if not result.cancelled() and result.exception() is not None:
            self._metrics.lost_leases_total.inc()
            self._metrics.deliveries_total.labels("lost", "ack_refused").inc()
            _log.warning("lease_lost", error=str(result.exception()))

    async def drain(self, grace_s: float) -> None:
        """
        Stop; see `worker.ports.Subscriber.drain`.

        Cancellation: the drain goes on; only this wait for its end is given up.
        """
        loop = asyncio.get_running_loop()
        self._stopping.set()
        self._outstanding.is_closed = True
        end = loop.time() + grace_s
        if self._grace_timer is None:
            self._grace_timer = loop.call_at(end, self._grace_over.set)
        elif end < self._grace_timer.when() or grace_s == 0:
            self._grace_timer.cancel()
            self._grace_timer = loop.call_at(end, self._grace_over.set)
            self._hurry()
        if self._drained is None:
            self._drained = loop.create_task(self._drain())
        await asyncio.shield(self._drained)

    def _hurry(self) -> None:
        """Leave little time for the last acks, from now if they are waited for already."""
        self._settle_s = min(self._settle_s, LAST_ACKS_S)
        if self._closing is not None and not self._closing.expired():
            end = asyncio.get_running_loop().time() + self._settle_s
            self._closing.reschedule(min(end, self._closing.when() or end))

    async def _drain(self) -> None:
        for stream in self._streams:
            stream.cancel()
        await self._stop_pulling()
        if self._tasks:
            await self._first(self._all_settled(), self._grace_over.wait())
        settling_since = asyncio.get_running_loop().time()
        for task in self._tasks:
            task.cancel()
        await self._all_settled()
        if self._grace_timer is not None:
            self._grace_timer.cancel()
        if await self._close_streams(settling_since):
            await asyncio.to_thread(self._channel.close)

    async def _close_streams(self, since: float) -> bool:
        """
        Wait for the client library, which sends the last acks and nacks; not for ever, as the broker may be away.

        Returns:
            Whether it has finished.  If not, its threads still use the channel, which must stay open.
        """
        closing = [stream.closed for stream in self._streams if not stream.closed.done()]
        if not closing:
            return True
        try:
            now = asyncio.get_running_loop().time()
            async with asyncio.timeout_at(max(since + self._settle_s, now + LAST_ACKS_S)) as self._closing:
                await asyncio.wait(closing)
        except TimeoutError:
            _log.error("acks_unsent", seconds=self._settle_s)
            return False
        finally:
            self._closing = None
        return True

    async def _stop_pulling(self) -> None:
        """Wait until the streams are closed, then nack what waits: a message nacked before would come straight back."""
        waits = [
            asyncio.ensure_future(stream.has_stopped.wait()) for stream in self._streams if not stream.closed.done()
        ]
        if waits:
            _, late = await asyncio.wait(waits, timeout=STOP_BOUND_S)
            for wait in late:
                wait.cancel()
        while self._waiting:
            stream, message, _ = self._waiting.popleft()
            self._nack(stream, message)
        if self._on_stopped is not None:
            self._on_stopped()

    async def _all_settled(self) -> None:
        while self._tasks:
            await asyncio.wait(self._tasks)
