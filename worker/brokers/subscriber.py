"""
The subscription: one streaming pull at a time, on the event loop; `leases` knows what is held and what is to be sent.

Raw stubs instead of Google's high-level client, which has threads of its own, limits that make it stop reading, and a
request for every message before that is handed out.  Each delivery becomes one task that ends in one ack or nack.

A stream's limits are set in its first request and cannot be changed.  So a stream is opened with exactly the room that
there is, never while there is none, and is replaced when that has changed by much.  A stream is ended by its half that
is ours: the server sends what it has under way, which is held like all else, and ends the other half.  Google's
emulator (0.8.20) ignores limits, so a stream that overruns them is ended too; and it never learns of a cancellation,
which is therefore what comes last.

How a stream ends, and what happens then:

* By itself, also without an error: the next one is opened, after a wait if nothing came over it.
* The subscription is gone or refused (`PERMANENT`): `run` raises `BrokerResourceError`.
* The credentials are refused: they are renewed, and a stream is opened again for ten minutes.
* Silence: a ping goes out every 30 s.  A server that has answered one before and leaves one unanswered is not there any
  more, whatever the connection says, and the stream is broken off.
* We stop: `drain`.

Source: google/pubsub/v1/pubsub.proto; https://github.com/googleapis/google-cloud-go/pull/13457 for the pings.
"""

import asyncio
import functools
import math
import random
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from typing import Any

import grpc
from google.protobuf.empty_pb2 import Empty
from google.rpc import error_details_pb2, status_pb2

from worker.brokers.leases import TICK_S, Grant, Kind, Lease, Leases, Request
from worker.brokers.messages import (
    AcknowledgeRequest,
    GetSubscriptionRequest,
    ModifyAckDeadlineRequest,
    StreamingPullRequest,
    StreamingPullResponse,
    Subscription,
)
from worker.errors import BrokerResourceError
from worker.flow.clock import wait_for
from worker.policy.backoff import Backoff
from worker.ports import Handler, Settlement
from worker.settings.schema import PubSubSettings
from worker.telemetry.logs import get_logger
from worker.telemetry.metrics import Metrics
from worker.wire.message import ReceivedMessage

REOPEN_BACKOFF = Backoff(base_s=0.1, max_s=5.0, jitter=0.5)
"""Wait before the next stream when one ended by itself; from the beginning again once a stream brought something."""
MIN_STREAM_DEADLINE_S = 10
"""The shortest lease that a stream may ask for."""
PING_S = 30.0
"""Interval of pings on a stream; the service ends one that is silent for a minute."""
PONG_S = 15.0
"""How long an answer to a ping may take, as in Google's clients."""
HALF_CLOSE_S = 1.0
"""How long a server has to end a stream whose requests have ended, before the stream is cancelled."""
STOP_BOUND_S = 3.0
"""Longest wait in a drain for the stream to end."""
RPC_TIMEOUT_S = 10.0
"""Of one ack or change of a lease; three of them fit into what is left of a lease that is to be extended."""
SETTLE_S = 75.0
"""Default of the last wait for acks: longer than a lease, within which they are retried."""
LAST_ACKS_S = 2.0
"""
What is left for acks when a drain is hurried, or when the last answers took all of that time.

Source: an answer without its ack is given twice.
"""
UNAUTHENTICATED_PATIENCE_S = 600.0
"""Refused credentials are renewed and tried again for so many seconds: a token is revoked before its time, a key is
rotated, the metadata server is not ready.  House decision."""
HEALTHY_AFTER_S = 60.0
"""A stream that lived this long had credentials that were good."""
PERMANENT = {
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
}
"""Errors that another try would meet again."""
PROTOCOL_VERSION = 1
"""The server answers pings."""

_SERVICE = "/google.pubsub.v1.Subscriber/"
_DETAILS = "grpc-status-details-bin"

_log = get_logger("broker")


