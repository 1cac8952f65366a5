"""The failed lines of a batch, as the input of another one: the same records, byte for byte."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from worker.batches.objects import Objects
from worker.batches.records import read_records


async def failed_lines(objects: Objects, key: str, succeeded: bytes) -> AsyncGenerator[bytes, None]:
    """
    Yield the lines of an input whose record is not in the output file, each with a line break.

    Args:
        objects: Where the input is.
        key: Of the input.
        succeeded: A bit for each record, the first one's the lowest of the first byte; see
            `worker.batches.store.Store.succeeded_records`.

    Raises:
        PayloadError: It cannot be read.
    """
    async with aclosing(read_records(objects, key)) as parts:
        async for records in parts:
            for record in records:
                if record.data is not None and not _is_set(succeeded, record.number - 1):
                    yield record.data + b"\n"


def _is_set(bits: bytes, index: int) -> bool:
    return index // 8 < len(bits) and bool(bits[index // 8] >> index % 8 & 1)
