"""
Publishing answers: an answer that exists is never thrown away while the lease can be kept.

A failed publish is repeated as a publish, with backoff, until the broker accepts the answer or the lease ends; the
inference is never repeated for it.  While answers cannot be published, the intake is paused, so that no GPU time is
spent on answers that would have to wait.  An answer that is too large for the broker is replaced by a small error
that says so; without `stats`, and then without metadata, where the broker does not accept these either.  Where answers
may go to object storage, its body is written there first, and the answer names it; a failed write is repeated like a
failed publish, but pauses no intake: smaller answers can be published.

An answer that the broker calls invalid waits like one whose topic is gone: a schema of the topic refuses every answer.
If others are published meanwhile it is its own fault (`policy.blame`), and a small error takes its place.
"""

import asyncio
import random
import time
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase

import msgspec
from msgspec import structs

from worker.delivery import Delivery, Reply
from worker.errors import (
    MessageRejectedError,
    MessageTooLargeError,
    PayloadError,
    PublishError,
    PublishRefusedError,
)
from worker.pipeline.routes import IntakePause
from worker.policy.backoff import Backoff
from worker.policy.blame import is_refusal_own
from worker.policy.model import ErrorClass
from worker.policy.reply import reply_refused_body, reply_too_large_body
from worker.policy.table import ROWS
from worker.ports import Payloads, Publisher
from worker.telemetry.logs import StateLog, get_logger
from worker.telemetry.record import Recorder
from worker.wire.message import (
    BODY_SHA256,
    MAX_PUBSUB_MESSAGE_BYTES,
    RUN_ATTRIBUTES,
    clip_attributes,
    encode_response,
    message_bytes,
)
from worker.wire.sagemaker import CONTENT_TYPE_ATTRIBUTE, REPLY_ATTRIBUTES

PUBLISH_BACKOFF = Backoff(base_s=0.1, max_s=10.0, jitter=0.5)
"""Between publishes of one answer: short at first, as most failures are; 10 s so that a recovery is noticed."""
PAUSE_AFTER_REFUSED = 2
"""So many answers must be refused as invalid for the intake to be paused: one may be its own fault."""
TRIAL_EVERY_S = 60.0
"""While answers are refused as invalid the intake opens so often, until the next refusal: only others' answers can tell
whether it is the topic or these answers."""
PAUSE_AFTER_ATTEMPTS = 3
"""Retryable failures of one answer after which the intake is paused: about a second of failures."""
UNPUBLISHABLE = "publish"
"""Why the intake is paused."""
_OWN_ATTRIBUTES = frozenset(
    {
        "request_message_id",
        "status_code",
        "error_class",
        "truncated",
        BODY_SHA256,
        "delivery_attempt",
        "backend",
        "backend_request_id",
        CONTENT_TYPE_ATTRIBUTE,
        *REPLY_ATTRIBUTES.values(),
    }
)
"""Never copied from a request: a consumer must be able to rely on them."""
_REPLACEMENTS = frozenset({ErrorClass.REPLY_TOO_LARGE, ErrorClass.REPLY_REFUSED})

_log = get_logger("replies")
_state_log = StateLog("replies")


