"""
What the attempts of one lane say about each other: who failed, and who was served at the same time.

A lane remembers the messages that failed and were not served since, and how the first attempts of the latest messages
ended.  From that comes a `Blame` for each failure; what follows from it is decided in `policy.blame` and
`policy.judge`.

Attempts are known by the number of their start: later starts have larger numbers.  Pure: no clock, no I/O.
"""

from collections import OrderedDict, deque

import msgspec

from worker.policy.blame import Blame

MAX_SUSPECTS = 1024
"""Messages that are remembered because they failed; the one that failed longest ago is forgotten first."""
FIRST_ATTEMPTS = 64
"""First attempts that the share of failing ones is taken from."""
MAX_PENDING = 16
"""Failures in a row that count in that share at most: after an outage the next one is noticed nearly as soon."""


FORBIDDEN_QUIET_S = 60.0
"""A success within this time shows that the credentials are good, seconds.  House decision."""
MAX_FORBIDDEN = 16
"""Models and paths that are remembered for a row of 403s; far fewer decide."""


class _Suspect(msgspec.Struct):
    """A message that failed and was not served since."""

    first_began: int
    """Number of its first attempt that failed."""
    failed_at: int
    """Number of the latest start when it first failed."""
    failures: int = 0
    rank: int = 0
    """Failures since the lane last closed."""


class Evidence:
    """The memory of one lane, or of a route for what concerns all lanes."""

    def __init__(self) -> None:
        self._suspects: OrderedDict[str, _Suspect] = OrderedDict()
        self._first_attempts: deque[bool] = deque(maxlen=FIRST_ATTEMPTS)
        self._failed_first = 0
        self._pending = 0  # first attempts that failed since one was served
        self._failing: set[str | int] = set()  # messages that failed since one was served, and were not contradicted
        self._latest_served = -1

    @property
    def failing_share(self) -> float:
        """
        Share of messages whose first attempt failed lately, 0 to 1, as far as others were served afterwards.

        Failures that nothing good follows may be an outage's and are in no share yet.  Few attempts say little, so the
        share is as if eight others had been served.
        """
        return self._failed_first / (len(self._first_attempts) + 8.0)

    @property
    def row(self) -> int:
        """Messages that failed since one was served, without those that others contradict."""
        return len(self._failing)

    def rank(self, key: str | None) -> int:
        """Return how far a message's claim is behind that of a fresh one: its failures since the lane last closed."""
        suspect = self._suspects.get(key) if key is not None else None
        return suspect.rank if suspect is not None else 0

    def served(self, key: str | None, began: int) -> bool:
        """Note that a message was served by the attempt that began with this number; return whether it had failed."""
        self._latest_served = max(self._latest_served, began)
        for _ in range(min(self._pending, MAX_PENDING)):
            self._count_first(has_failed=True)
        self._pending = 0
        self._failing.clear()
        suspect = self._suspects.pop(key, None) if key is not None else None
        if suspect is None:
            self._count_first(has_failed=False)
        return suspect is not None

    def failed(self, key: str | None, began: int, *, latest: int | None = None, undecided: int = 0) -> Blame:
        """
        Note that a message's attempt failed, and return what is known at that moment.

        Args:
            key: The message.
            began: Number of the attempt's start.
            latest: Number of the latest start; `None`: this one.
            undecided: Other attempts under way.
        """
        suspect = self._suspects.get(key) if key is not None else None
        if suspect is None:
            suspect = _Suspect(first_began=began, failed_at=began if latest is None else latest)
            self._pending += 1
            if key is not None:
                self._suspects[key] = suspect
                if len(self._suspects) > MAX_SUSPECTS:
                    self._suspects.popitem(last=False)
        elif key is not None:
            self._suspects.move_to_end(key)
        suspect.failures += 1
        suspect.rank += 1
        is_contradicted = self._latest_served > suspect.first_began
        identity = key if key is not None else began
        others = len(self._failing - {identity})
        if not is_contradicted and len(self._failing) < MAX_SUSPECTS:
            self._failing.add(identity)
        return Blame(
            failures=suspect.failures,
            others_failing=others,
            is_contradicted=is_contradicted,
            is_served_since=self._latest_served > suspect.failed_at,
            failing_share=self.failing_share,
            undecided=undecided,
        )

    def forgive(self) -> None:
        """Let no message stand behind fresh ones any more: an outage is over that explains the failures."""
        for suspect in self._suspects.values():
            suspect.rank = 0

    def _count_first(self, *, has_failed: bool) -> None:
        if len(self._first_attempts) == FIRST_ATTEMPTS:
            self._failed_first -= self._first_attempts[0]
        self._first_attempts.append(has_failed)
        self._failed_first += has_failed


class ForbiddenRow:
    """
    The different models and paths of a route that were answered 403 since the route last served anything.

    One requester can be refused any number of times for one model and path, and others are served meanwhile.  Refused
    credentials of ours are refused everywhere.
    """

    def __init__(self) -> None:
        self._refused: set[int] = set()
        self._served_at: float | None = None

    def served(self, now: float) -> None:
        """Note that a request was served."""
        self._served_at = now
        self._refused.clear()

    def forbidden(self, model: str | None, path: str) -> None:
        """Note that a request was answered 403."""
        if len(self._refused) < MAX_FORBIDDEN:
            self._refused.add(hash((model, path)))

    def length(self, model: str | None, path: str, now: float) -> int:
        """
        Return how long the row is if this request is answered 403 too.

        0 if a request was served within `FORBIDDEN_QUIET_S`.
        """
        if self._served_at is not None and now - self._served_at < FORBIDDEN_QUIET_S:
            return 0
        return len(self._refused | {hash((model, path))})
