"""
What a disaster cost, counted where it cannot be argued about: at the broker, at the backend, and on the response
topic.

Delivery attempts are those of the broker's own count where it has one (the embedded server), so that what comes again
after its answer counts as well; Google's emulator tells them with the answers only.
"""

import json
import time
from bisect import bisect_left
from dataclasses import dataclass

from tests.chaos.stage import Stage

WINDOW_S = 1.0
"""A rate is taken over this much time."""
FULL = 0.8
"""Share of the rate before the breaking that counts as full: a second of 160 answers varies by a tenth by itself."""
EMPTYING_S = 5.0


@dataclass(frozen=True)
class Limits:
    """What a disaster may cost."""

    error_replies: bool = False
    """Whether answers may be errors (the message's own fault, or a class with a limit of attempts)."""
    attempts: bool = False
    """Whether delivery attempts may be spent."""
    wasted: int | None = 0
    """Generations that may run twice; `None`: bounded by what was in flight per kill, told in the table."""
    duplicates: bool = False
    recovery_s: float = 5.5
    """Longest time from the mending to the first answer and to full rate."""


@dataclass(frozen=True)
class Score:
    """What one disaster cost."""

    scenario: str
    broker: str
    sent: int
    answered: int
    duplicates: int
    malformed: int
    error_replies: int
    attempts_burned: int
    """Delivery attempts beyond the first, over all messages."""
    backend_calls: int
    wasted: int
    """Generations completed more than once for the same message."""
    recovery_s: float | None
    """From the mending to the first answer after it; `None` without a mending, or when nothing was left to answer."""
    full_rate_s: float | None
    """From the mending to the first second in which answers come as they did before the breaking."""
    unsettled: int | None
    """Messages that the broker still holds although all are answered; `None` where it does not tell."""
    unmet: tuple[str, ...] = ()
    peak_rss_mb: float = 0.0

    @property
    def lost(self) -> int:
        """Requests without an answer."""
        return self.sent - self.answered

    def row(self) -> str:
        """Return the line of the table."""
        cells = (
            f"{self.scenario} ({self.broker})", self.sent, self.answered, self.lost, self.duplicates,
            self.error_replies, self.attempts_burned, self.backend_calls - self.sent, self.wasted,
            _seconds(self.recovery_s), _seconds(self.full_rate_s),
        )  # fmt: skip
        return "| " + " | ".join(str(cell) for cell in cells) + " |"


HEADER = (
    "| scenario (broker) | sent | answered | lost | duplicates | error answers | attempts burned | calls beyond need | "
    "generated twice | first answer s | full rate s |\n|---|---|---|---|---|---|---|---|---|---|---|"
)


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def score(name: str, broker: str, stage: Stage) -> Score:
    """Measure after the run."""
    rig = stage.rig
    rig.collect_rest(1.0)
    unsettled = _empty(stage)
    answers, stats = rig.answers, rig.stats()
    after = [moment for moment in answers.times if stage.mended_at is not None and moment >= stage.mended_at]
    return Score(
        scenario=name,
        broker=broker,
        sent=rig.sent,
        answered=answers.count,
        duplicates=answers.duplicates,
        malformed=answers.malformed,
        error_replies=sum(count for status, count in answers.statuses.items() if status >= 400),
        attempts_burned=_burned(stage),
        backend_calls=stats["requests"],
        wasted=stats["generations"]["wasted"],
        recovery_s=min(after) - stage.mended_at if after and stage.mended_at is not None else None,
        full_rate_s=full_rate_s(answers.times, stage.broken_at, stage.mended_at),
        unsettled=unsettled,
        unmet=tuple(stage.unmet),
        peak_rss_mb=stage.peak_rss_mb,
    )


def _burned(stage: Stage) -> int:
    if stage.server is not None:
        return stage.server.faults.inspect(stage.rig.request_subscription).delivered_count - stage.rig.sent
    return sum(times * (attempt - 1) for attempt, times in stage.rig.answers.attempts.items())


def _empty(stage: Stage) -> int | None:
    """
    Return how many messages stay with the broker, after the time that acks may take and the end of every lease.

    What comes again for want of an ack must be acked and not answered again, so the answers are read meanwhile.
    """
    if stage.server is None:
        return None
    for lease_s in (0.0, 61.0, 61.0, 61.0):
        if lease_s:
            stage.server.advance(lease_s)
        until = time.monotonic() + EMPTYING_S
        while time.monotonic() < until:
            if not stage.server.faults.inspect(stage.rig.request_subscription).delivery_attempts:
                stage.rig.collect_rest(0.5)
                return 0
            stage.rig.collect_during(0.2)
    return len(stage.server.faults.inspect(stage.rig.request_subscription).delivery_attempts)


def full_rate_s(times: list[float], broken_at: float | None, mended_at: float | None) -> float | None:
    """
    Return how long after the mending answers come again as fast as before the breaking.

    Args:
        times: Monotonic seconds of first answers, in order.
        broken_at: The rate is that of the second before.
        mended_at: Counted from here to the beginning of the first second that has `FULL` of that rate.

    Returns:
        `None` without the two moments, without any rate before, or when what was left is less than a second's work.
    """
    if broken_at is None or mended_at is None:
        return None
    wanted = FULL * (bisect_left(times, broken_at) - bisect_left(times, broken_at - WINDOW_S))
    if wanted < 1:
        return None
    for index in range(bisect_left(times, mended_at), len(times)):
        if bisect_left(times, times[index] + WINDOW_S) - index >= wanted:
            return times[index] - mended_at
    return None


def complaints(limits: Limits, result: Score) -> list[str]:
    """Return what the score has that the scenario does not allow."""
    found = list(result.unmet)
    for number, what, is_allowed in (
        (result.lost, "lost", False),
        (result.malformed, "malformed answers", False),
        (result.unsettled or 0, "never acked", False),
        (result.duplicates, "duplicates", limits.duplicates),
        (result.error_replies, "error answers", limits.error_replies),
        (result.attempts_burned, "delivery attempts burned", limits.attempts),
    ):
        if number and not is_allowed:
            found.append(f"{number} {what}")
    if limits.wasted is not None and result.wasted > limits.wasted:
        found.append(f"{result.wasted} generations wasted")
    for seconds, what in ((result.recovery_s, "to the first answer"), (result.full_rate_s, "to full rate")):
        if seconds is not None and seconds > limits.recovery_s:
            found.append(f"{seconds:.1f} s {what}")
    return found


def as_json(results: list[Score]) -> str:
    """Return the scores for further use."""
    return json.dumps([vars(result) for result in results], indent=1)
