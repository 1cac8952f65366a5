"""
Collects answers: each is stored as the result of its line, and acknowledged after that.

Answers that wait are stored together, in one transaction: the more come, the more share one.  While the store is away
they are kept, with their leases, and stored when it is back: that costs no delivery attempt.  Any number of processes
may collect; the first stored result of a line counts.

A second collector may read the dead-letter topic: a line whose request Pub/Sub has given up gets an error as its
result.  It waits a while first, since a worker may have answered the last delivery and lost its ack.

The body of an answer that is too large for a message stands in object storage.  It is fetched, a few at a time, and
kept in memory until it is stored; while the storage is away its message is kept as well.

An answer that the database refuses is nacked alone: a transaction that fails is done again in halves.
"""

import asyncio
import random
import time
from collections import deque
from collections.abc import Callable, Mapping

import msgspec

from worker.batches.lines import REPLY_IN_STORAGE, outcome_of, stored_at
from worker.batches.metrics import BatchMetrics
from worker.batches.store import Outcome, Recorded, Store, StoreUnavailableError
from worker.errors import PayloadError
from worker.flow.clock import wait_for
from worker.policy.backoff import Backoff
from worker.policy.model import Fault
from worker.ports import Payloads, Settlement, Subscriber
from worker.telemetry.logs import get_logger
from worker.wire.message import ReceivedMessage

MAX_ROWS = 500
MAX_BYTES = 16 << 20
"""Of one transaction."""
GATHER_S = 0.005
"""How long the first answer waits for others."""
STORE_BACKOFF = Backoff(base_s=0.2, max_s=5.0, jitter=0.5)
"""While the store is away; 5 s, so that it is soon noticed when it is back."""

_log = get_logger("batches.collector")

FETCHES = 2
"""Bodies from object storage in memory at once; each may have `payloads.max_bytes`."""
Read = Callable[[bytes, Mapping[str, str]], Outcome | None]
"""Returns the result that a message carries, by its data and attributes; `None`: it carries none."""
DEAD_LETTER_WAIT_S = 30.0
"""From the dead-lettering of a request to its result: an answer that was published before has been stored by then."""


class CollectorCounts(msgspec.Struct, kw_only=True):
    """Messages since the start, by what became of them."""

    stored: int = 0
    repeated: int = 0
    """Their line had a result already."""
    late: int = 0
    """Their batch had ended."""
    unknown: int = 0
    """There is no such batch or line."""
    foreign: int = 0
    """They are no answers to lines of batches."""
    nacked: int = 0
    """The store was away when this process stopped."""


