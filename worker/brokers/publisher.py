"""
The publisher: batches over one asynchronous RPC, one try each, bounded in time.

Not Google's high-level publisher, for three reasons measured with google-cloud-pubsub 2.44: it starts a thread per
batch, its future stays pending for ever when its commit thread dies of an authentication error, and it costs about
0.1 ms of CPU a message where a raw batch costs 0.015 ms.  Retries belong to the processor, which keeps the answer and
the lease meanwhile.

A batch is sent when it is full, or `batch_delay_s` after its first message.  A batch that the broker calls invalid is
sent again message by message, so that one bad message does not fail its neighbours.

A publish that is not confirmed in time fails for its caller, but its RPC goes on: the broker may have the message and
only be slow.  If the caller publishes the same message again, the first RPC that is confirmed confirms it.  Each
timeout doubles the time of the next RPCs, so that a slow broker gets one copy of what follows.
"""

import asyncio
import hashlib
from collections.abc import Mapping
from typing import Any

import grpc
import msgspec

from worker.brokers.messages import PublishRequest, PublishResponse, PubsubMessage
from worker.errors import (
    BrokerError,
    MessageRejectedError,
    MessageTooLargeError,
    PublishError,
    PublishRefusedError,
    PublishRetryableError,
)
from worker.settings.schema import PublishSettings
from worker.wire.message import MAX_PUBSUB_MESSAGE_BYTES, message_bytes

PUBLISH = "/google.pubsub.v1.Publisher/Publish"
MAX_RPCS = 16
"""Publish RPCs under way at once; beyond it batches grow instead.  House decision: 16 x 100 messages a round trip."""
MAX_TIMEOUT_S = 60.0
"""An RPC is given up after so many seconds, or after `timeout_s` where that is more: the doubling ends here."""
KEEP_LATE_S = 60.0
"""A confirmation that came late is remembered for so many seconds; the caller's next try comes within ten."""
FRAME_BYTES = 8
"""Tag and length that protobuf puts before one message, or before the topic, in a request; at most 6."""
_REFUSED = {
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.UNIMPLEMENTED,
}
"""Nothing can be published until an operator acts.  UNAUTHENTICATED is not here: tokens are refreshed."""
_INVALID = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.OUT_OF_RANGE}


class _Unconfirmed(msgspec.Struct):
    """A message that was not confirmed in time, by the RPCs that still carry it."""

    message_id: "asyncio.Future[str]"
    rpcs: int = 0


class _Entry(msgspec.Struct):
    message: Any
    size: int
    done: "asyncio.Future[str]"
    late: _Unconfirmed | None = None
    """Once the RPC of this entry is over its time."""

    def key(self) -> bytes:
        """Return what is the same for the same message."""
        return hashlib.sha256(self.message.SerializeToString(deterministic=True)).digest()


