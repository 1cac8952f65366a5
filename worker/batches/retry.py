"""The failed lines of a batch, as the input of another one: the same lines, byte for byte."""

from collections.abc import AsyncGenerator, AsyncIterable

_BOM = b"\xef\xbb\xbf"


async def failed_lines(chunks: AsyncIterable[bytes], succeeded: bytes) -> AsyncGenerator[bytes, None]:
    """
    Yield the lines of an input whose record is not in the output file, each with its end.

    Args:
        chunks: The content of the input.
        succeeded: A bit for each record, the first one's the lowest of the first byte; see
            `worker.batches.store.Store.succeeded_records`.

    Raises:
        PayloadError: Of `chunks`.
    """
    record, rest = 0, b""
    is_begin = True
    async for chunk in _with_end(chunks):
        *lines, rest = (rest + chunk).split(b"\n")
        for each in lines:
            line = each.removeprefix(_BOM) if is_begin else each
            is_begin = False
            if line.strip(b" \t\r"):
                if not _is_set(succeeded, record):
                    yield line + b"\n"
                record += 1


async def _with_end(chunks: AsyncIterable[bytes]) -> AsyncGenerator[bytes, None]:
    """Yield the chunks, and the end that a last line may lack."""
    async for chunk in chunks:
        yield chunk
    yield b"\n"


def _is_set(bits: bytes, index: int) -> bool:
    return index // 8 < len(bits) and bool(bits[index // 8] >> index % 8 & 1)
