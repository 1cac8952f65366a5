"""
`collect`: take the answers of a run from the response topic and write each once.

The output is its own journal (`resume`): a line that stands in it is answered.  An answer is acked when the operating
system has its line, and not before; so a kill at any moment loses nothing, and what is delivered again is dropped as a
duplicate.  The ledger is told afterwards; where a kill came between the two, it is told from the output at the next
start.

Power failures: with `fsync` the line is on the disk before its answer is acked.  Without it the last seconds of the
output may be gone while their answers are acked.

Ordered output: the answers are collected in a second file, as they come, and sorted into the output when the last one
is there.  The sort keeps `SORT_BYTES` in memory, whatever the length of the run.

Source: the trade-off of batched fsyncs, https://www.postgresql.org/docs/current/wal-async-commit.html.
"""

import asyncio
import contextlib
import heapq
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import msgspec

from worker.client.errors import ClientError, OutputError, describe_os_error
from worker.client.io.batched_writer import BatchedWriter
from worker.client.io.blocking import BlockingThread
from worker.client.io.files import CHUNK_BYTES, STANDARD, LineWriter, open_output
from worker.client.io.lines import Shape, parse_line_id
from worker.client.io.outputs import Answer, decode_answer, error_message, output_line
from worker.client.ledger import ROUND_1, Ledger, LineRow, Outcome, Totals
from worker.client.ports import Answers, LineSink
from worker.client.resume import Resumed, answered_id, output_lines, resume_output
from worker.wire.message import LINE_ID, LINE_SHAPE, RUN_ID, RUN_ROUND

ORDER = "order"
"""Note in the ledger: whether the answers are written with `ordered` or `unordered`."""
UNSORTED_SUFFIX = ".unsorted"
"""Of the file in which the answers of an ordered run are collected."""
SORT_BYTES = 64 * 1024 * 1024
"""Lines sorted in memory at once."""
TICK_S = 0.25
"""Between two looks at the ledger, in which `submit` may be writing."""
_CLOSE_GRACE_S = 5.0
MAX_EXAMPLE_CHARS = 500
"""Of the message that stands in the ledger as the example of its error class."""