class PubSubPublisher:
    """
    A topic; see `worker.ports.Publisher` for the contract.

    Args:
        channel: An open asynchronous channel; closed by `aclose`.
        topic: Full name, `projects/P/topics/T`.
        settings: Sizes and times of batches.
    """

    def __init__(self, channel: grpc.aio.Channel, topic: str, settings: PublishSettings) -> None:
        self.topic = topic
        self._channel = channel
        self._settings = settings
        self._call = channel.unary_unary(
            PUBLISH,
            request_serializer=PublishRequest.SerializeToString,
            response_deserializer=PublishResponse.FromString,
        )
        self._max_bytes = MAX_PUBSUB_MESSAGE_BYTES - len(topic) - FRAME_BYTES
        self._metadata = (("x-goog-request-params", f"topic={topic}"),)
        self._batch: list[_Entry] = []
        self._batch_bytes = 0
        self._timer: asyncio.TimerHandle | None = None
        self._rpcs: dict[asyncio.Task[None], list[_Entry]] = {}
        self._late_rpcs: set[asyncio.Task[None]] = set()
        self._late: dict[bytes, _Unconfirmed] = {}
        self._timeout_s = settings.timeout_s
        self._max_timeout_s = max(MAX_TIMEOUT_S, settings.timeout_s)
        self._is_closed = False

    async def publish(self, data: bytes, attributes: Mapping[str, str]) -> str:
        """Publish one message; see `worker.ports.Publisher.publish`."""
        if self._is_closed:
            raise PublishRetryableError("the publisher is closed")
        if message_bytes(data, attributes) > self._max_bytes:  # before it is copied
            raise MessageTooLargeError(f"{len(data)} bytes and attributes; Pub/Sub takes {MAX_PUBSUB_MESSAGE_BYTES}")
        message = PubsubMessage(data=data, attributes=attributes)
        size = message.ByteSize() + FRAME_BYTES
        if size > self._max_bytes:
            raise MessageTooLargeError(f"{size} bytes with their framing; Pub/Sub takes {MAX_PUBSUB_MESSAGE_BYTES}")
        entry = _Entry(message, size, asyncio.get_running_loop().create_future())
        if self._late and (late := self._late.get(entry.key())) is not None:
            if late.message_id.done():
                return late.message_id.result()
            late.message_id.add_done_callback(lambda first: _confirm(entry.done, first.result()))
        if self._batch and self._batch_bytes + size > self._settings.batch_bytes:
            self._send(is_full=True)
        self._batch.append(entry)
        self._batch_bytes += size
        if len(self._batch) >= self._settings.batch_messages or self._batch_bytes >= self._settings.batch_bytes:
            self._send(is_full=True)
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._settings.batch_delay_s, self._send)
        return await entry.done

    def _send(self, *, is_full: bool = False) -> None:
        """Start the RPC of the batch; while all RPCs are busy one that is not full stays together and grows."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._batch or (len(self._rpcs) >= MAX_RPCS and not is_full):
            return
        batch, self._batch, self._batch_bytes = self._batch, [], 0
        task = asyncio.get_running_loop().create_task(self._run(batch))
        self._rpcs[task] = batch
        task.add_done_callback(self._rpc_ended)

    def _rpc_ended(self, task: "asyncio.Task[None]") -> None:
        self._rpcs.pop(task, None)
        self._late_rpcs.discard(task)
        if self._batch and self._timer is None:
            self._send()

    def _timed_out(self, task: "asyncio.Task[None] | None", batch: list[_Entry], timeout_s: float) -> None:
        """Fail the callers of an RPC that is over its time; it goes on, and another one may start in its place."""
        self._timeout_s = max(self._timeout_s, min(2 * timeout_s, self._max_timeout_s))
        for entry in batch:
            if entry.done.done():
                continue
            message_id = asyncio.get_running_loop().create_future()
            entry.late = self._late.setdefault(entry.key(), _Unconfirmed(message_id))
            entry.late.rpcs += 1
        _fail(batch, PublishRetryableError, f"{self.topic}: DEADLINE_EXCEEDED: not confirmed within {timeout_s:g} s")
        if task is not None and self._rpcs.pop(task, None) is not None:
            if self._is_closed:
                task.cancel()
            self._late_rpcs.add(task)
            if self._batch and self._timer is None:
                self._send()

    def _settle_late(self, entry: _Entry) -> None:
        """Forget a message that no RPC carries any more, once its caller has had time to ask for it."""
        late, entry.late = entry.late, None
        if late is None:
            return
        late.rpcs -= 1
        if late.rpcs == 0:
            key = entry.key()
            asyncio.get_running_loop().call_later(KEEP_LATE_S, self._forget_late, key, late)

    def _forget_late(self, key: bytes, late: _Unconfirmed) -> None:
        if late.rpcs == 0 and self._late.get(key) is late:
            del self._late[key]

    async def _run(self, batch: list[_Entry]) -> None:
        batch = [entry for entry in batch if not entry.done.done()]  # confirmed meanwhile, or its caller has gone
        if not batch:
            return
        try:
            ids = await self._publish(batch)
        except PublishError as error:
            if isinstance(error, MessageRejectedError) and len(batch) > 1:
                await asyncio.gather(*(self._run([entry]) for entry in batch))
            else:
                _fail(batch, type(error), str(error))
        except BaseException as error:
            # Also a cancelled RPC: grpc raises that when its channel is closed, and this task was not cancelled.
            _fail(batch, PublishRetryableError, f"{self.topic}: {error!r}")
            if not isinstance(error, Exception):
                raise
        else:
            for entry, message_id in zip(batch, ids, strict=True):
                _confirm(entry.done, message_id)
                if entry.late is not None:
                    _confirm(entry.late.message_id, message_id)
        finally:
            for entry in batch:
                self._settle_late(entry)

    async def _publish(self, batch: list[_Entry]) -> list[str]:
        request = PublishRequest(topic=self.topic, messages=[entry.message for entry in batch])
        loop, timeout_s = asyncio.get_running_loop(), self._timeout_s
        started = loop.time()
        timer = loop.call_at(started + timeout_s, self._timed_out, asyncio.current_task(), batch, timeout_s)
        try:
            response = await self._call(request, timeout=self._max_timeout_s, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            raise _translate(error, self.topic) from error
        except (grpc.aio.UsageError, ValueError) as error:  # the channel was closed before
            raise PublishRetryableError(f"{self.topic}: {error}") from error
        finally:
            timer.cancel()
        if loop.time() - started <= self._settings.timeout_s / 2:
            self._timeout_s = self._settings.timeout_s
        if len(response.message_ids) != len(batch):
            raise PublishRetryableError(f"{len(response.message_ids)} ids for {len(batch)} messages")
        return list(response.message_ids)

    async def aclose(self) -> None:
        """
        Send what waits, wait for the RPCs under way (each bounded by its timeout), close the channel; idempotent.

        RPCs that are over their time are given up.  A message whose caller was cancelled is dropped: after a drain its
        delivery was nacked.
        """
        self._is_closed = True
        self._batch = [entry for entry in self._batch if not entry.done.done()]
        for task, batch in self._rpcs.items():
            if all(entry.done.done() for entry in batch):
                task.cancel()
        while self._batch or self._rpcs:
            self._send()
            await asyncio.gather(*self._rpcs, return_exceptions=True)
        for task in self._late_rpcs:
            task.cancel()
        await asyncio.gather(*self._late_rpcs, return_exceptions=True)
        await self._channel.close(None)


def _confirm(future: "asyncio.Future[str]", message_id: str) -> None:
    if not future.done():
        future.set_result(message_id)


def _fail(batch: list[_Entry], kind: type[PublishError], text: str) -> None:
    """Fail every call that still waits; each gets an exception of its own, since a traceback belongs to one."""
    for entry in batch:
        if not entry.done.done():
            entry.done.set_exception(kind(text))


def _translate(error: grpc.aio.AioRpcError, topic: str) -> BrokerError:
    code, text = error.code(), error.details() or ""
    if code in _REFUSED:
        return PublishRefusedError(f"{topic}: {code.name}: {text}")
    if code in _INVALID:
        return MessageRejectedError(f"{topic}: {code.name}: {text}")
    return PublishRetryableError(f"{topic}: {code.name}: {text}")
