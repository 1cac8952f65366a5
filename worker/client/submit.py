"""
`submit`: check every line of a file, then publish each once, and keep in the ledger what the broker has confirmed.

Nothing is published before all lines are checked.  A resumed submission reads the file again and publishes what the
ledger does not know as confirmed.  A process that is killed may have messages on the way of which the ledger does not
know yet (what the last `RECORD_EVERY_S` confirmed, and what was not confirmed at all): these are published again, under
the same line id, by which `collect` drops the second answer.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import msgspec

from worker.client.check import CheckResult, LineCheck, examine
from worker.client.errors import InputError, LedgerError, first_failure
from worker.client.io.blocking import BlockingThread
from worker.client.io.lines import Prepared, RawLine
from worker.client.ledger import ROUND_1, Ledger, LineRow
from worker.client.ports import LineSource, Publish
from worker.client.publishing import PATIENCE_S, LineWindow, Repetition
from worker.errors import MessageRejectedError, PayloadError
from worker.wire.message import BODY_SHA256, RUN_ID, RUN_ROUND, decode_request

WINDOW = 2000
"""Messages that are published and not confirmed; some round trips' worth of batches."""
WINDOW_BYTES = 64 * 1024 * 1024
RECORD_EVERY_S = 0.05
"""Between two transactions of the ledger."""

Upload = Callable[[str, bytes], Awaitable[str]]
"""
`await upload(line_id, body)`: puts a body into object storage under a name of its line's and returns its URI.

Raises PayloadError.  Cancellation: the object may be there.
"""

_decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


@dataclass(frozen=True, slots=True, kw_only=True)
class SubmitProgress:
    """A submission at one moment."""

    published: int
    """Confirmed, by this command."""
    skipped: int
    """Confirmed before, by an earlier one."""
    total: int
    """Lines that are to be published, both included."""
    retries: int
    """Publishes that failed and were repeated."""
    reason: str
    """Why the last one failed."""
    duration_s: float


def by_reference(data: bytes, uri: str) -> bytes:
    """Return the message of a line that was examined, with its body elsewhere."""
    request = decode_request(data)
    fields: dict[str, Any] = {"path": request.path, "metadata": msgspec.Raw(request.metadata), "body_uri": uri}
    given = _decode_fields(data)
    fields |= {name: given[name] for name in ("deadline", "priority", "headers") if name in given}
    return msgspec.json.encode(fields)


def check(
    reader: LineSource,
    ledger: Ledger,
    *,
    limit: int | None = None,
    is_by_reference: bool = False,
    on_progress: Callable[[int], None] = lambda _: None,
) -> CheckResult:
    """
    Check the lines and add them to the ledger; blocks.

    Args:
        reader: The input, from its beginning.
        ledger: Gets every line without a fault; what it had as unpublished is forgotten before.
        limit: Lines that are looked at; `None` for all.
        is_by_reference: Bodies that are too large for a message can go into object storage.
        on_progress: Called with the number of lines so far, after some hundred lines each.

    Raises:
        InputError: The input is damaged; permanent.
        LedgerError: A published line has changed or is gone; permanent.
    """
    looking = LineCheck(by_reference=is_by_reference)
    result = looking.result
    ledger.begin_check()
    last = 0
    try:
        while lines := reader.read_lines():
            if limit is not None:
                lines = lines[: limit - result.lines]
            good = looking.see(lines)
            last = lines[-1].number
            digests = {line.number: line.digest for line in lines}
            ledger.add_lines([(each.number, digests[each.number], each.custom_id) for each in good])
            on_progress(result.lines)
            if limit is not None and result.lines >= limit:
                return result
    finally:
        looking.close()
    if ledger.last_line() > last:
        raise LedgerError(
            f"{ledger.run.input_path}: ends at line {last}, but line {ledger.last_line()} was published; "
            "use another ledger (--run) for a changed input"
        )
    return result