class Collector:
    """
    Stores the answers of a subscription.

    Args:
        store: Gets the results.
        subscriber: Of the response topic.
        metrics: Count what is done; of its own when `None`.
        read: What the messages mean.
        wait_s: A message is stored so long after it was published.
        clock: Unix seconds.
        payloads: Has the bodies that no message carries; `None`: their lines fail, and tell where they are.
    """

    def __init__(
        self,
        store: Store,
        subscriber: Subscriber,
        metrics: BatchMetrics | None = None,
        *,
        read: Read = outcome_of,
        wait_s: float = 0.0,
        clock: Callable[[], float] = time.time,
        payloads: Payloads | None = None,
    ) -> None:
        self._payloads = payloads
        self._fetches = asyncio.Semaphore(FETCHES)
        self._read = read
        self._wait_s = wait_s
        self._clock = clock
        self._is_draining = asyncio.Event()
        self.counts = CollectorCounts()
        self._metrics = metrics or BatchMetrics()
        self._store = store
        self._subscriber = subscriber
        self._waiting: deque[tuple[Outcome, asyncio.Future[Settlement]]] = deque()
        self._has_waiting = asyncio.Event()
        self._is_stopping = asyncio.Event()

    async def run(self) -> None:
        """
        Collect until `drain`.

        Raises:
            BrokerResourceError: The subscription is gone or refused; permanent.

        Cancellation: answers that are not stored are nacked.
        """
        writing = asyncio.create_task(self._write())
        try:
            await self._subscriber.run(self.handle)
        finally:
            self._is_stopping.set()
            self._has_waiting.set()
            await writing

    async def drain(self, grace_s: float) -> None:
        """Take no more answers, store those that are here within so many seconds.  Cancellation: the drain goes on."""
        self._is_draining.set()
        await self._subscriber.drain(grace_s)

    async def handle(self, message: ReceivedMessage) -> Settlement:
        """
        Store one answer; return how its message is settled.

        Cancellation: the answer may be stored.
        """
        outcome = self._read(message.data, message.attributes)
        if outcome is None:
            self._count("foreign", 1)
            _log.debug("batch_answer_foreign", message_id=message.message_id)
            return Settlement.ACK
        if self._wait_s:
            await wait_for(self._is_draining, message.publish_time + self._wait_s - self._clock())
            if self._is_draining.is_set():
                return Settlement.NACK
        if outcome.code != REPLY_IN_STORAGE or self._payloads is None:
            return await self._store_one(outcome)
        async with self._fetches:
            fetched = await self._fetch(message, outcome, self._payloads)
            if fetched is None:
                self._count("nacked", 1)
                return Settlement.NACK
            return await self._store_one(fetched)

    async def _store_one(self, outcome: Outcome) -> Settlement:
        stored: asyncio.Future[Settlement] = asyncio.get_running_loop().create_future()
        self._waiting.append((outcome, stored))
        self._has_waiting.set()
        return await stored

    async def _fetch(self, message: ReceivedMessage, outcome: Outcome, payloads: Payloads) -> Outcome | None:
        """Return the result with its body from object storage; `None`: that was away until the process stopped."""
        uri, failures = stored_at(message.data, message.attributes) or "", 0
        while True:
            try:
                async with payloads.open(uri) as payload:
                    body = b"".join([chunk async for chunk in payload.chunks])
            except ValueError as error:  # the workers write elsewhere than this process may read
                _log.warning("batch_reply_not_fetched", uri=uri, error=str(error))
                return outcome
            except PayloadError as error:
                if error.fault != Fault.PAYLOAD_UNAVAILABLE:
                    _log.warning("batch_reply_not_fetched", uri=uri, error=str(error))
                    return msgspec.structs.replace(outcome, message=f"{outcome.message} It cannot be read: {error}")
                failures += 1
                if failures == 1:
                    _log.warning("batch_reply_storage_away", uri=uri, error=str(error))
                if self._is_draining.is_set():
                    return None
                await wait_for(self._is_draining, STORE_BACKOFF.delay_s(failures, random.random()))  # noqa: S311 - no secret
            else:
                return outcome_of(message.data, message.attributes, body)

    async def _write(self) -> None:
        """Store what waits, again and again, until the end."""
        while True:
            await self._has_waiting.wait()
            if not self._waiting and self._is_stopping.is_set():
                return
            if len(self._waiting) < MAX_ROWS:
                await wait_for(self._is_stopping, GATHER_S)
            some, size = list[tuple[Outcome, asyncio.Future[Settlement]]](), 0
            while self._waiting and len(some) < MAX_ROWS and size < MAX_BYTES:
                some.append(self._waiting.popleft())
                size += len(some[-1][0].body or b"")
            if not self._waiting and not self._is_stopping.is_set():
                self._has_waiting.clear()
            settlements = await self._record([outcome for outcome, _ in some])
            for (_, stored), settlement in zip(some, settlements, strict=True):
                if not stored.done():  # a handler that was cancelled
                    stored.set_result(settlement)

    async def _record(self, outcomes: list[Outcome]) -> list[Settlement]:
        """Store results; return for each how its message is settled."""
        failures, began = 0, time.monotonic()
        while True:
            try:
                recorded = await asyncio.to_thread(self._store.record, outcomes)
            except StoreUnavailableError as error:
                failures += 1
                if failures == 1:
                    _log.warning("batch_store_away", role="collector", error=str(error))
                if self._is_stopping.is_set():
                    self._count("nacked", len(outcomes))
                    return [Settlement.NACK] * len(outcomes)
                await wait_for(self._is_stopping, STORE_BACKOFF.delay_s(failures, random.random()))  # noqa: S311 - no secret
            except Exception:  # noqa: BLE001 - the answer comes again, and the others go on
                if len(outcomes) > 1:
                    middle = len(outcomes) // 2
                    return [*await self._record(outcomes[:middle]), *await self._record(outcomes[middle:])]
                _log.exception("batch_result_not_stored", batch_id=outcomes[0].batch_id, record=outcomes[0].record)
                self._count("nacked", 1)
                return [Settlement.NACK]
            else:
                if failures:
                    _log.info("batch_store_back", role="collector")
                self._metrics.store_duration_seconds.observe(time.monotonic() - began)
                self._count_recorded(recorded)
                return [Settlement.ACK] * len(outcomes)

    def _count(self, outcome: str, answers: int) -> None:
        if answers:
            setattr(self.counts, outcome, getattr(self.counts, outcome) + answers)
            self._metrics.answers_total.labels(outcome).inc(answers)

    def _count_recorded(self, recorded: Recorded) -> None:
        for name in ("stored", "repeated", "late", "unknown"):
            self._count(name, getattr(recorded, name))
        if recorded.unknown:
            _log.warning("batch_answers_unknown", answers=recorded.unknown)
        if recorded.late:
            _log.info("batch_answers_late", answers=recorded.late)
