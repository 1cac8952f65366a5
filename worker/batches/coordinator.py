"""
The coordinator: takes every batch from one status to the next.

One process coordinates, the one that holds the lease; the others stand by.  Nothing is remembered that is not in the
store, but to save work: a process that takes over reads the unfinished batches and goes on.  And because every step
compares the stored status first, a process that lost the lease without noticing (it was stopped, and woke up) changes
nothing twice; at worst it publishes some lines a second time.

Once a round, a few times a second, the unfinished batches are read:

* `validating`: the file is looked at (`validate`), some files at a time.
* `in_progress`: lines are published, shared as in `sharing`.  When every record has a result, it is finalized; when its
  time is over, the results of what is published are waited for, `drain_s` at most, then it expires.
* `finalizing`: its files are written (`assemble`), and the final status with them.
* `cancelling`: the workers are told, where they listen to a control topic, so that what waits there is not run; then as
  at the end of its time, and then it is cancelled.

Work of a batch runs beside the others', and is begun again after a failure, with backoff: the store, the storage of
files or the broker are away, and no batch fails for it.
"""

import asyncio
import random
import time
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any

import msgspec

from worker.batches.assemble import assemble
from worker.batches.events import EventTeller
from worker.batches.lines import request_of
from worker.batches.metrics import BatchMetrics
from worker.batches.objects import Objects, is_missing
from worker.batches.records import Record, read_records
from worker.batches.sharing import Demand, share
from worker.batches.states import UNFINISHED, Status
from worker.batches.store import LEADER, Batch, Fault, Outcome, Result, Store, StoreUnavailableError
from worker.batches.validate import INVALID, Rules, validate
from worker.errors import BrokerError, MessageTooLargeError, PayloadError, WorkerError
from worker.flow.clock import wait_for
from worker.payloads.files import FileStore
from worker.policy.backoff import Backoff
from worker.ports import Publisher
from worker.settings.schema import BatchesSettings
from worker.telemetry.logs import get_logger
from worker.wire.control import encode_cancel
from worker.wire.message import RUN_ID

ROUND_S = 0.2
"""Between two rounds while there is an unfinished batch."""
IDLE_S = 0.5
"""Between two rounds while there is none."""
CHUNK_LINES = 500
"""Published between two notes of how far it has come: so many may be sent twice when the process is killed."""
CHUNK_BYTES = 16 << 20
VALIDATIONS = 2
ENDINGS = 2
"""At once; each takes a thread for most of its time."""
READERS = 16
"""Inputs that are kept open where the next lines are read."""
JOB_BACKOFF = Backoff(base_s=0.5, max_s=30.0, jitter=0.5)
MODELS_PATIENCE_S = 30.0
"""How long a validation waits for the list of models.  After that every model is accepted: a backend that is scaled to
zero starts only when there are messages for it."""
NOTE_S = 10.0
"""Between two notes of the progress of a batch."""
SILENCE_S = 60.0
"""After so long without a result a batch with published lines is said to wait for the workers, and lines that may not
be published are waited for no longer when their batch ends."""
HOUSEKEEPING_S = 60.0
DRAFT_AGE_S = 86_400.0

HasModel = Callable[[str], bool]
ModelsOf = Callable[[], Awaitable[HasModel | None]]
"""Returns whether a model is served, `None` when any may be; raises a `WorkerError` while that is not known."""

_Step = Callable[[Batch], Coroutine[Any, Any, None]]

_log = get_logger("batches.coordinator")


class _Lines:
    """The next records of one input, which stays open between two chunks."""

    def __init__(self, parts: AsyncGenerator[list[Record], None], at: int) -> None:
        self._parts = parts
        self._ready: deque[Record] = deque()
        self.at = at
        """Records that were taken."""

    async def take(self, count: int) -> list[Record]:
        taken, size = list[Record](), 0
        while len(taken) < count and size < CHUNK_BYTES:
            if not self._ready:
                more = await anext(self._parts, None)
                if more is None:
                    break
                self._ready.extend(more)
            taken.append(self._ready.popleft())
            size += len(taken[-1].data or b"")
        self.at += len(taken)
        return taken

    async def aclose(self) -> None:
        await self._parts.aclose()