class Submission:
    """
    Publishes what the ledger has as unpublished; use it once.

    Args:
        reader: The input, from its beginning.
        ledger: Has every line.
        publish: Publishes one message to the request topic.
        upload: Takes the bodies that are too large for a message; `None`: there are none.
        window: Messages that may be unconfirmed at once.
        patience_s: See `publishing.PATIENCE_S`.
        clock: Monotonic seconds.
        sleep: Waits between publishes.
    """

    def __init__(
        self,
        reader: LineSource,
        ledger: Ledger,
        publish: Publish,
        *,
        upload: Upload | None = None,
        window: int = WINDOW,
        patience_s: float = PATIENCE_S,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._reader = reader
        self._ledger = ledger
        self._publish = publish
        self._upload = upload
        self._window = LineWindow(window, WINDOW_BYTES)
        self._clock = clock
        self._repetition = Repetition(patience_s=patience_s, clock=clock, sleep=sleep)
        self._thread = BlockingThread("ledger")
        self._confirmed: list[tuple[int, str]] = []
        self._writing: asyncio.Future[None] | None = None
        self._started = clock()
        self._stopped = asyncio.Event()
        self._published = 0
        self._skipped = 0
        self._total = 0

    def stop(self) -> None:
        """Publish no further line, repeat no publish; `run` returns when what is on its way is confirmed."""
        self._stopped.set()

    def progress(self) -> SubmitProgress:
        """Return the counts so far."""
        return SubmitProgress(
            published=self._published,
            skipped=self._skipped,
            total=self._total,
            retries=self._repetition.count,
            reason=self._repetition.reason,
            duration_s=self._clock() - self._started,
        )

    async def run(self) -> None:
        """
        Publish everything that is unpublished, or what was begun before `stop`.

        Raises:
            InputError: The input is damaged or has changed since it was checked, or object storage refuses a body.
            PublishError: The broker refused a message, or did not confirm it within `patience_s`.
            LedgerError: The ledger cannot be written.

        Cancellation: stops reading, and records what the broker has confirmed.
        """
        reading = BlockingThread("input")
        try:
            totals = await self._thread.call(self._ledger.totals)
            self._total, self._skipped = totals.lines, totals.published
            if await self._thread.call(self._ledger.first_unpublished) is None:
                return
            async with asyncio.TaskGroup() as group:
                recording = group.create_task(self._record_often())
                while not self._stopped.is_set() and (lines := await reading.call(self._reader.read_lines)):
                    rows = await self._thread.call(self._ledger.lines, lines[0].number, lines[-1].number)
                    for line in lines:
                        row = rows.get(line.number)
                        if row is None or row.is_published or row.is_answered:
                            continue
                        await self._window.enter(line.size)
                        if self._stopped.is_set():
                            self._window.leave(line.size)
                            break
                        group.create_task(self._publish_line(line, row))
                await self._window.wait_until_empty()
                recording.cancel()
        except BaseExceptionGroup as failures:
            raise first_failure(failures) from None
        finally:
            try:
                await reading.call(lambda: None)  # the caller closes the file: no read may be under way then
                reading.close()
                await self._record()
            finally:
                self._thread.close()

    async def _publish_line(self, line: RawLine, row: LineRow) -> None:
        if line.digest != row.digest:
            raise InputError(f"{self._ledger.run.input_path}: line {line.number} has changed while it was submitted")
        examined = examine(line, by_reference=self._upload is not None)
        if examined.fault is not None:  # the line was checked with object storage, and it is not at hand now
            raise InputError(f"{self._ledger.run.input_path}: {examined.fault}")
        prepared = examined.prepared
        attributes = run_attributes(prepared, self._ledger.run.run_id, row.round)
        data: bytes | None = prepared.data
        if prepared.refusal is not None:
            data, attributes = await self._by_reference(line, attributes)
        message_id = None if data is None else await self._repeated(lambda: self._publish(data, attributes), line)
        if message_id is not None:
            self._confirmed.append((line.number, message_id))
            self._published += 1
        self._window.leave(line.size)

    async def _by_reference(
        self, line: RawLine, attributes: Mapping[str, str]
    ) -> tuple[bytes | None, Mapping[str, str]]:
        """Put the body of a line into object storage; return the message that names it, `None` after `stop`."""
        request, upload = decode_request(line.data), self._upload
        assert request.body is not None  # it was examined
        assert upload is not None
        body = request.body.data
        uri = await self._repeated(lambda: upload(line.line_id, body), line)
        digest = await asyncio.to_thread(lambda: sha256(body).hexdigest())
        message = None if uri is None else by_reference(line.data, uri)
        return message, {**attributes, BODY_SHA256: digest}

    async def _repeated(self, step: Callable[[], Awaitable[str]], line: RawLine) -> str | None:
        """Do a step until it succeeds, until `patience_s` is over, or, if it has failed, until `stop`: then `None`."""
        try:
            return await self._repetition.until_done(step, is_over=self._stopped.is_set)
        except MessageRejectedError as error:
            raise InputError(f"{self._ledger.run.input_path}: line {line.number}: {error}") from None
        except PayloadError as error:
            raise InputError(
                f"{self._ledger.run.input_path}: line {line.number}: object storage does not take the body: {error}"
            ) from None

    async def _record_often(self) -> None:
        while True:
            await asyncio.sleep(RECORD_EVERY_S)
            await self._record()

    async def _record(self) -> None:
        """Put what was confirmed into the ledger.  Cancellation: it is written all the same; the next call waits."""
        while self._writing is not None or self._confirmed:
            if self._writing is None:
                confirmed, self._confirmed = self._confirmed, []
                self._writing = asyncio.ensure_future(self._thread.call(self._ledger.record_published, confirmed))
            writing = self._writing
            await asyncio.shield(writing)
            if self._writing is writing:
                self._writing = None


def run_attributes(prepared: Prepared, run_id: str, round_number: int) -> Mapping[str, str]:
    """Return the attributes of a line's message."""
    attributes = {**prepared.attributes, RUN_ID: run_id}
    if round_number != ROUND_1:
        attributes[RUN_ROUND] = str(round_number)
    return attributes
