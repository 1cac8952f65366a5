"""
Writes the output and the error file of a batch: the records of its input with their results, in order, as a stream.

The same records and the same results make the same bytes, whatever was written before: a process that is killed leaves
nothing, and the next one writes the files again.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from worker.batches.lines import ENDED, decode_line, ended_line, ended_message, is_unrun, result_line
from worker.batches.objects import Objects, ObjectWriter
from worker.batches.records import Record, read_records
from worker.batches.states import Status
from worker.batches.store import Batch, Outcome, Result, ResultFile, Store
from worker.errors import WorkerError

PAGE_ROWS = 500
PAGE_BYTES = 4 << 20
"""Of results that are read from the store at once."""
MAX_CODES = 20
"""Of `failures`: the most frequent ones."""


class IncompleteError(WorkerError):
    """A batch that ends as completed has a record without a result: a fault of ours."""


async def assemble(store: Store, objects: Objects, batch: Batch, ended: Status) -> Result:
    """
    Write the files of a batch whose results do not change any more.

    Args:
        store: Has the results.
        objects: Has the input, and gets the files.
        batch: In progress or later.
        ended: The final status that it is about to get; `cancelled` and `expired` stand for missing results.

    Raises:
        PayloadError: The input cannot be read or a file not written; retryable.
        StoreUnavailableError: Retryable.
        IncompleteError: A result is missing, and the batch was neither cancelled nor expired.

    Cancellation: nothing is written, or the first of the two files.
    """
    assembly = _Assembly(batch, ended)
    output = ObjectWriter(objects, _key(batch.output_id))
    error = ObjectWriter(objects, _key(batch.error_id))
    assert batch.input_key is not None
    try:
        async with (
            aclosing(read_records(objects, batch.input_key)) as parts,
            aclosing(_outcomes(store, batch.id)) as results,
        ):
            waiting: deque[Outcome] = deque()
            is_last = False
            async for records in parts:
                for record in records:
                    while not is_last and (not waiting or waiting[-1].record < record.number):
                        page = await anext(results, None)
                        is_last = page is None
                        waiting.extend(page or ())
                    outcome = waiting.popleft() if waiting and waiting[0].record == record.number else None
                    is_ok, line = assembly.line_of(record, outcome)
                    await (output if is_ok else error).write(line)
        sizes = await output.commit(), await error.commit()
    finally:
        await output.abandon()
        await error.abandon()
    return assembly.result(*sizes)


async def _outcomes(store: Store, batch_id: str) -> AsyncGenerator[list[Outcome], None]:
    """Yield the results of a batch in order, a page at a time."""
    after = 0
    while page := await asyncio.to_thread(
        store.outcomes_of, batch_id, after=after, limit=PAGE_ROWS, max_bytes=PAGE_BYTES
    ):
        yield page
        after = page[-1].record


def _key(file_id: str) -> str:
    return f"results/{file_id}"


class _Assembly:
    """What is known of a batch's results so far."""

    def __init__(self, batch: Batch, ended: Status) -> None:
        self._batch = batch
        self._ended = ended
        self._completed = 0
        self._failed = 0
        self._succeeded = bytearray((batch.total + 7) // 8)
        self._failures: dict[str, dict[str, Any]] = {}
        self._usage = dict.fromkeys(("input_tokens", "cached_tokens", "output_tokens", "reasoning_tokens"), 0)
        self._has_usage = False

    def line_of(self, record: Record, outcome: Outcome | None) -> tuple[bool, bytes]:
        """Count a record; return whether it belongs into the output file, and its line there or in the error file."""
        assert record.data is not None
        custom_id = bytes(decode_line(record.data).custom_id)
        if outcome is not None and outcome.is_ok:
            self._count_good(outcome)
            return True, result_line(outcome, custom_id, None)
        code, message = self._why(record, outcome)
        self._failed += 1
        failure = self._failures.setdefault(
            code, {"code": code, "count": 0, "example_line": record.line, "example_message": message}
        )
        failure["count"] += 1
        if outcome is None:
            return False, ended_line(self._batch.id, record.number, custom_id, self._ended)
        return False, result_line(outcome, custom_id, self._ended)

    def _count_good(self, outcome: Outcome) -> None:
        self._completed += 1
        index = outcome.record - 1
        self._succeeded[index // 8] |= 1 << index % 8
        if outcome.input_tokens is not None or outcome.output_tokens is not None:
            self._has_usage = True
        for name in self._usage:
            self._usage[name] += getattr(outcome, name) or 0

    def _why(self, record: Record, outcome: Outcome | None) -> tuple[str, str]:
        is_ended = self._ended in ENDED
        if outcome is None and not is_ended:
            raise IncompleteError(f"{self._batch.id}: record {record.number} has no result")
        if outcome is None or is_unrun(outcome, self._ended):
            ended = self._ended if is_ended else Status.EXPIRED
            return ENDED[ended], ended_message(ended)
        return outcome.code or "", outcome.message or ""

    def result(self, output_bytes: int, error_bytes: int) -> Result:
        """Return what is to be stored with the final status."""
        batch, usage = self._batch, self._usage
        failures = sorted(self._failures.values(), key=lambda failure: (-failure["count"], failure["code"]))
        return Result(
            completed=self._completed,
            failed=self._failed,
            output=_file(batch.output_id, f"{batch.id}_output.jsonl", output_bytes) if self._completed else None,
            error=_file(batch.error_id, f"{batch.id}_error.jsonl", error_bytes) if self._failed else None,
            usage=None
            if not self._has_usage
            else {
                "input_tokens": usage["input_tokens"],
                "input_tokens_details": {"cached_tokens": usage["cached_tokens"]},
                "output_tokens": usage["output_tokens"],
                "output_tokens_details": {"reasoning_tokens": usage["reasoning_tokens"]},
                "total_tokens": usage["input_tokens"] + usage["output_tokens"],
            },
            failures=failures[:MAX_CODES] or None,
            succeeded=bytes(self._succeeded),
        )


def _file(file_id: str, name: str, size: int) -> ResultFile:
    return ResultFile(id=file_id, filename=name, bytes=size, object_key=_key(file_id))
