"""
The loop of a run: lines in, messages out, answers in, lines out.

A line is read only when there is room for it among the unanswered ones (`window`), published once, and forgotten when
the line of its answer is with the operating system: memory does not depend on the length of the input.  Nothing is
published again but what the broker did not confirm; an answer whose line is not waiting is a duplicate and is
dropped.

Four things run at once, under one task group: reading and publishing, receiving, watching the output, and the clock
that reports progress.  The first failure ends them all.  A damaged input is different: what was read before the
damage is answered first.  Whatever the end, the answers that arrived are written before the function returns.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Container, Mapping
from dataclasses import dataclass

from worker.client.answered import AnsweredLines, line_number
from worker.client.errors import ClientError, InputError
from worker.client.io.lane import Lane
from worker.client.io.lines import LINE_ID, Prepared, RawLine, Shape, prepare, refuse, rejected
from worker.client.io.outputs import Answer, decode_answer, local_answer, output_line
from worker.client.io.pump import OutputPump
from worker.client.ports import Answers, LineSink, LineSource, Publish
from worker.client.slots import Slots
from worker.client.tally import Progress, Summary, Tally
from worker.errors import PublishRetryableError, ReplyRejectedError
from worker.policy.backoff import Backoff

PUBLISH_BACKOFF = Backoff(base_s=0.1, max_s=10.0)
"""Between publishes of one line: short at first, as most failures are; 10 s so that a recovery is noticed."""

OnProgress = Callable[[Progress], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunTuning:
    """Bounds and times of a run; the defaults suit `local` and `submit`."""

    window_bytes: int = 256 * 1024 * 1024
    """Bytes of unanswered lines."""
    progress_interval_s: float = 0.25
    """Longest time between two reports of progress."""
    publish_patience_s: float = 600.0
    """How long the publishing of one line is tried again; after that the run ends with the broker's error."""
    publish_backoff: Backoff = PUBLISH_BACKOFF
    close_grace_s: float = 5.0
    """How long an interrupted run waits for a blocked output before it gives up the lines not written."""


@dataclass(slots=True)
class _Waiting:
    """What must be known of a line until its answer comes; its data is the broker's by then."""

    shape: Shape
    custom_id: bytes
    size: int
    published_at: float