class _Stream:
    """One streaming pull: its call, and what it may deliver."""

    def __init__(self, grant: Grant, first: Any) -> None:
        self.grant = grant
        self.call: Any = None
        self.opened_at = time.monotonic()
        self.has_delivered = False
        self.is_closing = False
        self.is_over = asyncio.Event()
        """Nothing more is to be written on it."""
        self._first = first
        self._silent_ticks: int | None = None
        """For how many ticks a ping has been unanswered."""

    async def requests(self) -> AsyncIterator[Any]:
        """Yield what is written on it: the first request, then pings until it is closed; its end is our half's."""
        yield self._first
        while True:
            await wait_for(self.is_over, PING_S)
            if self.is_over.is_set():
                return
            self._silent_ticks = self._silent_ticks or 0
            yield StreamingPullRequest()

    def heard(self) -> bool:
        """Note a sign of life; return whether it may answer a ping."""
        was_pinged, self._silent_ticks = self._silent_ticks is not None, None
        return was_pinged

    def is_silent(self) -> bool:
        """
        Return whether a ping has been unanswered for `PONG_S`; called at each tick.

        Ticks are counted, not seconds: while the event loop does not turn, the answer may have come and not been read.
        """
        if self._silent_ticks is None:
            return False
        self._silent_ticks += 1
        return self._silent_ticks * TICK_S > PONG_S

    def close(self) -> None:
        """End our half; what the server has under way still comes."""
        if not self.is_closing:
            self.is_closing = True
            self.is_over.set()
            asyncio.get_running_loop().call_later(HALF_CLOSE_S, self.call.cancel)


