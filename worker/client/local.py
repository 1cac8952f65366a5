"""
A run: read lines, publish messages, receive answers, write lines.

A run takes up a line only when the window of unanswered lines has room for it, publishes it once, and forgets it when
the operating system has the line of its answer: memory does not depend on the length of the input.  A run publishes a
line again only if the broker did not confirm it, and drops an answer whose line is not waiting.

Four tasks run at once, under one task group: read and publish, receive, watch the output, and report progress.  The
first failure ends them all.  A damaged input is different: the lines before the damage are answered first.  However a
run ends, it first writes the answers that have arrived.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Container, Mapping
from dataclasses import dataclass, replace

from worker.client.errors import ClientError, InputError, first_failure
from worker.client.first_answers import FirstAnswers
from worker.client.io.batched_writer import BatchedWriter
from worker.client.io.blocking import BlockingThread
from worker.client.io.lines import Prepared, RawLine, Shape, parse_line_id, prepare, refuse, rejected
from worker.client.io.outputs import Answer, decode_answer, local_answer, output_line
from worker.client.ports import Answers, LineSink, LineSource, Publish
from worker.client.publishing import PATIENCE_S, LineWindow, Repetition
from worker.client.summary import ErrorExample, InputCount, Progress, Summary, Tally
from worker.errors import MessageRejectedError
from worker.wire.http import address_of
from worker.wire.message import LINE_ID

OnProgress = Callable[[Progress], None]
OnError = Callable[[str, ErrorExample], None]
"""Called with an error class and its first answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunTuning:
    """Bounds and times of a run; the defaults suit `local`."""

    window_bytes: int = 256 * 1024 * 1024
    """Bytes of unanswered lines."""
    progress_interval_s: float = 0.25
    """Between two reports of progress."""
    publish_patience_s: float = PATIENCE_S
    close_grace_s: float = 5.0
    """How long an interrupted run waits for a blocked output before it gives up the remaining lines."""


@dataclass(slots=True)
class _Waiting:
    """What a run keeps of a line until its answer arrives; the broker has the data."""

    shape: Shape
    custom_id: bytes
    path: str
    size: int
    number: int