class Replier:
    """
    Puts answers on the response topic.

    Args:
        publisher: The topic.
        recorder: Is told about each publish; its trace context is sent with the answer.
        intake: Paused while answers cannot be published.
        copy_attributes: Patterns of request attributes that an answer carries too.
        lease_s: How long a delivery may be kept, counted from its receipt.
        payloads: Takes the bodies of answers that no message can carry; `None` for nowhere.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        publisher: Publisher,
        recorder: Recorder,
        intake: IntakePause,
        *,
        copy_attributes: tuple[str, ...] = (),
        lease_s: float,
        payloads: Payloads | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._payloads = payloads
        self._publisher = publisher
        self._recorder = recorder
        self._intake = intake
        self._copy = copy_attributes
        self._lease_s = lease_s
        self._clock = clock
        self._stuck: set[Delivery] = set()
        self._rejected: dict[Delivery, int] = {}  # refused as invalid, with how many were published before
        self._published = 0
        self._trial_at = 0.0
        self._random = random.Random()  # noqa: S311 - jitter

    async def publish(self, delivery: Delivery, reply: Reply) -> Reply | None:
        """
        Publish the answer; return what the broker has: the answer, or the small error in its place.

        `None` means that the lease ends first, or that the broker refuses even the smallest error: nack the message.

        Cancellation: the answer may or may not be published; the processor shields this call.
        """
        self._recorder.publish_starts(delivery)
        data, attributes = self._encode(delivery, reply)
        started, attempts, published_s = self._clock(), 0, None
        try:
            while True:
                attempts += 1
                published_before = self._published
                try:
                    await self._publisher.publish(data, attributes)
                except PublishError as error:
                    if self._payloads is not None and _is_storable(reply, error):
                        stored = await self._store(delivery, reply, self._payloads)
                        if stored is None:
                            return None
                        reply = stored
                        data, attributes = self._encode(delivery, reply)
                    elif self._is_replaced(delivery, error, published_before):
                        smaller = self._smaller(delivery, reply, error, message_bytes(data, attributes))
                        if smaller is None:
                            _log.error("error_reply_refused", error=str(error))
                            return None
                        reply = smaller
                        data, attributes = self._encode(delivery, reply)
                    elif not await self._wait(delivery, error, attempts):
                        return None
                else:
                    self._published += 1
                    published_s = self._clock() - started
                    if self._stuck:
                        self._recovered()
                    return reply
        finally:
            self._forget(delivery)
            self._recorder.publish_ends(delivery, reply, attempts=attempts, published_s=published_s)

    def _is_replaced(self, delivery: Delivery, error: PublishError, published_before: int) -> bool:
        """Count the failure; return whether it is the answer's own, so that no repeat can be published."""
        if isinstance(error, MessageTooLargeError):
            self._recorder.publish_failed("too_large")
            return True
        is_rejected = isinstance(error, MessageRejectedError)
        self._recorder.publish_failed(
            "refused" if is_rejected or isinstance(error, PublishRefusedError) else "retryable"
        )
        if not is_rejected:
            return False
        first_seen = self._rejected.setdefault(delivery, self._published)
        return is_refusal_own(published_before - first_seen, len(self._rejected) - 1)

    def _is_pausing(self, error: PublishError, attempts: int) -> bool:
        """Whether the failure says that other answers could not be published either."""
        if isinstance(error, MessageRejectedError):
            return len(self._rejected) >= PAUSE_AFTER_REFUSED and not self._is_trial()
        return isinstance(error, PublishRefusedError) or attempts >= PAUSE_AFTER_ATTEMPTS

    async def _wait(self, delivery: Delivery, error: PublishError, attempts: int) -> bool:
        """Wait for the next publish, with the intake paused; return false when the lease ends before it."""
        if self._is_pausing(error, attempts):
            if not self._stuck:
                _log.error("publish_failed", error=str(error))
                self._trial_at = self._clock() + TRIAL_EVERY_S
            self._stuck.add(delivery)
            self._intake.set(UNPUBLISHABLE, holds=True)
        return await self._back_off(delivery, attempts)

    async def _store(self, delivery: Delivery, reply: Reply, payloads: Payloads) -> Reply | None:
        """Return the answer that names its body, once that is written; `None` when the lease ends before it."""
        attempts = 0
        while True:
            attempts += 1
            self._recorder.payload_starts(delivery, "write")
            fault = "cancelled"
            try:
                stored = await payloads.write(delivery.message.key, reply.body)
                fault = ""
            except PayloadError as error:
                fault = error.fault
                _log.error("reply_not_stored", message_id=delivery.message.message_id, error=str(error))
            finally:
                self._recorder.payload_ends(delivery, "write", size=len(reply.body), fault=fault)
            if not fault:
                return structs.replace(reply, body_uri=stored.uri, body_sha256=stored.sha256)
            if not await self._back_off(delivery, attempts):
                return None

    async def _back_off(self, delivery: Delivery, attempts: int) -> bool:
        delay = PUBLISH_BACKOFF.delay_s(attempts, self._random.random())
        if self._clock() - delivery.received_at + delay >= self._lease_s:
            _log.error("publish_abandoned", message_id=delivery.message.message_id)
            return False
        await asyncio.sleep(delay)
        return True

    def _is_trial(self) -> bool:
        """Open the intake where it is time for that; return whether it was."""
        if not self._stuck or self._clock() < self._trial_at:
            return False
        self._trial_at = self._clock() + TRIAL_EVERY_S
        self._intake.set(UNPUBLISHABLE, holds=False)
        return True

    def _recovered(self) -> None:
        self._stuck.clear()
        self._intake.set(UNPUBLISHABLE, holds=False)
        _state_log.info("publish_recovered")

    def _forget(self, delivery: Delivery) -> None:
        """Stop counting a delivery as stuck; after the last one only a new message can find out more: resume."""
        self._rejected.pop(delivery, None)
        if delivery in self._stuck:
            self._stuck.discard(delivery)
            if not self._stuck:
                self._intake.set(UNPUBLISHABLE, holds=False)

    def _encode(self, delivery: Delivery, reply: Reply) -> tuple[bytes, dict[str, str]]:
        data = encode_response(
            reply.status_code, reply.metadata, reply.body, stats=reply.stats, body_uri=reply.body_uri
        )
        return data, self.attributes(delivery, reply)

    @staticmethod
    def _smaller(delivery: Delivery, reply: Reply, error: PublishError, size: int) -> Reply | None:
        """Return what takes the place of a refused answer: the small error; if refused, that with fewer fields."""
        if reply.error_class in _REPLACEMENTS:
            if reply.stats is not None:  # the requester chooses the model's name, which stands in them
                return structs.replace(reply, stats=None)
            return None if reply.metadata == b"{}" else structs.replace(reply, metadata=b"{}")
        if isinstance(error, MessageTooLargeError):
            _log.error("reply_too_large", message_id=delivery.message.message_id, bytes=size)
            error_class, reason = ErrorClass.REPLY_TOO_LARGE, f"the answer has {size} bytes"
            body = reply_too_large_body(size, MAX_PUBSUB_MESSAGE_BYTES, attempts=delivery.attempts)
        else:
            _log.error("reply_refused", message_id=delivery.message.message_id, error=str(error))
            error_class, reason = ErrorClass.REPLY_REFUSED, str(error)
            body = reply_refused_body(attempts=delivery.attempts)
        return Reply(
            status_code=ROWS[error_class].fixed_status,
            body=body,
            metadata=reply.metadata,
            error_class=error_class,
            reason=reason,
            stats=_with_error_class(reply.stats, error_class),
        )

    def attributes(self, delivery: Delivery, reply: Reply) -> dict[str, str]:
        """Return the attributes of an answer, within the broker's limits."""
        message = delivery.message
        attributes = {"request_message_id": message.message_id, "status_code": str(reply.status_code)}
        if reply.error_class is not None:
            attributes["error_class"] = reply.error_class
        if reply.truncated:
            attributes["truncated"] = "true"
        if reply.body_sha256 is not None:
            attributes[BODY_SHA256] = reply.body_sha256
        if message.delivery_attempt is not None:
            attributes["delivery_attempt"] = str(message.delivery_attempt)
        if delivery.backend is not None:
            attributes["backend"] = delivery.backend
        if delivery.result is not None and delivery.result.backend_request_id is not None:
            attributes["backend_request_id"] = delivery.result.backend_request_id
        if delivery.result is not None and delivery.result.attributes:
            attributes |= delivery.result.attributes
        if message.attributes:  # after the worker's own: what is too many is left out at the end
            attributes |= self._copied(message.attributes)
        self._recorder.add_trace_context(delivery, attributes)
        return clip_attributes(attributes)

    def _copied(self, attributes: Mapping[str, str]) -> dict[str, str]:
        copied = {key: attributes[key] for key in RUN_ATTRIBUTES if key in attributes}
        if self._copy:
            copied |= {
                key: value
                for key, value in attributes.items()
                if key not in _OWN_ATTRIBUTES and any(fnmatchcase(key, pattern) for pattern in self._copy)
            }
        return copied


def _is_storable(reply: Reply, error: PublishError) -> bool:
    """Say whether the answer could be published if its body stood elsewhere."""
    return isinstance(error, MessageTooLargeError) and reply.body_uri is None and reply.error_class not in _REPLACEMENTS


def _with_error_class(stats: bytes | None, error_class: ErrorClass) -> bytes | None:
    """Return an answer's `stats` for the error in its place: the times and tokens were spent all the same."""
    return None if stats is None else msgspec.json.encode({**msgspec.json.decode(stats), "error_class": error_class})