class _Job:
    """Work of one batch, and when it is begun again after a failure."""

    def __init__(self) -> None:
        self.task: asyncio.Task[None] | None = None
        self.failures = 0
        self.not_before = 0.0

    @property
    def is_running(self) -> bool:
        return self.task is not None and not self.task.done()


class Coordinator:
    """
    See the module.

    Args:
        store: The batches.
        objects: Contents of files.
        publisher: The request topic.
        settings: Limits and times.
        owner: Name of this process, different from every other's.
        events: Tells when a batch has ended.
        models: Which models are served.
        control: The control topic of the workers, if they have one.
        metrics: Tell of all batches; of its own when `None`.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        store: Store,
        objects: Objects,
        publisher: Publisher,
        settings: BatchesSettings,
        *,
        owner: str,
        events: EventTeller,
        models: ModelsOf,
        control: Publisher | None = None,
        metrics: BatchMetrics | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._metrics = metrics or BatchMetrics()
        self._store = store
        self._objects = objects
        self._publisher = publisher
        self._settings = settings
        self._owner = owner
        self._events = events
        self._models = models
        self._control = control
        self._withdrawn: set[str] = set()
        """Batches being cancelled of which this process has told the workers."""
        self._clock = clock
        self._leads_until = 0.0
        self._is_stopping = asyncio.Event()
        self._jobs: dict[str, _Job] = {}
        self._dispatch: asyncio.Task[None] | None = None
        self._side_jobs: dict[str, asyncio.Task[None]] = {}
        self._validations = asyncio.Semaphore(VALIDATIONS)
        self._endings = asyncio.Semaphore(ENDINGS)
        self._lines: OrderedDict[str, _Lines] = OrderedDict()
        self._confirmed: dict[str, set[int]] = {}
        """Of a chunk that is not published as a whole: the records that the broker has.  Kept while this
        process does not lead: the broker has them all the same."""
        self._topic_failures = 0
        self._topic_not_before = 0.0
        self._noted_at: dict[str, float] = {}
        self._housekept_at = 0.0
        self._is_store_away = False

    @property
    def leads(self) -> bool:
        """Whether this process holds the lease, as far as it knows."""
        return self._clock() < self._leads_until

    async def run(self) -> None:
        """
        Coordinate, or stand by, until `drain`.

        Raises:
            Exception: A fault of ours, or a database without these tables; the process ends and is started again.

        Cancellation: work that is under way is given up, and done again by the process that takes over.
        """
        keeping = asyncio.create_task(self._keep_lease())
        try:
            while not self._is_stopping.is_set():
                await wait_for(self._is_stopping, await self._round())
                if keeping.done():
                    keeping.result()  # it ends only by a fault, with which this process cannot coordinate
        finally:
            keeping.cancel()
            tasks = [job.task for job in self._jobs.values() if job.task is not None]
            tasks += [*self._side_jobs.values(), *([self._dispatch] if self._dispatch else []), keeping]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._close_lines()
            self._leads_until = 0.0
            self._metrics.stop_coordinating()
            with suppress(StoreUnavailableError):  # then it ends by itself
                await asyncio.to_thread(self._store.release_lease, LEADER, self._owner)

    async def drain(self, grace_s: float) -> None:  # noqa: ARG002 - the same verbs everywhere
        """Stop; whatever is under way another process does again.  Cancellation: it stops all the same."""
        self._is_stopping.set()

    async def _keep_lease(self) -> None:
        ttl_s = self._settings.lease_s
        while True:
            asked_at = self._clock()
            try:
                is_ours = await asyncio.to_thread(self._store.hold_lease, LEADER, self._owner, ttl_s)
            except StoreUnavailableError as error:
                self._store_is_away(error)
            else:
                self._store_is_back()
                if is_ours and not self.leads:
                    _log.info("batch_coordinator_elected", owner=self._owner)
                self._leads_until = asked_at + ttl_s if is_ours else 0.0
            await wait_for(self._is_stopping, ttl_s / 3)

    def _store_is_away(self, error: StoreUnavailableError) -> None:
        if not self._is_store_away:
            _log.warning("batch_store_away", role="coordinator", error=str(error))
        self._is_store_away = True

    def _store_is_back(self) -> None:
        """Note that the store was written to: one that can only be read, its disk full, is away as well."""
        if self._is_store_away:
            _log.info("batch_store_back", role="coordinator")
        self._is_store_away = False

    async def _round(self) -> float:
        """Look at every unfinished batch; return the seconds until the next look."""
        if not self.leads:
            self._metrics.stop_coordinating()
            await self._close_lines()
            return min(ROUND_S, self._settings.lease_s / 3)
        began = time.monotonic()
        try:
            batches = await asyncio.to_thread(self._store.unfinished_batches)
            now = await asyncio.to_thread(self._store.now)
        except StoreUnavailableError as error:
            self._store_is_away(error)
            return ROUND_S
        await self._forget_others({batch.id for batch in batches})
        self._show(batches, now)
        for batch in batches:
            if (step := self._step_of(batch, now)) is not None:
                self._start(batch, step)
        if self._dispatch is None or self._dispatch.done():
            self._dispatch = asyncio.create_task(self._publish_some(batches, now))
        self._beside("notes", self._note(batches, now))
        self._beside("events", self._tell_events())
        if self._clock() - self._housekept_at >= HOUSEKEEPING_S:
            self._housekept_at = self._clock()
            self._beside("housekeeping", self.keep_house())
        # A round over thousands of batches takes its time; it shall not take all of the process's.
        return max(ROUND_S if batches else IDLE_S, 5 * (time.monotonic() - began))

    def _show(self, batches: list[Batch], now: float) -> None:
        """Set the metrics of all batches."""
        metrics = self._metrics
        metrics.coordinating.set(1)
        found = Counter(batch.status for batch in batches)
        metrics.set_unfinished({status: found[status] for status in UNFINISHED})
        waiting = [batch for batch in batches if batch.outstanding and not batch.is_closed]
        metrics.lines_outstanding.set(sum(batch.outstanding for batch in waiting))
        running = [batch for batch in batches if batch.status is Status.IN_PROGRESS]
        metrics.lines_unpublished.set(sum(batch.total - batch.published_records for batch in running))
        since = max((_last_result(batch) for batch in waiting), default=now)
        metrics.silence_seconds.set(max(0.0, now - since))

    async def _forget_others(self, unfinished: set[str]) -> None:
        for batch_id in [each for each in self._jobs if each not in unfinished]:
            if not self._jobs[batch_id].is_running:
                del self._jobs[batch_id]
        for batch_id in [each for each in self._lines if each not in unfinished]:
            await self._lines.pop(batch_id).aclose()
        for batch_id in [each for each in self._confirmed if each not in unfinished]:
            del self._confirmed[batch_id]
        for batch_id in [each for each in self._noted_at if each not in unfinished]:
            del self._noted_at[batch_id]

    # Jobs.

    def _step_of(self, batch: Batch, now: float) -> _Step | None:  # noqa: PLR0911 - a table
        """Return what is to be done about a batch now, beside publishing its lines."""
        is_over = now >= batch.expires_at
        match batch.status:
            case Status.VALIDATING:
                return self._expire_unstarted if is_over else self._validate
            case Status.IN_PROGRESS if batch.settled == batch.total and not batch.is_closed:
                return self._complete
            case Status.IN_PROGRESS if is_over:
                return self._expire if _is_drained(batch, batch.expires_at, self._settings.drain_s, now) else None
            case Status.FINALIZING:
                return self._finalize
            case Status.CANCELLING if batch.in_progress_at is None:
                return self._cancel_unstarted
            case Status.CANCELLING:
                since = batch.cancelling_at or 0
                if _is_drained(batch, since, self._settings.drain_s, now):
                    return self._cancel
                return self._withdraw if self._control is not None and batch.id not in self._withdrawn else None
        return None

    def _start(self, batch: Batch, step: _Step) -> None:
        job = self._jobs.setdefault(batch.id, _Job())
        if not job.is_running and self._clock() >= job.not_before:
            job.task = asyncio.create_task(self._run_job(job, batch, step))

    async def _run_job(self, job: _Job, batch: Batch, step: _Step) -> None:
        try:
            await step(batch)
        except Exception as error:  # noqa: BLE001 - of whatever kind: the batch must not be given up
            job.failures += 1
            self._metrics.step_failures_total.labels(step.__name__.strip("_")).inc()
            wait_s = JOB_BACKOFF.delay_s(job.failures, random.random())  # noqa: S311 - no secret
            job.not_before = self._clock() + wait_s
            told = {
                "batch_id": batch.id,
                "status": batch.status,
                "step": step.__name__.strip("_"),
                "failures": job.failures,
                "error": f"{type(error).__name__}: {error}",
            }
            if isinstance(error, WorkerError):
                _log.warning("batch_step_failed", **told)
            else:
                _log.error("batch_step_failed", **told, exc_info=error)
        else:
            job.failures, job.not_before = 0, 0.0

    def _beside(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        """Run something that is no batch's, unless it still runs."""
        if name in self._side_jobs and not self._side_jobs[name].done():
            work.close()
            return

        async def run() -> None:
            try:
                await work
            except StoreUnavailableError as error:
                self._store_is_away(error)
            except Exception:  # noqa: BLE001 - none of it may end the coordinator
                _log.exception("batch_side_job_failed", job=name)

        self._side_jobs[name] = asyncio.create_task(run())

    # Validation.

    async def _validate(self, batch: Batch) -> None:
        async with self._validations:
            if batch.input_key is None:
                text = f"We cannot find file '{batch.input_file_id[:100]}', or it is no file for batches."
                faults = [Fault(code=INVALID, message=text, param="input_file_id")]
                await asyncio.to_thread(self._store.fail_batch, batch.id, faults)
                return
            settings = self._settings
            rules = Rules(
                endpoint=batch.endpoint,
                max_lines=settings.max_lines,
                max_embedding_inputs=settings.max_embedding_inputs,
                has_model=await self._has_model(batch) if settings.check_models else None,
            )
            began = time.monotonic()
            checked = await validate(self._objects, batch.input_key, rules)
            if checked.faults:
                is_done = await asyncio.to_thread(self._store.fail_batch, batch.id, checked.faults)
            else:
                is_done = await asyncio.to_thread(
                    self._store.start_batch, batch.id, total=checked.total, model=checked.model
                )
        _log.info(
            "batch_validated",
            batch_id=batch.id,
            records=checked.total,
            faults=len(checked.faults),
            duration_s=round(time.monotonic() - began, 3),
            is_done=is_done,
        )

    async def _has_model(self, batch: Batch) -> HasModel | None:
        try:
            return await self._models()
        except WorkerError:
            if await asyncio.to_thread(self._store.now) - batch.created_at < MODELS_PATIENCE_S:
                raise
            return None

    async def _expire_unstarted(self, batch: Batch) -> None:
        await self._finish(batch, Status.EXPIRED, Result())

    async def _withdraw(self, batch: Batch) -> None:
        """
        Tell the workers to begin no request of a batch any more; they answer each as `cancelled`, and finish what runs.

        Raises:
            BrokerError: The control topic does not take it; retryable, or permanent until an operator acts.
        """
        assert self._control is not None
        await self._control.publish(encode_cancel([], {RUN_ID: batch.id}, let_running_finish=True), {})
        self._withdrawn.add(batch.id)

    async def _cancel_unstarted(self, batch: Batch) -> None:
        await self._finish(batch, Status.CANCELLED, Result())

    # Ends.

    async def _complete(self, batch: Batch) -> None:
        if await asyncio.to_thread(self._store.has_expired_outcomes, batch.id):
            # A worker's clock is ahead: for it the batch is over.
            if await asyncio.to_thread(self._store.now) >= batch.expires_at:
                await self._expire(batch)
            return
        if await asyncio.to_thread(self._store.begin_finalizing, batch.id):
            await self._finalize(msgspec.structs.replace(batch, status=Status.FINALIZING))

    async def _finalize(self, batch: Batch) -> None:
        async with self._endings:
            result = await assemble(self._store, self._objects, batch, Status.COMPLETED)
            await self._finish(batch, Status.COMPLETED, result)

    async def _expire(self, batch: Batch) -> None:
        await self._close_and_finish(batch, Status.EXPIRED)

    async def _cancel(self, batch: Batch) -> None:
        await self._close_and_finish(batch, Status.CANCELLED)
        self._withdrawn.discard(batch.id)

    async def _close_and_finish(self, batch: Batch, to: Status) -> None:
        async with self._endings:
            if not await asyncio.to_thread(self._store.close_batch, batch.id, batch.status):
                return
            result = await assemble(self._store, self._objects, batch, to)
            await self._finish(batch, to, result)

    async def _finish(self, batch: Batch, to: Status, result: Result) -> None:
        is_done = await asyncio.to_thread(
            self._store.finish_batch,
            batch.id,
            expected=batch.status,
            to=to,
            result=result,
            retention_s=self._settings.file_retention_s,
        )
        if is_done:
            self._metrics.ended_total.labels(to).inc()
            _log.info("batch_ended", batch_id=batch.id, status=to, completed=result.completed, failed=result.failed)

    # Publishing.

    async def _publish_some(self, batches: list[Batch], now: float) -> None:
        """Publish the next lines of the batches that are in progress."""
        if self._clock() < self._topic_not_before:
            return
        limit = self._settings.outstanding_lines
        running = {
            batch.id: batch
            for batch in batches
            if batch.status is Status.IN_PROGRESS
            and not batch.is_closed
            and now < batch.expires_at
            and batch.published_records < batch.total
        }
        # What was announced and not published is counted as outstanding, and is what is published first.
        room = limit - sum(batch.outstanding for batch in batches)
        for batch in running.values():
            room += max(0, batch.announced_records - batch.published_records)
        demands = [
            Demand(
                batch_id=batch.id,
                tenant=batch.tenant,
                outstanding=max(0, batch.published_records - batch.settled),
                remaining=batch.total - batch.published_records,
            )
            for batch in running.values()
        ]
        shares = share(demands, room, extra=limit)
        results = await asyncio.gather(
            *(self._publish_batch(running[batch_id], lines) for batch_id, lines in shares.items()),
            return_exceptions=True,
        )
        failures = [result for result in results if isinstance(result, BaseException)]
        for batch_id, result in zip(shares, results, strict=True):
            if isinstance(result, BaseException):
                self._lines_failed(batch_id, result)
        if any(isinstance(failure, BrokerError) for failure in failures):
            self._topic_failures += 1
            wait_s = JOB_BACKOFF.delay_s(self._topic_failures, random.random())  # noqa: S311 - no secret
            self._topic_not_before = self._clock() + wait_s
        elif shares:
            self._topic_failures = 0

    def _lines_failed(self, batch_id: str, error: BaseException) -> None:
        if isinstance(error, StoreUnavailableError):
            self._store_is_away(error)
            return
        text = f"{type(error).__name__}: {error}"
        if isinstance(error, WorkerError):
            _log.warning("batch_lines_not_published", batch_id=batch_id, error=text)
        else:
            _log.error("batch_lines_not_published", batch_id=batch_id, error=text, exc_info=error)

    async def _publish_batch(self, batch: Batch, count: int) -> None:
        """Publish the next lines of a batch, in chunks."""
        published, offset, lines = batch.published_records, batch.published_bytes, batch.published_lines
        announced = batch.announced_records
        while count > 0 and published < batch.total and self.leads:
            # A chunk that was announced is published to its end first: a part of it may be on its way.
            wanted = announced - published if announced > published else min(count, CHUNK_LINES)
            records = await self._take(batch, published, offset, lines, wanted)
            if not records:
                raise PayloadError("payload_not_found", f"the input ends after {published} records")
            upto = records[-1].number
            known = await self._known(batch, announced, published, upto)
            if not await asyncio.to_thread(
                self._store.announce, batch.id, published=published, upto=max(upto, announced)
            ):
                return  # cancelled, over, or published by another process
            await self._publish_records(batch, [record for record in records if record.number not in known])
            if not await asyncio.to_thread(
                self._store.advance,
                batch.id,
                published=published,
                upto=upto,
                offset=records[-1].end,
                lines=records[-1].line,
            ):
                return
            self._confirmed.pop(batch.id, None)
            count -= len(records)
            published, offset, lines = upto, records[-1].end, records[-1].line

    async def _known(self, batch: Batch, announced: int, published: int, upto: int) -> set[int]:
        """Return the records of a chunk that need not be published: they have a result, or the broker has them."""
        if announced <= published:
            return set()
        settled = await asyncio.to_thread(self._store.settled_records, batch.id, after=published, upto=upto)
        return settled | self._confirmed.get(batch.id, set())

    async def _take(self, batch: Batch, published: int, offset: int, lines: int, count: int) -> list[Record]:
        assert batch.input_key is not None
        reader = self._lines.pop(batch.id, None)
        if reader is not None and reader.at != published:
            await reader.aclose()
            reader = None
        if reader is None:
            parts = read_records(self._objects, batch.input_key, offset=offset, record=published, line=lines)
            reader = _Lines(parts, published)
        try:
            records = await reader.take(count)
        except BaseException:
            await reader.aclose()
            raise
        self._lines[batch.id] = reader
        while len(self._lines) > READERS:
            await self._lines.popitem(last=False)[1].aclose()
        return records

    async def _close_lines(self) -> None:
        while self._lines:
            await self._lines.popitem()[1].aclose()

    async def _publish_records(self, batch: Batch, records: list[Record]) -> None:
        """
        Publish a chunk; what the broker has confirmed is remembered until all of it is.

        Raises:
            BrokerError: A line was not confirmed; retryable, or permanent until an operator acts.
        """
        confirmed = self._confirmed.setdefault(batch.id, set())

        async def publish(record: Record) -> None:
            assert record.data is not None
            message = request_of(batch, record.number, record.line, record.data)
            try:
                await self._publisher.publish(message.data, message.attributes)
            except MessageTooLargeError as error:
                outcome = Outcome(
                    batch_id=batch.id,
                    record=record.number,
                    line=record.line,
                    is_ok=False,
                    code="request_too_large",
                    message=str(error),
                )
                await asyncio.to_thread(self._store.record, [outcome])
            else:
                self._metrics.lines_published_total.inc()
            confirmed.add(record.number)

        results = await asyncio.gather(*map(publish, records), return_exceptions=True)
        failures = [result for result in results if isinstance(result, BaseException)]
        self._metrics.publish_failures_total.inc(len(failures))
        if failures:
            raise failures[0]

    # What is no batch's.

    async def _note(self, batches: list[Batch], now: float) -> None:
        """Note what running batches wait for, and their progress."""
        for batch in batches:
            if self._clock() - self._noted_at.get(batch.id, 0.0) < NOTE_S:
                continue
            self._noted_at[batch.id] = self._clock()
            await asyncio.to_thread(self._store.note, batch.id, waiting_for=self._waits_for(batch, now))

    def _waits_for(self, batch: Batch, now: float) -> str | None:
        job = self._jobs.get(batch.id)
        if job is not None and job.failures:
            return "storage" if batch.status is not Status.VALIDATING else "validation"
        if batch.status is Status.VALIDATING:
            return "validation"
        if batch.status is Status.IN_PROGRESS and self._topic_failures and batch.published_records < batch.total:
            return "request_topic"
        if batch.status not in {Status.IN_PROGRESS, Status.CANCELLING}:
            return None
        if batch.outstanding and now - _last_result(batch) > SILENCE_S:
            return "workers"
        return None if batch.outstanding else "queue"

    async def _tell_events(self) -> None:
        await self._events.tell()

    async def keep_house(self) -> None:
        """
        Remove what is no longer needed: contents of deleted and expired files, results of batches that have ended.

        Raises:
            StoreUnavailableError: Retryable.

        Cancellation: some of it may be removed.
        """
        while self.leads and (files := await asyncio.to_thread(self._store.removable_files)):
            for file in files:
                try:
                    await self._objects.delete(file.object_key)
                except PayloadError as error:
                    if not is_missing(error):
                        _log.warning("batch_file_not_removed", file_id=file.id, error=str(error))
                        return
                await asyncio.to_thread(self._store.file_removed, file.id)
        is_left = True
        while is_left and self.leads:
            is_left = await asyncio.to_thread(self._store.forget_outcomes)
        if isinstance(self._objects, FileStore):
            await asyncio.to_thread(self._objects.remove_drafts, DRAFT_AGE_S)


def _is_drained(batch: Batch, since: float, drain_s: float, now: float) -> bool:
    """
    Whether no more results of a batch are waited for.

    Of lines that a coordinator was publishing when it died it is not known whether the topic has them.  If only such
    ones have no result, their silence is the answer.

    Args:
        batch: Cancelled, or its time is over.
        since: When that was; Unix seconds.
        drain_s: How long results are waited for.
        now: Unix seconds.
    """
    if batch.is_closed or batch.outstanding == 0 or now >= since + drain_s:
        return True
    is_unsure = batch.outstanding <= batch.announced_records - batch.published_records
    return is_unsure and now >= max(since, _last_result(batch)) + SILENCE_S


def _last_result(batch: Batch) -> float:
    """Return when a batch got a result last, or began; Unix seconds."""
    return max(batch.settled_at or 0.0, float(batch.in_progress_at or 0))
