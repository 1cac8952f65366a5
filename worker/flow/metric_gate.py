"""
Which part of a window may be used, by what metrics say about the load that others put on the server.  Pure.

A server that people use as well has little room for batch work at noon and much at night.  Each *signal* is one number,
for example how many requests wait at the server, with the value at which the whole window may be used and the value at
which nothing starts; between them the part changes evenly.  Of several signals the least part counts.

The part falls at once and rises slowly.  Others feel every request too many, and what waits is not to start all at once
when the gate opens.  Where the worker's own requests move the signal, the slow rise also ends the swing that would
follow from readings that come late; a band in which a closed gate stays closed gave nothing beside it (ADR 28).

Without a reading that is recent enough the part is 0 or 1, whichever the settings say.
"""

from collections.abc import Sequence

import msgspec

from worker.flow.clock import Now


class MetricSignal(msgspec.Struct, frozen=True, kw_only=True):
    """How one number limits a window."""

    name: str
    whole_at: float
    """The whole window may be used at this value, and on the side of it that `closed_at` is not on."""
    closed_at: float
    """Nothing starts at this value and beyond it; another one than `whole_at`."""
    is_without_own: bool = False
    """The worker's own attempts under way are subtracted from the number first."""

    def part(self, value: float, own: int) -> float:
        """
        Return the part of the window that may be used, 0 to 1.

        Args:
            value: A number, not NaN; infinite ones are allowed.
            own: The worker's own attempts under way at the server.
        """
        if self.is_without_own:
            value = max(0.0, value - own)
        part = (value - self.closed_at) / (self.whole_at - self.closed_at)
        return min(max(part, 0.0), 1.0)


class MetricGate:
    """
    The part of a window that may be used now.

    Args:
        signals: At least one.
        is_open_without: Without a recent reading the whole window may be used; else nothing starts.
        stale_after_s: A reading counts for this long, seconds.
        rise_s: The part rises from 0 to 1 within this time at the fastest, seconds; 0 for at once.
        now: Monotonic seconds.
    """

    def __init__(
        self,
        signals: Sequence[MetricSignal],
        *,
        is_open_without: bool,
        stale_after_s: float,
        rise_s: float,
        now: Now,
    ) -> None:
        self.signals = tuple(signals)
        self._part_without = 1.0 if is_open_without else 0.0
        self._stale_after_s = stale_after_s
        self._rise_s = rise_s
        self._now = now
        self._read_at: float | None = None
        self._wanted = self._part = self._part_without
        self._moved_at = now()

    @property
    def age_s(self) -> float | None:
        """How old the last reading is, seconds; `None` before the first."""
        return None if self._read_at is None else self._now() - self._read_at

    @property
    def is_stale(self) -> bool:
        """Whether there is no reading that is recent enough."""
        age_s = self.age_s
        return age_s is None or age_s > self._stale_after_s

    def take(self, values: Sequence[float], own: int) -> None:
        """
        Take a reading: one number for each signal.

        Args:
            values: In the order of the signals.
            own: See `MetricSignal.part`.
        """
        self._read_at = self._now()
        self._wanted = min(signal.part(value, own) for signal, value in zip(self.signals, values, strict=True))

    def part(self) -> float:
        """Return the part of the window that may be used now, 0 to 1; to be asked often, since it rises with time."""
        now = self._now()
        wanted = self._part_without if self.is_stale else self._wanted
        if wanted <= self._part or self._rise_s <= 0.0:
            self._part = wanted
        else:
            self._part = min(wanted, self._part + (now - self._moved_at) / self._rise_s)
        self._moved_at = now
        return self._part