class PubSubSubscriber:
    """
    A subscription; see `worker.ports.Subscriber` for the contract.

    Args:
        channel: An open asynchronous channel; closed at the end of the drain.
        subscription: Full name, `projects/P/subscriptions/S`.
        settings: Sizes and lease limits.
        metrics: Counts lost leases and reopened streams.
        settle_s: Seconds that a drain has, once the grace is over or nothing runs any more, to get the last acks out.
        renew_credentials: Called when the credentials were refused, before the next try; raises nothing.
        source: `ReceivedMessage.source` of what it delivers.
    """

    def __init__(
        self,
        channel: grpc.aio.Channel,
        subscription: str,
        settings: PubSubSettings,
        metrics: Metrics,
        *,
        settle_s: float = SETTLE_S,
        renew_credentials: Callable[[], None] = lambda: None,
        source: str = "",
    ) -> None:
        self.subscription = subscription
        self.source = source
        self.max_in_flight = settings.max_in_flight
        self.is_open = False
        self._channel = channel
        self._metrics = metrics
        self._settle_s = settle_s
        self._renew_credentials = renew_credentials
        self._refused_since: float | None = None
        self._leases = Leases(settings, on_lost=self._lost, on_refused=self._ack_refused)
        self._told = 0
        """Leases that the metric has."""
        self._has_asked = False
        """For the subscription, whose ack deadline is the first lease's."""
        self._client_id = str(uuid.uuid4())
        """The same for every stream, by which the server knows whose keys were ordered here."""
        self._metadata = (("x-goog-request-params", f"subscription={subscription}"),)
        self._open: Any = channel.stream_stream(
            _SERVICE + "StreamingPull",
            request_serializer=StreamingPullRequest.SerializeToString,
            response_deserializer=StreamingPullResponse.FromString,
        )
        self._acknowledge = self._method("Acknowledge", AcknowledgeRequest, Empty)
        self._modify_ack_deadline = self._method("ModifyAckDeadline", ModifyAckDeadlineRequest, Empty)
        self._get_subscription = self._method("GetSubscription", GetSubscriptionRequest, Subscription)
        self._handler: Handler | None = None
        self._stream: _Stream | None = None
        self._running: dict[asyncio.Task[Settlement], Lease] = {}
        self._rpcs: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        """Set whenever something that a wait here may be for has changed."""
        self._flush_timer: asyncio.TimerHandle | None = None
        self._flush_at = math.inf
        self._answers_pings = False
        self._tick_timer: asyncio.TimerHandle | None = None
        self._stopping = asyncio.Event()
        self._is_pulling = False
        self._grace_over = False
        self._grace_timer: asyncio.TimerHandle | None = None
        self._grace_until = math.inf
        self._drained: asyncio.Task[None] | None = None
        self._closing: asyncio.Timeout | None = None
        self._on_stopped: Callable[[], None] | None = None

    def _method(self, name: str, request: Any, response: Any) -> Any:
        call = self._channel.unary_unary(
            _SERVICE + name, request_serializer=request.SerializeToString, response_deserializer=response.FromString
        )
        return functools.partial(call, metadata=self._metadata)

    async def max_delivery_attempts(self, source: str = "") -> int | None:  # noqa: ARG002 - it is the only one
        """Return the dead-letter policy's limit; see `worker.ports.Subscriber.max_delivery_attempts`."""
        try:
            found = await self._read_subscription()
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.PERMISSION_DENIED:
                _log.warning(
                    "dead_letter_policy_unreadable",
                    subscription=self.subscription,
                    wanted="pubsub.subscriptions.get",
                    role="roles/pubsub.viewer",
                )
                return None
            if error.code() is grpc.StatusCode.NOT_FOUND:
                raise BrokerResourceError(f"the subscription {self.subscription} does not exist") from error
            raise ConnectionError(f"{self.subscription}: {_text(error)}") from error
        policy = found.dead_letter_policy
        if not policy.dead_letter_topic:
            _log.warning("dead_letter_policy_missing", subscription=self.subscription)
            return None
        return policy.max_delivery_attempts or 5  # 0 means 5

    async def _read_subscription(self) -> Any:
        self._has_asked = True
        request = GetSubscriptionRequest(subscription=self.subscription)
        found = await self._get_subscription(request, timeout=RPC_TIMEOUT_S)
        self._leases.first_s = max(found.ack_deadline_seconds, MIN_STREAM_DEADLINE_S)
        return found

    async def run(self, handler: Handler, on_stopped: Callable[[], None] | None = None) -> None:
        """
        Deliver until drained; see `worker.ports.Subscriber.run`.

        Cancellation: drains without grace first.
        """
        self._handler, self._on_stopped = handler, on_stopped
        self._is_pulling = True
        try:
            await self._pull()
        finally:
            self._is_pulling = self.is_open = False
            self._changed.set()
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                await self.drain(0)
        if self._drained is not None:
            await asyncio.shield(self._drained)

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    # Streams.

    async def _pull(self) -> None:
        if not (self._has_asked or self._stopping.is_set()):
            try:
                await self._read_subscription()
            except grpc.aio.AioRpcError as error:  # whatever it means for the subscription, the stream will tell
                _log.info("ack_deadline_unreadable", first_lease_s=self._leases.first_s, error=_text(error))
        self._tick()
        failures = 0
        while True:
            await self._until(lambda: self._stopping.is_set() or self._leases.room() is not None)
            grant = self._leases.room()
            if self._stopping.is_set() or grant is None:
                return
            self._stream = stream = self._begin(grant)
            self.is_open = True
            fault = await self._read(stream)
            self._stream = None
            if stream.is_closing:
                continue
            self.is_open = False
            self._raise_if_permanent(stream, fault)
            self._metrics.subscription_reopens_total.inc()
            _log.warning("pull_reopened", error="" if fault is None else _text(fault))
            failures = 1 if stream.has_delivered else failures + 1
            await wait_for(self._stopping, REOPEN_BACKOFF.delay_s(failures, random.random()))  # noqa: S311 - no secret

    def _begin(self, grant: Grant) -> _Stream:
        first = StreamingPullRequest(
            subscription=self.subscription,
            stream_ack_deadline_seconds=math.ceil(self._leases.first_s),
            client_id=self._client_id,
            max_outstanding_messages=grant.max_messages,
            max_outstanding_bytes=grant.max_bytes,
            protocol_version=PROTOCOL_VERSION,
        )
        stream = _Stream(grant, first)
        # It waits for a connection: failing without one, and waiting longer each time, would outlast many outages.
        stream.call = self._open(stream.requests(), metadata=self._metadata, wait_for_ready=True)
        return stream

    async def _read(self, stream: _Stream) -> grpc.aio.AioRpcError | None:
        """Take what comes until the stream has ended; return its error."""
        try:
            async for response in stream.call:
                self._arrived(stream, response)
        except grpc.aio.AioRpcError as error:
            return error
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            return None  # the call was cancelled, by us
        finally:
            stream.is_over.set()
        return None

    def _raise_if_permanent(self, stream: _Stream, error: grpc.aio.AioRpcError | None) -> None:
        """Raise `BrokerResourceError` if the subscription is gone or refused; have refused credentials renewed."""
        code, now = None if error is None else error.code(), time.monotonic()
        is_permanent = code in PERMANENT
        if code is not grpc.StatusCode.UNAUTHENTICATED:
            self._refused_since = None
        else:
            if self._refused_since is None or now - stream.opened_at > HEALTHY_AFTER_S:
                self._refused_since = now
            self._renew_credentials()
            is_permanent = now - self._refused_since >= UNAUTHENTICATED_PATIENCE_S
        if error is not None and is_permanent:
            raise BrokerResourceError(f"{self.subscription}: {_text(error)}") from error

    def _arrived(self, stream: _Stream, response: Any) -> None:
        """Hold what a response brings, and start what may run; must not raise."""
        deliveries = response.received_messages
        if stream.heard() and not deliveries:
            self._answers_pings = True
        if not deliveries:
            return
        stream.has_delivered = True
        now, properties = time.monotonic(), response.subscription_properties
        is_ordered, is_exactly_once = properties.message_ordering_enabled, properties.exactly_once_delivery_enabled
        for delivery in deliveries:
            message = received(delivery, now, self.source)
            self._leases.add(
                delivery.ack_id,
                message,
                delivery.message.ByteSize(),
                stream.grant,
                key=message.ordering_key if is_ordered else "",
                is_exactly_once=is_exactly_once,
            )
        if self._leases.is_overrun():
            stream.close()
        self._go_on()

    def allow_extra(self, messages: int) -> None:
        """
        See `worker.ports.Subscriber.allow_extra`.

        The server counts what is leased by stream: the stream is replaced at the next tick if its limits do not fit,
        and at once if they keep messages back that may come now.
        """
        was_full = self._leases.is_full
        self._leases.extra = messages
        stream = self._stream
        if was_full and not self._leases.is_full and stream is not None and not self._leases.fits(stream.grant):
            stream.close()
        self._go_on()

    def _tick(self) -> None:
        """Do what is due once a second."""
        self._tick_timer = asyncio.get_running_loop().call_later(TICK_S, self._tick)
        self._leases.tick()
        stream = self._stream
        if stream is not None and not stream.is_closing:
            if stream.is_silent() and self._answers_pings:
                _log.warning("pull_silent", seconds=PONG_S)
                stream.call.cancel()
            elif not self._leases.fits(stream.grant):
                stream.close()
        self._go_on()

    # Handlers.

    def _go_on(self) -> None:
        """Do what has become possible; to be called after every change of the leases."""
        self._start_ready()
        leased = len(self._leases)
        gauge = self._metrics.leased_messages
        gauge.set(gauge.value + leased - self._told)  # other subscriptions have their part of it
        self._told = leased
        self._plan()
        self._changed.set()

    def _start_ready(self) -> None:
        while len(self._running) < self._leases.max_running and not self._stopping.is_set():
            lease = self._leases.next()
            if lease is None:
                return
            assert self._handler is not None
            task = asyncio.get_running_loop().create_task(self._handler(lease.message))
            self._running[task] = lease
            task.add_done_callback(self._handled)

    def _handled(self, task: "asyncio.Task[Settlement]") -> None:
        """
        Settle a delivery whose task has ended.

        Not inside the task: one that is cancelled before its first step never runs a line of its own.
        """
        lease = self._running.pop(task)
        settlement = Settlement.NACK
        if not task.cancelled():
            error = task.exception()
            if error is None:
                settlement = task.result()
            else:
                self._metrics.internal_errors_total.inc()
                _log.error("handler_failed", message_id=lease.message.message_id, exc_info=error)
        self._leases.settle(lease, settlement)
        self._go_on()

    def _lost(self, lease: Lease) -> None:
        self._metrics.lost_leases_total.inc()
        _log.warning("lease_lost", message_id=lease.message.message_id)

    def _ack_refused(self, _: Lease) -> None:
        self._metrics.deliveries_total.labels("lost", "ack_refused").inc()

    # Requests.

    def _plan(self) -> None:
        """Have `_flush` called when there is something to send."""
        at = self._leases.next_at()
        if at < self._flush_at:
            if self._flush_timer is not None:
                self._flush_timer.cancel()
            self._flush_at = at
            self._flush_timer = asyncio.get_running_loop().call_later(max(0.0, at - time.monotonic()), self._flush)

    def _flush(self) -> None:
        self._flush_timer, self._flush_at = None, math.inf
        for request in self._leases.requests():
            task = asyncio.get_running_loop().create_task(self._send(request))
            self._rpcs.add(task)
            task.add_done_callback(self._rpcs.discard)
        self._plan()

    async def _send(self, request: Request) -> None:
        try:
            if request.kind is Kind.ACK:
                ack = AcknowledgeRequest(subscription=self.subscription, ack_ids=request.ack_ids)
                await self._acknowledge(ack, timeout=RPC_TIMEOUT_S)
            else:
                change = ModifyAckDeadlineRequest(
                    subscription=self.subscription, ack_ids=request.ack_ids, ack_deadline_seconds=request.seconds
                )
                await self._modify_ack_deadline(change, timeout=RPC_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNAUTHENTICATED:
                self._renew_credentials()
            reasons = _reasons(error)
            if not reasons:
                count, kind = len(request.leases), request.kind.value
                _log.warning("lease_request_failed", kind=kind, count=count, error=_text(error))
            self._leases.failed(request, is_permanent=error.code() in PERMANENT, reasons=reasons)
        except Exception:  # noqa: BLE001 - whatever it is, what the request was for is not forgotten
            self._metrics.internal_errors_total.inc()
            _log.exception("lease_request_broken", kind=request.kind.value, count=len(request.leases))
            self._leases.failed(request)
        else:
            self._leases.confirmed(request)
        self._go_on()

    # The end.

    async def drain(self, grace_s: float) -> None:
        """
        Stop; see `worker.ports.Subscriber.drain`.

        Cancellation: the drain goes on; only this wait for its end is given up.
        """
        loop = asyncio.get_running_loop()
        self._stopping.set()
        end = loop.time() + grace_s
        if self._grace_timer is None:
            self._grace_timer, self._grace_until = loop.call_at(end, self._end_grace), end
        elif end < self._grace_until or grace_s == 0:  # uvloop's timer of a time that has passed cannot be asked
            self._grace_timer.cancel()
            self._grace_timer, self._grace_until = loop.call_at(end, self._end_grace), end
            self._hurry()
        if self._drained is None:
            self._drained = loop.create_task(self._drain())
        await asyncio.shield(self._drained)

    def _end_grace(self) -> None:
        self._grace_over = True
        self._changed.set()

    def _hurry(self) -> None:
        """Leave little time for the last acks, from now if they are waited for already."""
        self._settle_s = min(self._settle_s, LAST_ACKS_S)
        if self._closing is not None and not self._closing.expired():
            end = asyncio.get_running_loop().time() + self._settle_s
            self._closing.reschedule(min(end, self._closing.when() or end))

    async def _drain(self) -> None:
        await self._stop_pulling()
        await self._until(lambda: self._grace_over or not self._running)
        settling_since = asyncio.get_running_loop().time()
        for task in self._running:
            task.cancel()
        await self._until(lambda: not self._running)
        await self._send_last(settling_since)
        for timer in (self._grace_timer, self._tick_timer, self._flush_timer):
            if timer is not None:
                timer.cancel()
        for rpc in self._rpcs:
            rpc.cancel()
        await asyncio.gather(*self._rpcs, return_exceptions=True)
        await self._channel.close(None)

    async def _stop_pulling(self) -> None:
        """Wait until the stream has ended, then nack what waits: a message nacked before would come straight back."""
        if self._stream is not None:
            self._stream.close()
        self._changed.set()
        with suppress(TimeoutError):
            async with asyncio.timeout(STOP_BOUND_S):
                await self._until(lambda: not self._is_pulling)
        self._leases.nack_unstarted()
        self._go_on()
        if self._on_stopped is not None:
            self._on_stopped()

    async def _send_last(self, since: float) -> None:
        """Wait until the last acks and nacks are with the broker; not for ever, as it may be away."""
        self._leases.hurry()
        self._go_on()
        now = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout_at(max(since + self._settle_s, now + LAST_ACKS_S)) as self._closing:
                await self._until(lambda: self._leases.is_settled)
        except TimeoutError:
            _log.error("acks_unsent", seconds=self._settle_s)
        finally:
            self._closing = None


def received(delivery: Any, received_at: float, source: str = "") -> ReceivedMessage:
    """Return what the processor sees of a delivery that came at `received_at`, monotonic seconds."""
    message = delivery.message
    published = message.publish_time
    return ReceivedMessage(
        message_id=message.message_id,
        data=message.data,
        attributes=dict(message.attributes),
        publish_time=published.seconds + published.nanos / 1e9,
        delivery_attempt=delivery.delivery_attempt or None,
        ordering_key=message.ordering_key,
        received_at=received_at,
        source=source,
    )


def _text(error: grpc.aio.AioRpcError) -> str:
    return f"{error.code().name}: {error.details() or ''}"


def _reasons(error: grpc.aio.AioRpcError) -> Mapping[str, str]:
    """
    Return why the broker refused ack ids of an exactly-once subscription, by ack id.

    Source: https://cloud.google.com/pubsub/docs/exactly-once-delivery.
    """
    trailing: Any = error.trailing_metadata()
    status = status_pb2.Status.FromString((trailing and trailing.get(_DETAILS)) or b"")
    for detail in status.details:
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info):
            return dict(info.metadata)
    return {}