@dataclass(slots=True)
class Files:
    """The outputs of a collection, open and repaired; both are the same for a run without a file for errors."""

    name: str
    """Of the output, for messages."""
    good: Resumed
    bad: Resumed
    is_readable: bool
    """No file is standard output or a pipe."""
    new: tuple[str, ...]
    """Paths of those that were not there before."""
    paths: tuple[str, ...]
    """Of every file that holds answers."""
    ordered: tuple[str, ...] = ()
    """Paths that are sorted at the end, from their unsorted files."""

    def close(self) -> None:
        """
        Close them.

        Raises:
            OutputError: The last bytes could not be written.
        """
        try:
            self.good.writer.close()
        finally:
            if self.bad is not self.good:
                self.bad.writer.close()

    def remove_new(self) -> None:
        """Remove those that were not there before and have got no answer; call it when they are closed."""
        for path in self.new:
            if Path(path).is_file() and not Path(path).stat().st_size:
                Path(path).unlink()

    def has(self, line_id: str) -> bool:
        """Whether one of them has an answer to a line."""
        return line_id in self.good.answered or line_id in self.bad.answered

    def absent(self, ledger: Ledger) -> Iterator[int]:
        """Yield the numbers of the lines that the ledger has as answered, and whose answers are in none of them."""
        for number, digest in ledger.answered_lines():
            if not self.has(f"line-{number}-{digest:08x}"):
                yield number

    def refuse_lacking(self, ledger: Ledger) -> None:
        """
        Refuse outputs that lack answers of the run: others were written, or these have lost some.

        Raises:
            OutputError: They do.  Never of standard output and of pipes, which cannot be read.
        """
        held = len(self.good.answered) + (0 if self.bad is self.good else len(self.bad.answered))
        count = ledger.totals().answered
        if not self.is_readable or held >= count:
            return
        raise OutputError(
            f"{self.name}: lacks {count - held:,} of the {count:,} answers that were written; name the same OUTPUT "
            "and --errors as before, or have these lines published again by `inference-worker retry-failed --lost`"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectProgress:
    """A collection at one moment."""

    totals: Totals
    written: int
    """Answers written by this command."""
    duplicates: int
    """Answers dropped because their line has one."""
    foreign: int
    """Messages that belong to no line of the run."""
    duration_s: float


def open_outputs(output: str, errors: str | None, *, is_ordered: bool) -> Files:
    """
    Open the outputs and find what stands in them.

    Args:
        output: Path of the answers.
        errors: Path of the answers that are errors; `None` puts them into `output`.
        is_ordered: Collect in unsorted files beside them.

    Raises:
        OutputError: One cannot be opened or continued, both are the same, or order is asked for of what is no file.
    """
    paths = (output,) if errors is None else (output, errors)
    if len(paths) != len({os.path.realpath(path) for path in paths}):
        raise OutputError(f"{output}: cannot be the file of the errors too")
    if is_ordered and any(path == STANDARD or (Path(path).exists() and not Path(path).is_file()) for path in paths):
        raise OutputError("an ordered output must be a file")
    suffix = UNSORTED_SUFFIX if is_ordered else ""
    new = tuple(path + suffix for path in paths if path != STANDARD and not Path(path + suffix).exists())
    opened: list[Resumed] = []
    held: list[str] = []
    try:
        for path in paths:
            resumed = resume_output(path + suffix)
            opened.append(resumed)
            held.append(path + suffix)
            if is_ordered and Path(path).exists():
                resume_output(path).writer.close()
                held.append(path)
                for line_id, _ in output_lines(path):
                    resumed.answered.add(line_id)
    except BaseException:
        for resumed in opened:
            resumed.writer.close()
        raise
    readable = tuple(path for path in held if path != STANDARD and Path(path).is_file())
    return Files(output, opened[0], opened[-1], len(readable) == len(held), new, readable, paths if is_ordered else ())


def keep_order(ledger: Ledger, output: str, errors: str | None, *, is_ordered: bool) -> None:
    """
    Note in the ledger whether the answers are written in the order of the input.

    Raises:
        OutputError: They were begun in the other way; permanent.
    """
    order, begun = ("ordered" if is_ordered else "unordered"), ledger.get(ORDER)
    paths = [Path(path) for path in (output, errors) if path is not None]
    has_unsorted = any(Path(f"{path}{UNSORTED_SUFFIX}").exists() for path in paths)
    if has_unsorted:
        begun = "ordered"
    is_begun = has_unsorted or ledger.totals().answered or any(path.is_file() and path.stat().st_size for path in paths)
    if begun not in {None, order} and is_begun:
        how = "with --ordered; continue it so" if begun == "ordered" else "without --ordered; continue it without"
        raise OutputError(f"{output}: was begun {how}")
    if ledger.get(ORDER) != order:
        ledger.note({ORDER: order})


class Collection:
    """
    Collects the answers of one run; use it once.

    Args:
        ledger: Of the run.
        files: The outputs.
        answers: Delivers the messages of the response topic.
        fsync: Bring each line to the disk before its answer is acked.
        on_progress: Called on the event loop every `TICK_S` seconds and at the end.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        ledger: Ledger,
        files: Files,
        answers: Answers,
        *,
        fsync: bool = False,
        on_progress: Callable[[CollectProgress], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ledger = ledger
        self._files = files
        self._answers = answers
        self._on_progress = on_progress
        self._clock = clock
        self._thread = BlockingThread("ledger")
        good = _sink(files.good.writer, fsync=fsync)
        self._good = BatchedWriter(good)
        self._bad = self._good if files.bad is files.good else BatchedWriter(_sink(files.bad.writer, fsync=fsync))
        self._outcomes: list[Outcome] = []
        self._totals = ledger.totals()
        self._started = self._last_at = clock()
        self._rows = _Rows(ledger, self._thread)
        self._written = 0
        self._duplicates = 0
        self._foreign = 0

    def progress(self) -> CollectProgress:
        """Return the counts so far."""
        return CollectProgress(
            totals=self._totals,
            written=self._written,
            duplicates=self._duplicates,
            foreign=self._foreign,
            duration_s=self._clock() - self._started,
        )

    async def run(self, *, timeout_s: float | None = None, idle_timeout_s: float | None = None) -> bool:
        """
        Collect until every line of the run has an answer; return whether all have.

        Args:
            timeout_s: Give up after this time.
            idle_timeout_s: Give up when so long no answer has come.

        Raises:
            OutputError: An answer could not be written; what was written stays.
            LedgerError: The ledger cannot be read or written.
            ClientError: `answers` returned.

        Cancellation: stops the delivery, writes what has arrived, tells the ledger.
        """
        receiving = asyncio.ensure_future(self._receive())
        writers = {asyncio.ensure_future(writer.watch()) for writer in {self._good, self._bad}}
        try:
            while not self._totals.is_complete:
                await asyncio.wait({receiving, *writers}, timeout=TICK_S, return_when=asyncio.FIRST_COMPLETED)
                for task in (receiving, *writers):
                    if task.done():
                        task.result()
                await self._record()
                self._on_progress(self.progress())
                now = self._clock()
                if timeout_s is not None and now - self._started >= timeout_s:
                    break
                if idle_timeout_s is not None and now - self._last_at >= idle_timeout_s:
                    break
        finally:
            for task in (receiving, *writers):
                task.cancel()
            await asyncio.gather(receiving, *writers, return_exceptions=True)
            for writer in {self._good, self._bad}:
                await writer.aclose(_CLOSE_GRACE_S)
            await self._record()
            self._on_progress(self.progress())
            self._thread.close()
        return self._totals.is_complete

    async def _receive(self) -> None:
        await self._answers(self._take)
        raise ClientError("the answers ended")

    async def _take(self, data: bytes, attributes: Mapping[str, str], message_id: str) -> None:  # noqa: ARG002
        """Handle one message of the response topic; see `ports.AnswerHandler`."""
        line_id = attributes.get(LINE_ID, "")
        key = parse_line_id(line_id)
        if attributes.get(RUN_ID) != self._ledger.run.run_id or key is None:
            self._foreign += 1
            return
        number, digest = key
        at_round = _round(attributes)
        row = await self._rows.get(number)
        if row is None or int(row.digest, 16) != digest:
            self._foreign += 1
            return
        if row.round != at_round or self._files.has(line_id):
            self._duplicates += 1
            return
        answer = decode_answer(data, attributes)
        resumed, writer = (self._files.bad, self._bad) if answer.is_error else (self._files.good, self._good)
        resumed.answered.add(line_id)
        shape = Shape.BATCH if attributes.get(LINE_SHAPE) == Shape.BATCH else Shape.MESSAGE
        line = output_line(line_id, shape, _custom_id(answer), answer)
        outcome = outcome_of(number, at_round, answer)

        def written() -> None:
            self._written += 1
            self._last_at = self._clock()
            self._outcomes.append(outcome)

        await writer.write(line, written)

    async def _record(self) -> None:
        outcomes, self._outcomes = self._outcomes, []
        if outcomes:
            await self._thread.call(self._ledger.record_answers, outcomes)
        self._totals = await self._thread.call(self._ledger.totals)


class _Rows:
    """
    Rows of the ledger, asked for by many at once and read together.

    Args:
        ledger: Of the run.
        thread: Reads it.
    """

    def __init__(self, ledger: Ledger, thread: BlockingThread) -> None:
        self._ledger = ledger
        self._thread = thread
        self._wanted: set[int] = set()
        self._next: asyncio.Future[dict[int, LineRow]] | None = None
        self._is_reading = asyncio.Lock()

    async def get(self, number: int) -> LineRow | None:
        """
        Return the row of a line; `None` where the run has no such line.

        Raises:
            LedgerError: The ledger cannot be read.

        Cancellation: the others get their rows all the same.
        """
        self._wanted.add(number)
        if self._next is None:
            self._next = asyncio.ensure_future(self._read())
        return (await asyncio.shield(self._next)).get(number)

    async def _read(self) -> dict[int, LineRow]:
        async with self._is_reading:
            wanted, self._wanted, self._next = self._wanted, set(), None
            return await self._thread.call(self._ledger.rows, wanted)


def reconcile(ledger: Ledger, files: Files) -> int:
    """
    Tell the ledger of the lines that stand in the outputs and of which it does not know; return how many; blocks.

    Raises:
        OutputError: An output holds answers of another run or of lines that have changed.
    """
    in_outputs = len(files.good.answered) + (0 if files.bad is files.good else len(files.bad.answered))
    if in_outputs == ledger.totals().answered:
        return 0
    told = 0
    for path in files.paths:
        batch: list[tuple[int, int, bytes]] = []
        for line_id, line in output_lines(path):
            key = parse_line_id(line_id)
            assert key is not None  # `resume_output` has read it
            batch.append((*key, line))
            if len(batch) >= 1000:  # noqa: PLR2004 - rows of one query
                told += _reconcile(ledger, path, batch)
                batch.clear()
        told += _reconcile(ledger, path, batch)
    return told


def _reconcile(ledger: Ledger, path: str, batch: list[tuple[int, int, bytes]]) -> int:
    if not batch:
        return 0
    numbers = [number for number, _, _ in batch]
    rows = ledger.lines(min(numbers), max(numbers))
    outcomes = []
    for number, digest, line in batch:
        row = rows.get(number)
        if row is None or int(row.digest, 16) != digest:
            raise OutputError(f"{path}: has an answer to line {number} of another input")
        if not row.is_answered:
            outcomes.append(written_outcome(number, row.round, line))
    ledger.record_answers(outcomes)
    return len(outcomes)


def outcome_of(number: int, at_round: int, answer: Answer) -> Outcome:
    """Return what the ledger keeps of an answer."""
    return Outcome(
        number=number,
        round=at_round,
        status=answer.status_code,
        error_class=answer.error_class or "unclassified" if answer.is_error else None,
        message=error_message(answer)[:MAX_EXAMPLE_CHARS] if answer.is_error else "",
        input_tokens=answer.input_tokens or 0,
        output_tokens=answer.output_tokens or 0,
    )


class _Written(msgspec.Struct):
    """What an output line has of an outcome."""

    status_code: int | None = None
    response: "_Response | None" = None
    error: "_Error | None" = None
    body: msgspec.Raw = msgspec.Raw(b"null")
    stats: "_Stats | None" = None


class _Response(msgspec.Struct):
    status_code: int
    body: msgspec.Raw = msgspec.Raw(b"null")


class _Error(msgspec.Struct, frozen=True):
    code: str = "unclassified"
    message: str = ""


class _Stats(msgspec.Struct):
    error_class: str | None = None


_decode_written = msgspec.json.Decoder(_Written).decode


def written_outcome(number: int, at_round: int, line: bytes) -> Outcome:
    """Return the outcome that an output line tells; its class is the nearest that can be told from the line."""
    written = _decode_written(line)
    if written.status_code is not None:
        status, body = written.status_code, bytes(written.body)
    elif written.response is not None:
        status, body = written.response.status_code, bytes(written.response.body)
    else:
        status, body = 502, b"null"
    answer = Answer(status_code=status, body=body)
    error_class = written.stats.error_class if written.stats is not None else None
    if answer.is_error or written.error is not None:
        error = written.error or _error_of(body)
        return Outcome(
            number=number,
            round=at_round,
            status=status,
            error_class=error_class or error.code,
            message=error.message[:MAX_EXAMPLE_CHARS],
        )
    return outcome_of(number, at_round, decode_answer(b'{"status_code":%d,"body":%s}' % (status, body), {}))


class _Body(msgspec.Struct):
    error: _Error = _Error()


def _error_of(body: bytes) -> _Error:
    try:
        return msgspec.json.decode(body, type=_Body).error
    except msgspec.DecodeError:
        return _Error()


def _round(attributes: Mapping[str, str]) -> int:
    text = attributes.get(RUN_ROUND, "")
    return int(text) if text.isascii() and text.isdigit() else ROUND_1


class _CustomId(msgspec.Struct):
    custom_id: msgspec.Raw = msgspec.Raw(b"null")


def _custom_id(answer: Answer) -> bytes:
    """Return the custom_id that the metadata brought back, as raw JSON."""
    try:
        return bytes(msgspec.json.decode(answer.metadata, type=_CustomId).custom_id)
    except msgspec.DecodeError:
        return b"null"


class _SyncedSink:
    """A sink whose lines are on the disk when `write` returns."""

    def __init__(self, writer: LineWriter) -> None:
        self._writer = writer

    def write(self, data: bytes) -> None:
        """
        Append lines and bring them to the disk.

        Raises:
            OutputError: They may not be there.
        """
        self._writer.write(data)
        try:
            os.fsync(self._writer.descriptor)
        except OSError as error:
            raise OutputError(f"the output cannot be brought to the disk: {describe_os_error(error)}") from None


def _sink(writer: LineWriter, *, fsync: bool) -> LineSink:
    return _SyncedSink(writer) if fsync else writer


async def sort_outputs(files: Files) -> None:
    """
    Sort what was collected into the ordered outputs and remove the unsorted files.

    A kill on the way leaves the unsorted files, and the next call begins anew.

    Raises:
        OutputError: An output cannot be written; the unsorted file stays.

    Cancellation: ends the wait at once.  The sort itself, in a thread, goes on as long as the process lives.
    """
    thread = BlockingThread("sort")
    try:
        for path in files.ordered:
            await thread.call(_sort, path)
    finally:
        thread.close()


def _sort(path: str) -> None:
    unsorted, target = Path(path + UNSORTED_SUFFIX), Path(path)
    sources = [str(unsorted), *([path] if target.exists() else [])]
    folder = target.resolve().parent / f".{target.name}.sorting"
    try:
        shutil.rmtree(folder, ignore_errors=True)  # of a sort that was killed
        folder.mkdir()
        try:
            runs = [each for source in sources for each in _sorted_runs(source, folder)]
            half = folder / target.name  # the name decides about the compression
            writer = open_output(str(half))
            try:
                batch: list[bytes] = []
                size = last = 0
                for number, line in heapq.merge(*runs, key=lambda item: item[0]):
                    if number == last:  # a kill has left the unsorted file beside the sorted one
                        continue
                    last = number
                    batch.append(line)
                    size += len(line)
                    if size >= CHUNK_BYTES:
                        writer.write(b"".join(batch))
                        batch.clear()
                        size = 0
                writer.write(b"".join(batch))
            finally:
                writer.close()
            with half.open("rb") as file:
                os.fsync(file.fileno())
            half.replace(target)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        unsorted.unlink()
    except OSError as error:
        raise OutputError(f"{path}: {describe_os_error(error)}") from None


def _sorted_runs(source: str, folder: Path) -> list[Iterator[tuple[int, bytes]]]:
    """Return the lines of a file as sorted runs, each in a file of its own."""
    runs: list[Iterator[tuple[int, bytes]]] = []
    batch: list[tuple[int, bytes]] = []
    size = 0

    def spill() -> None:
        nonlocal size
        if batch:
            batch.sort(key=lambda item: item[0])
            file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - read by the merge, gone with the process
            file.writelines(line for _, line in batch)
            file.seek(0)
            runs.append(_read_run(file))
            batch.clear()
            size = 0

    for line_id, line in output_lines(source):
        key = parse_line_id(line_id)
        assert key is not None  # `resume_output` has read it
        batch.append((key[0], line + b"\n"))
        size += len(line)
        if size >= SORT_BYTES:
            spill()
    spill()
    return runs


def _read_run(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    with contextlib.closing(file):
        for line in file:
            line_id = answered_id(line)
            key = parse_line_id(line_id or "")
            assert key is not None
            yield key[0], line
