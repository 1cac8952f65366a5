"""
Counts over time, in bins that grow with the run, so that memory is constant.  Pure.

Bins start a tenth of a second wide.  When a run spans more than `MAX_BINS`, neighbours are merged into the next width
of `WIDTHS_S`, each of which is a multiple of the one before; answers may come in any order.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

WIDTHS_S = (0.1, 0.5, 1, 5, 10, 30, 60, 300, 600, 1800, 3600, 6 * 3600, 86400, 7 * 86400, 28 * 86400, 364 * 86400)
"""Widths of a bin, seconds."""
MAX_BINS = 240
"""More are narrower than what a plot can show; fewer than `MAX_BINS / 6` only for short runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bin:
    """What ended within one stretch of time."""

    start: float
    """Unix seconds."""
    good: int
    errors: int
    output_tokens: int


class Timeline:
    """Counts answers by the time at which they ended; not thread-safe."""

    def __init__(self) -> None:
        self._level = 0
        self._bins: dict[int, list[int]] = {}
        self._first = self._last = 0

    @property
    def width_s(self) -> float:
        """Width of a bin now."""
        return WIDTHS_S[self._level]

    def add(self, moment: float, *, is_error: bool, output_tokens: int) -> None:
        """Count one answer that ended at `moment`, Unix seconds."""
        index = math.floor(moment / self.width_s)
        if not self._bins:
            self._first = self._last = index
        self._first, self._last = min(self._first, index), max(self._last, index)
        counts = self._bins.setdefault(index, [0, 0, 0])
        counts[1 if is_error else 0] += 1
        counts[2] += output_tokens
        while self._last - self._first >= MAX_BINS and self._level + 1 < len(WIDTHS_S):
            self._coarsen()

    def bins(self) -> Iterator[Bin]:
        """Yield every bin from the first to the last, empty ones too."""
        if not self._bins:
            return
        for index in range(self._first, self._last + 1):
            good, errors, tokens = self._bins.get(index, (0, 0, 0))
            yield Bin(start=index * self.width_s, good=good, errors=errors, output_tokens=tokens)

    def _coarsen(self) -> None:
        factor = round(WIDTHS_S[self._level + 1] / self.width_s)
        merged: dict[int, list[int]] = {}
        for index, counts in self._bins.items():
            target = merged.setdefault(index // factor, [0, 0, 0])
            for kind, count in enumerate(counts):
                target[kind] += count
        self._bins = merged
        self._first //= factor
        self._last //= factor
        self._level += 1
