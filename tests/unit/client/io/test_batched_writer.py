"""Output from the event loop, one write for a burst of lines."""

import asyncio
import threading

import pytest

from worker.client.errors import OutputError
from worker.client.io.batched_writer import BatchedWriter


class Sink:
    """Keeps what is written; blocks while its gate is closed."""

    def __init__(self):
        self.writes = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.failure = None

    def write(self, data):
        self.entered.set()
        self.gate.wait()
        if self.failure is not None:
            raise self.failure
        self.writes.append(data)


async def until(event):
    """Wait for a thread's event without blocking the loop."""
    await asyncio.to_thread(event.wait, 10)


async def test_lines_that_arrive_during_a_write_go_out_together():
    """Lines that arrive during a write are joined into the next write."""
    sink = Sink()
    sink.gate.clear()
    writer = BatchedWriter(sink)
    done = []
    writes = [asyncio.ensure_future(writer.write(b"0\n", lambda: done.append(0)))]
    await until(sink.entered)
    writes += [asyncio.ensure_future(writer.write(b"%d\n" % n, lambda n=n: done.append(n))) for n in range(1, 5)]
    await asyncio.sleep(0)
    assert not any(call.done() for call in writes)
    assert done == []
    sink.gate.set()
    await asyncio.gather(*writes)
    assert sink.writes == [b"0\n", b"1\n2\n3\n4\n"]
    assert done == [0, 1, 2, 3, 4]
    assert await writer.aclose(1)


async def test_large_lines_are_not_joined():
    """The copy that joining makes is bounded."""
    sink = Sink()
    sink.gate.clear()
    writer = BatchedWriter(sink)
    line = b"x" * 3_000_000 + b"\n"
    writes = [asyncio.ensure_future(writer.write(line, lambda: None)) for _ in range(4)]
    await until(sink.entered)
    sink.gate.set()
    await asyncio.gather(*writes)
    assert [len(data) for data in sink.writes] == [len(line)] * 4
    assert await writer.aclose(1)


async def test_cancelled_write_still_reaches_the_sink():
    """A cancelled caller does not take its line back, and the line still counts as written."""
    sink = Sink()
    sink.gate.clear()
    writer = BatchedWriter(sink)
    done = []
    first = asyncio.ensure_future(writer.write(b"1\n", lambda: done.append(1)))
    await until(sink.entered)
    second = asyncio.ensure_future(writer.write(b"2\n", lambda: done.append(2)))
    await asyncio.sleep(0)
    first.cancel()
    second.cancel()
    await asyncio.wait({first, second})
    sink.gate.set()
    assert await writer.aclose(10)
    assert b"".join(sink.writes) == b"1\n2\n"
    assert done == [1, 2]


async def test_failure_reaches_every_caller():
    """A failed write fails the lines of its batch, the queued ones, later ones, and `watch`."""
    sink = Sink()
    sink.gate.clear()
    sink.failure = OutputError("out.jsonl: No space left on device")
    writer = BatchedWriter(sink)
    watching = asyncio.ensure_future(writer.watch())
    written = []
    writes = [asyncio.ensure_future(writer.write(b"1\n", lambda: written.append(1)))]
    await until(sink.entered)
    writes.append(asyncio.ensure_future(writer.write(b"2\n", lambda: written.append(2))))
    await asyncio.sleep(0)
    sink.gate.set()
    for outcome in await asyncio.gather(*writes, watching, return_exceptions=True):
        assert isinstance(outcome, OutputError)
    with pytest.raises(OutputError, match="No space left"):
        await writer.write(b"3\n", lambda: written.append(3))
    assert written == []
    assert not await writer.aclose(1)


async def test_blocked_output_is_given_up_after_the_grace():
    """Closing does not wait for ever on a full pipe."""
    sink = Sink()
    sink.gate.clear()
    writer = BatchedWriter(sink)
    call = asyncio.ensure_future(writer.write(b"1\n", lambda: None))
    await until(sink.entered)
    assert not await writer.aclose(0)
    call.cancel()
    sink.gate.set()