class BatchRun:
    """
    One run over one input; use it once.

    Args:
        reader: Input lines. writer: Answer lines. publish: Puts a message on the request topic. answers: Delivers the
        response topic. window: Lines that may be unanswered at once, from 1. answered: Ids of lines that need no
        answer. on_progress: Called on the event loop, at least every `progress_interval_s` seconds and at the end;
        must be quick. tuning: Bounds and times. clock: Monotonic seconds. sleep: Waits between publishes.
    """

    def __init__(
        self,
        reader: LineSource,
        writer: LineSink,
        publish: Publish,
        answers: Answers,
        *,
        window: int,
        answered: Container[str] | None = None,
        on_progress: OnProgress | None = None,
        tuning: RunTuning | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._reader = reader
        self._publish = publish
        self._answers = answers
        self._answered = AnsweredLines() if answered is None else answered
        self._on_progress = on_progress
        self._tuning = tuning or RunTuning()
        self._clock = clock
        self._sleep = sleep
        self._rng = random.Random()  # noqa: S311 - jitter
        self._slots = Slots(window, self._tuning.window_bytes)
        self._pump = OutputPump(writer)
        self._tally = Tally()
        self._waiting: dict[str, _Waiting] = {}
        self._publishing: set[asyncio.Task[None]] = set()
        self._started: float | None = None
        self._last_number = 0
        self._input_failure: InputError | None = None
        self._is_input_read = False

    async def run(self) -> Summary:
        """
        Answer every line and return what it came to.

        Raises:
            InputError: The input is damaged; everything before the damage is answered.
            OutputError: An answer could not be written; what was written stays.
            PublishError: The broker refused, or did not confirm for longer than the patience.
            ClientError: The answers ended while lines were waiting.

        Cancellation: stops reading and publishing, lets `answers` settle, writes what has arrived and raises
        CancelledError; `summary` then tells how far it came.
        """
        self._started = self._clock()
        try:
            async with asyncio.TaskGroup() as group:
                others = [group.create_task(part) for part in (self._receive(), self._pump.watch(), self._tick())]
                await self._feed(group)
                await self._slots.empty()
                for task in (*others, *self._publishing):
                    task.cancel()
        except BaseExceptionGroup as failures:
            raise _first(failures) from None
        finally:
            await self._pump.aclose(self._tuning.close_grace_s)
            self._report()
        if self._input_failure is not None:
            raise self._input_failure
        return self.summary()

    def summary(self) -> Summary:
        """Return what the run has come to so far; also after a failure or a cancellation."""
        return self._tally.summary(duration_s=self._duration(), is_input_read=self._is_input_read)

    def progress(self) -> Progress:
        """Return how far the run is."""
        return self._tally.progress(
            duration_s=self._duration(),
            lines_read=self._reader.lines_read,
            bytes_read=self._reader.bytes_read,
            bytes_total=self._reader.bytes_total,
            is_input_read=self._is_input_read,
        )

    def _duration(self) -> float:
        return 0.0 if self._started is None else self._clock() - self._started

    async def _feed(self, group: asyncio.TaskGroup) -> None:
        lane = Lane("input")
        try:
            while lines := await lane.call(self._reader.read_lines):
                for line in lines:
                    await self._start(line, group)
        except InputError as error:
            self._input_failure = error
        else:
            self._is_input_read = True
        finally:
            lane.close()

    async def _start(self, line: RawLine, group: asyncio.TaskGroup) -> None:
        """Publish one line in a task of its own, once there is room."""
        self._last_number = line.number
        if line.line_id in self._answered:
            self._tally.lines += 1
            self._tally.skipped += 1
            return
        prepared = prepare(line)
        size = len(line.data)
        await self._slots.enter(size)
        self._tally.lines += 1
        self._waiting[prepared.line_id] = _Waiting(prepared.shape, prepared.custom_id, size, self._clock())
        task = group.create_task(self._ask(prepared))
        self._publishing.add(task)
        task.add_done_callback(self._publishing.discard)

    async def _ask(self, prepared: Prepared) -> None:
        if prepared.refusal is None:
            try:
                await self._publish_patiently(prepared)
            except ReplyRejectedError as error:  # named for the worker's side; here it is the request that does not fit
                prepared = refuse(prepared, rejected(prepared.data, str(error)))
        if prepared.refusal is not None:
            await self._finish(prepared.line_id, local_answer(prepared.refusal))

    async def _publish_patiently(self, prepared: Prepared) -> None:
        began = self._clock()
        failures = 0
        while prepared.line_id in self._waiting:  # an unconfirmed publish may have been one: its answer ends the tries
            try:
                await self._publish(prepared.data, prepared.attributes)
            except PublishRetryableError:
                if self._clock() - began >= self._tuning.publish_patience_s:
                    raise
                self._tally.publish_retries += 1
                failures += 1
                await self._sleep(self._tuning.publish_backoff.delay_s(failures, self._rng.random()))
            else:
                return

    async def _receive(self) -> None:
        await self._answers(self._take)
        raise ClientError(f"the answers ended while {self._slots.count} lines were waiting for theirs")

    async def _take(self, data: bytes, attributes: Mapping[str, str], message_id: str) -> None:  # noqa: ARG002
        """Handle one message of the response topic; see `ports.AnswerHandler`."""
        line_id = attributes.get(LINE_ID, "")
        if line_id in self._waiting:
            await self._finish(line_id, decode_answer(data, attributes))
        elif (line_number(line_id) or self._last_number + 1) <= self._last_number:
            self._tally.duplicates += 1
        else:
            self._tally.unmatched_answers += 1

    async def _finish(self, line_id: str, answer: Answer) -> None:
        """Write the line of an answer; the first answer takes the line's place away, so there is no second."""
        waiting = self._waiting.pop(line_id, None)
        if waiting is None:
            return
        latency_s = None if answer.is_local else self._clock() - waiting.published_at

        def written() -> None:
            self._tally.count(answer, latency_s)
            self._slots.leave(waiting.size)

        await self._pump.put(output_line(line_id, waiting.shape, waiting.custom_id, answer), written)

    async def _tick(self) -> None:
        while True:
            self._report()
            await asyncio.sleep(self._tuning.progress_interval_s)

    def _report(self) -> None:
        if self._on_progress is not None:
            self._on_progress(self.progress())


def _first(failures: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the first failure of a task group, or the group when it holds several kinds of surprises."""
    first = failures.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first
