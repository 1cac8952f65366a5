"""
How long the answers of a lane took lately: what a deadline that is near is compared with.

A request whose deadline leaves less time than nearly all recent answers took would be cut: its tokens are wasted, and
others wait for them.  So it is not sent, but for one in `TRY_EVERY`: if nothing were sent, nothing would show that the
backend has become faster.

Only recent answers count, and only many of them say anything.  Pure: times come from the caller.
"""

from collections import deque

KEPT = 128
"""Answers that are remembered."""
LEAST_ANSWERS = 20
"""With fewer recent ones nothing is concluded: a tenth of them would be less than two."""
RECENT_S = 300.0
"""Older ones say nothing about now.  House decision: many of the shortest answers, a few of the longest."""
TRY_EVERY = 16


class AnswerTimes:
    """The times of the last answers of one lane."""

    def __init__(self) -> None:
        self._recent: deque[tuple[float, float]] = deque(maxlen=KEPT)
        self._refused = 0

    def add(self, now: float, seconds: float) -> None:
        """Note an answer that is complete now and took so long from the start of its attempt."""
        self._recent.append((now, seconds))

    def least_s(self, now: float, share: float) -> float | None:
        """
        Return the time than which a share of the recent answers were faster, seconds; `None`: too few to say.

        Args:
            now: On the clock of `add`.
            share: 0 to 1.
        """
        while self._recent and now - self._recent[0][0] > RECENT_S:
            self._recent.popleft()
        if len(self._recent) < LEAST_ANSWERS:
            return None
        return sorted(seconds for _, seconds in self._recent)[int(share * len(self._recent))]

    def is_tried(self) -> bool:
        """Count one more request that would come too late, and return whether it is sent all the same."""
        self._refused += 1
        return self._refused % TRY_EVERY == 0
