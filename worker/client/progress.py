"""
The progress of a run on standard error: a bar on a terminal, a plain line every five seconds elsewhere.

A display gets every `Progress` and shows one when its interval has passed.  A stalled run still shows its line, because
it reports at a fixed interval.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from worker.client.summary import Progress

PLAIN_INTERVAL_S = 5.0
"""Between two plain lines: short enough to watch a log, long enough to keep it."""
_BAR_INTERVAL_S = 0.1
_WEIGHT = 0.3
"""Share of the newest sample in the shown rate; with four samples a second the rate covers about three seconds."""


class Display(Protocol):
    """Shows progress until it is closed; also a context manager."""

    def __call__(self, progress: Progress) -> None:
        """Keep the newest state, and show it when the interval has passed; cheap."""

    def say(self, text: str) -> None:
        """Write a line that stays, above what is redrawn."""

    def close(self) -> None:
        """Show the last state; idempotent."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def build_display(stream: TextIO, *, clock: Callable[[], float] = time.monotonic) -> Display:
    """
    Return a bar for a terminal and plain lines for any other stream.

    Args:
        stream: Usually standard error.
        clock: Monotonic seconds.
    """
    return BarDisplay(stream, clock=clock) if stream.isatty() else PlainDisplay(stream, clock=clock)


class _Display(ABC):
    def __init__(self, stream: TextIO, clock: Callable[[], float], interval_s: float) -> None:
        self._stream = stream
        self._clock = clock
        self._interval_s = interval_s
        self._shown_at = clock()
        self._newest: Progress | None = None
        self._is_shown = True
        self._is_closed = False

    def __call__(self, progress: Progress) -> None:
        self._newest = progress
        self._is_shown = False
        if self._clock() - self._shown_at >= self._interval_s:
            self._show_newest()

    def _show_newest(self) -> None:
        if self._newest is not None and not self._is_shown:
            self._show(self._newest)
            self._is_shown = True
            self._shown_at = self._clock()

    @abstractmethod
    def _show(self, progress: Progress) -> None:
        """Draw this state; called at most once per interval, and at the end."""

    def say(self, text: str) -> None:
        self._stream.write(f"{text}\n")
        self._stream.flush()

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._show_newest()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class PlainDisplay(_Display):
    """
    Lines such as `120/224 lines (54 %), 3 errors, 64 waiting, 41.2 lines/s, 0:00:05`.

    Args:
        stream: Where the lines go.
        clock: Monotonic seconds.
        interval_s: Between two lines.
    """

    def __init__(
        self, stream: TextIO, *, clock: Callable[[], float] = time.monotonic, interval_s: float = PLAIN_INTERVAL_S
    ) -> None:
        super().__init__(stream, clock, interval_s)
        self._last: Progress | None = None

    def _show(self, progress: Progress) -> None:
        rate = _rate(self._last, progress)
        self._last = progress
        self._stream.write(f"{describe(progress)}, {rate:.1f} lines/s, {_clock_text(progress.duration_s)}\n")
        self._stream.flush()


class BarDisplay(_Display):
    """
    A bar with count, errors, rate and time left, redrawn in place; 80 columns are enough for ten million lines.

    Args:
        stream: A terminal.
        clock: Monotonic seconds.
    """

    def __init__(self, stream: TextIO, *, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(stream, clock, _BAR_INTERVAL_S)
        self._last: Progress | None = None
        self._rate = 0.0
        self._bar = RichProgress(
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=Console(file=stream, highlight=False),
            auto_refresh=False,
            get_time=clock,
            expand=True,
        )
        self._task = self._bar.add_task("answering", total=None, note="")
        self._bar.start()

    def _show(self, progress: Progress) -> None:
        rate = _rate(self._last, progress)
        self._rate = rate if self._last is None else _WEIGHT * rate + (1 - _WEIGHT) * self._rate
        self._last = progress
        self._bar.update(
            self._task,
            total=progress.expected_lines,
            completed=progress.skipped + progress.answered,
            note=f"{progress.errors} errors, {self._rate:.1f}/s" if progress.errors else f"{self._rate:.1f} lines/s",
        )
        self._bar.refresh()

    def say(self, text: str) -> None:
        """Write a line above the bar."""
        if self._is_closed:
            super().say(text)
        else:
            self._bar.console.print(text, markup=False)

    def close(self) -> None:
        """Draw the last state and release the terminal; idempotent."""
        super().close()
        self._bar.stop()


def describe(progress: Progress) -> str:
    """Return one line of text about a state of a run, without rate and time."""
    done = progress.skipped + progress.answered
    expected = progress.expected_lines
    head = f"{done} lines" if expected is None else f"{done}/{expected} lines"
    if expected:
        head += f" ({100 * done // expected} %)"
    return ", ".join([head, *_remarks(progress)])


def _remarks(progress: Progress) -> list[str]:
    remarks = []
    if progress.skipped:
        remarks.append(f"{progress.skipped} answered before")
    if progress.errors:
        remarks.append(f"{progress.errors} errors")
    if progress.waiting:
        remarks.append(f"{progress.waiting} waiting")
    if progress.publish_retries:
        remarks.append(f"{progress.publish_retries} publishes repeated")
    return remarks


def _rate(last: Progress | None, newest: Progress) -> float:
    """Return answers a second between two states; since the start for the first state."""
    answered, span = newest.answered, newest.duration_s
    if last is not None:
        answered, span = answered - last.answered, span - last.duration_s
    return answered / span if span > 0 else 0.0


def _clock_text(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
