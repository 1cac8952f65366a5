"""An emulator in a thread of its own: its start, its end, and calls in between."""

import threading

import pytest

from worker.emulators.thread import EmulatorThread


class Recorder(EmulatorThread):
    """An emulator that listens to nothing and remembers on which threads it was opened, asked and closed."""

    def __init__(self, failure: Exception | None = None) -> None:
        super().__init__("recorder")
        self.failure = failure
        self.names: list[str] = []

    async def _note(self) -> int:
        self.names.append(threading.current_thread().name)
        return len(self.names)

    async def _open(self) -> None:
        await self._note()
        if self.failure is not None:
            raise self.failure

    async def _close(self) -> None:
        await self._note()

    def note(self) -> int:
        """Note the thread of a call."""
        return self._call(self._note)


def test_everything_happens_on_its_own_thread() -> None:
    """Start, a call and stop run on the emulator's thread, in this order; a second stop does nothing."""
    with Recorder() as emulator:
        assert emulator.note() == 2
    emulator.stop()
    assert emulator.names == ["recorder"] * 3


def test_a_failing_start_is_raised_to_the_caller() -> None:
    """The exception is the emulator's own, and the thread has ended."""
    emulator = Recorder(OSError("taken"))
    with pytest.raises(OSError, match="taken"):
        emulator.start()
    emulator.stop()
    assert emulator.names == ["recorder"]
    assert "recorder" not in [thread.name for thread in threading.enumerate()]


def test_a_call_needs_a_running_emulator() -> None:
    """Before the start and after the stop a call is an error, not a wait."""
    emulator = Recorder()
    with pytest.raises(RuntimeError, match="recorder is not running"):
        emulator.note()
    with emulator:
        pass
    with pytest.raises(RuntimeError, match="recorder is not running"):
        emulator.note()
