"""
How long to wait before something is tried again: the one backoff of the worker.  Pure.

Used between attempts of a held message, publishes of an answer or a line, probes of a breaker, and openings of the
streaming pull; they differ in their numbers alone.
"""

import msgspec

_MAX_DOUBLINGS = 32
"""2**32 is beyond every ratio of `max_s` to `base_s`; it keeps the power finite after any number of failures."""


class Backoff(msgspec.Struct, frozen=True, kw_only=True):
    """
    Exponential backoff with jitter: the wait after the n-th failure is at most `base_s * 2**(n-1)`, and `max_s`.

    Source: https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/.
    """

    base_s: float = 1.0
    """Longest wait after the first failure, seconds."""
    max_s: float = 60.0
    """Longest wait after any failure, seconds."""
    jitter: float = 1.0
    """Share of a wait that is random, so that many do not repeat in step: 1 is full jitter, 0 none."""

    def __post_init__(self) -> None:
        if not 0 < self.base_s <= self.max_s:
            raise ValueError(f"need 0 < base_s <= max_s, not {self.base_s} and {self.max_s}")
        if not 0 <= self.jitter <= 1:
            raise ValueError(f"jitter is a share from 0 to 1, not {self.jitter}")

    def ceiling_s(self, failures: int) -> float:
        """Return the longest wait after so many failures in a row, from 1, in seconds."""
        return min(self.max_s, self.base_s * 2.0 ** min(max(failures - 1, 0), _MAX_DOUBLINGS))

    def delay_s(self, failures: int, uniform: float) -> float:
        """
        Return the wait after so many failures in a row, in seconds.

        Args:
            failures: In a row, from 1.
            uniform: A random number from 0 (the shortest wait) to 1 (the longest).
        """
        return self.ceiling_s(failures) * (1.0 - self.jitter + self.jitter * uniform)