class BatchRun:
    """
    One run over one input; use it once.

    Args:
        reader: Input lines.
        writer: Answer lines.
        publish: Publishes a message to the request topic.
        answers: Delivers the messages of the response topic.
        window: Lines that may be unanswered at once, from 1.
        answered: Ids of lines that already have an answer.
        known: What is known of the input; `None` for a pipe.
        urls: Base URLs by the name of a route, for what is told about errors.
        model: Asked for in the place of the model that a line names; `None` changes nothing.
        first_answers: Stops the run when the command is wrong; `None`: nothing does.
        on_progress: Called on the event loop every `progress_interval_s` seconds and at the end; must be quick.
        on_error: Called with the first answer of each error class; must be quick.
        tuning: Bounds and times.
        clock: Monotonic seconds.
        sleep: Waits between publishes.
    """

    def __init__(
        self,
        reader: LineSource,
        writer: LineSink,
        publish: Publish,
        answers: Answers,
        *,
        window: int,
        answered: Container[str] = frozenset(),
        known: InputCount | None = None,
        urls: Mapping[str, str] | None = None,
        model: str | None = None,
        first_answers: FirstAnswers | None = None,
        on_progress: OnProgress | None = None,
        on_error: OnError | None = None,
        tuning: RunTuning | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._reader = reader
        self._publish = publish
        self._answers = answers
        self._answered = answered
        self._urls = urls or {}
        self._model = model
        self._first_answers = first_answers
        self._on_progress = on_progress
        self._on_error = on_error
        self._tuning = tuning or RunTuning()
        self._clock = clock
        self._repetition = Repetition(patience_s=self._tuning.publish_patience_s, clock=clock, sleep=sleep)
        self._window = LineWindow(window, self._tuning.window_bytes)
        self._writer = BatchedWriter(writer)
        self._tally = Tally(known)
        self._waiting: dict[str, _Waiting] = {}
        self._feeding: asyncio.Task[None] | None = None
        self._publishing: set[asyncio.Task[None]] = set()
        self._is_ending = asyncio.Event()
        self._is_full = False
        """The next line waits for room."""
        self._started: float | None = None
        self._last_number = 0
        self._input_failure: InputError | None = None

    async def run(self) -> Summary:
        """
        Answer every line, or until `stop`, and return the summary.

        Raises:
            InputError: The input is damaged; every line before the damage is answered.
            OutputError: An answer could not be written; the answers written before stay.
            SameErrorsError: The first answers say that the command is wrong; none of them was written.
            PublishError: The broker refused a message, or did not confirm it within `publish_patience_s`.
            ClientError: `answers` returned while lines were unanswered.

        Cancellation: stops reading and publishing, lets `answers` settle, writes the answers that have arrived and
        raises CancelledError; `summary` then describes the unfinished run.
        """
        self._started = self._clock()
        try:
            async with asyncio.TaskGroup() as group:
                others = [group.create_task(part) for part in (self._receive(), self._writer.watch(), self._tick())]
                if self._first_answers is not None:
                    others.append(group.create_task(self._first_answers.watch()))
                self._feeding = group.create_task(self._feed(group))
                await self._end(group.create_task(self._answer_all()))
                for task in (*others, *self._publishing):
                    task.cancel()
        except BaseExceptionGroup as failures:
            raise first_failure(failures) from None
        finally:
            await self._writer.aclose(self._tuning.close_grace_s)
            self._report()
        if self._input_failure is not None:
            raise self._input_failure
        return self.summary()

    def stop_reading(self) -> None:
        """Publish no further line; the answers of the others are still written; idempotent."""
        for task in (self._feeding, *self._publishing):
            if task is not None:
                task.cancel()

    def stop(self) -> None:
        """Let `run` return with what is answered; no further answer is waited for; idempotent."""
        self.stop_reading()
        self._is_ending.set()

    def summary(self) -> Summary:
        """Return the summary of the run so far; also after a failure or a cancellation."""
        return self._tally.summary(duration_s=self._duration(), publish_retries=self._repetition.count)

    def progress(self) -> Progress:
        """Return the progress of the run so far."""
        return self._tally.progress(duration_s=self._duration(), publish_retries=self._repetition.count)

    def _duration(self) -> float:
        return 0.0 if self._started is None else self._clock() - self._started

    async def _end(self, all_answered: asyncio.Task[None]) -> None:
        """Wait until every line is answered, or for `stop`; then what the first answers held back is decided."""
        stopped = asyncio.ensure_future(self._is_ending.wait())
        try:
            await asyncio.wait({all_answered, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if self._first_answers is not None:
                self._first_answers.decide()
                await self._first_answers.wait_until_free()  # they are with the writer now, or the run fails
        finally:
            stopped.cancel()
            all_answered.cancel()

    async def _answer_all(self) -> None:
        assert self._feeding is not None
        await asyncio.wait({self._feeding})
        self._decide_when_stuck()
        await self._window.wait_until_empty()

    async def _feed(self, group: asyncio.TaskGroup) -> None:
        thread = BlockingThread("input")
        try:
            while lines := await thread.call(self._reader.read_lines):
                for line in lines:
                    await self._start(line, group)
        except InputError as error:
            self._input_failure = error
        else:
            self._tally.is_input_read = True
        finally:
            thread.close()

    async def _start(self, line: RawLine, group: asyncio.TaskGroup) -> None:
        """Publish one line in a task of its own, once there is room."""
        self._last_number = line.number
        if line.line_id in self._answered:
            self._tally.lines += 1
            self._tally.skipped += 1
            return
        prepared = prepare(line, self._model)
        size = len(line.data)
        if not self._window.has_room(size):
            self._is_full = True
            self._decide_when_stuck()
        await self._window.enter(size)
        self._is_full = False
        self._tally.lines += 1
        self._waiting[prepared.line_id] = _Waiting(prepared.shape, prepared.custom_id, prepared.path, size, line.number)
        task = group.create_task(self._publish_or_refuse(prepared))
        self._publishing.add(task)
        task.add_done_callback(self._publishing.discard)

    async def _publish_or_refuse(self, prepared: Prepared) -> None:
        if prepared.refusal is None:
            try:
                await self._publish_until_confirmed(prepared)
            except MessageRejectedError as error:  # raised for any message; here it is a request
                prepared = refuse(prepared, rejected(prepared.data, str(error)))
        if prepared.refusal is not None:
            await self._finish(prepared.line_id, local_answer(prepared.refusal))

    async def _publish_until_confirmed(self, prepared: Prepared) -> None:
        await self._repetition.until_done(
            lambda: self._publish(prepared.data, prepared.attributes),
            is_over=lambda: prepared.line_id not in self._waiting,  # an unconfirmed publish may have arrived
        )

    async def _receive(self) -> None:
        await self._answers(self._take)
        raise ClientError(f"the answers ended while {self._window.count} lines were unanswered")

    async def _take(self, data: bytes, attributes: Mapping[str, str], message_id: str) -> None:  # noqa: ARG002
        """Handle one message of the response topic; see `ports.AnswerHandler`."""
        line_id = attributes.get(LINE_ID, "")
        if line_id in self._waiting:
            await self._finish(line_id, decode_answer(data, attributes))
        elif (key := parse_line_id(line_id)) is not None and key[0] <= self._last_number:
            self._tally.duplicates += 1
        else:
            self._tally.unmatched_answers += 1

    async def _finish(self, line_id: str, answer: Answer) -> None:
        """Write the line of an answer; only the first answer of a line finds it in `_waiting`."""
        waiting = self._waiting.pop(line_id, None)
        if waiting is None:
            return
        base_url = self._urls.get(answer.backend or "") if answer.is_error else None
        if base_url is not None:
            answer = replace(answer, url=address_of(base_url, waiting.path))
        if self._first_answers is not None:
            asyncio.get_running_loop().call_soon(self._decide_when_stuck)
            await self._first_answers.admit(answer, waiting.number)

        def written() -> None:
            example = self._tally.count(answer, waiting.number)
            self._window.leave(waiting.size)
            self._decide_when_stuck()
            if example is not None and self._on_error is not None:
                self._on_error(answer.error_class or "unclassified", example)

        await self._writer.write(output_line(line_id, waiting.shape, waiting.custom_id, answer), written)

    def _decide_when_stuck(self) -> None:
        """Decide about the first answers when no other one can come before those that are held are written."""
        first = self._first_answers
        is_last = self._is_full or (self._feeding is not None and self._feeding.done())
        if first is not None and is_last and first.held == self._window.count:
            first.decide()

    async def _tick(self) -> None:
        while True:
            self._report()
            await asyncio.sleep(self._tuning.progress_interval_s)

    def _report(self) -> None:
        if self._on_progress is not None:
            self._on_progress(self.progress())
