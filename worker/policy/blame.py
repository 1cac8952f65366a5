"""
Whose trouble a failure is: the message's own, or one that it shares with others.

A failure of one message speaks against the backend only as far as others are not served at the same time.  The laws:

1. A failure is *contradicted* once another message was served by an attempt that began after this message first failed.
   It then changes neither breaker nor window.
2. The failures of a message are its *own* once others were served that began when it had failed already, and chance
   does not explain them: so many in a row at the share of first attempts that fail in its lane (`CHANCE`).  An own
   failure is neither held nor attributed to an outage, so that the message ends within its attempts.  A refused
   connection is never contradicted or a message's own (`judge.blame_for`).
3. A row of failures speaks against the backend once at least two messages are in it and it is longer than chance
   explains (`speaks_against_backend`): where a fifth of the messages fails anyhow, five in a row are no news.  Only an
   attempt that began as late as they did ends it.  While others are under way it is *in doubt* (`is_in_doubt`):
   failures are often quicker than answers.  In the end it is nothing if many that began with it have outlasted it
   (`is_outlasted`).
4. An answer that the broker calls invalid is refused for its *own* sake once more others were published than are
   refused (`is_refusal_own`).  Before that, the topic may be what refuses, as one with a schema does.

What refusals for lack of capacity say about the number of requests is the window's affair (`flow.window.refusals`).
Where nothing is served every failure speaks: an outage of everything is noticed as if this file did not exist.
"""

import math

import msgspec

CHANCE = 0.01
"""How probable it may be at most that a message's failures are chance, for them to be its own.  House decision."""
ROW_CHANCE = 1e-4
"""How probable it may be at most that a row of failures is chance, for it to open a breaker: at 20 messages a second
and a fifth that fails, that is once in some minutes, and costs the second until the next probe.  House decision."""
PRIOR_SHARE = 0.2
"""Share of failing messages that is reckoned with where that of the past says nothing: while nothing is known of it and
other attempts are under way, and of refusals.  The largest that `benchmarks/mixed.py` sends.  House decision."""
MAX_ROW = 64
"""Longest row that is asked for, beside those under way: where nearly everything fails, the breaker still opens."""


class Blame(msgspec.Struct, frozen=True, kw_only=True):
    """What is known about a message and about the others of its lane at the moment its attempt failed."""

    failures: int = 1
    """Failed attempts of this message in this process, over all of its deliveries, this one included."""
    is_contradicted: bool = False
    """Another message was served by an attempt that began after this message first failed."""
    is_served_since: bool = False
    """Another message was served by an attempt that began when this message had failed already.  At the beginning of an
    outage what began a little later may still be served, which contradicts the first failure and says no more."""
    others_failing: int = 0
    """Other messages that failed since one was served."""
    failing_share: float = 0.0
    """Share of the lane's messages whose first attempt failed lately, 0 to 1."""
    undecided: int = 0
    """Other attempts of the lane that are under way."""

    def is_own(self, *, is_refusal: bool) -> bool:
        """
        Return whether the failure is the message's own.

        Args:
            is_refusal: For lack of capacity.  Those come in bursts, whenever the window tries more: a message that was
                refused among many at the start may be so again, however few have been refused since.
        """
        share = max(self.failing_share, PRIOR_SHARE) if is_refusal else self.failing_share
        return self.is_served_since and self.failures > 1 and share**self.failures <= CHANCE


UNKNOWN = Blame()
"""A first failure of which nothing else is known."""


def speaks_against_backend(row: int, least: int, failing_share: float, undecided: int = 0) -> bool:
    """
    Return whether a row of failures is longer than chance explains.

    Failures are often quicker than answers: of twenty attempts that start together, the five that fail end first.  So
    the question is how probable it is that so many of `row + undecided` attempts fail.

    Args:
        row: Attempts that failed since one was served.
        least: Shorter rows say nothing.
        failing_share: Of messages whose first attempt failed while others were served, 0 to 1.
        undecided: Other attempts that are under way.

    Source: the Chernoff bound of a binomial distribution; without `undecided` it is exact.
    """
    if row < least:
        return False
    if row >= MAX_ROW + undecided or failing_share <= 0.0:
        return True
    return not _may_be_chance(row, undecided, failing_share, ROW_CHANCE)


def is_in_doubt(row: int, failing_share: float, undecided: int) -> bool:
    """
    Return whether a row of failures may be chance all the same, since others are under way that can tell.

    After a start nothing is known of the share of failing messages.  If many begin together, two that fail at once
    end before any other is answered.

    Args:
        row: Attempts that failed since one was served, enough for `speaks_against_backend`.
        failing_share: As there.
        undecided: Other attempts that are under way.
    """
    if undecided == 0 or failing_share >= PRIOR_SHARE:
        return False
    return not speaks_against_backend(row, 1, PRIOR_SHARE, undecided)


def is_outlasted(row: int, failing_share: float, outlasting: int) -> bool:
    """
    Return whether a row of failures may be chance, since others that began with it did not fail in the same time.

    Args:
        row: Attempts that failed since one was served.
        failing_share: As in `speaks_against_backend`; at least `PRIOR_SHARE` is reckoned with.
        outlasting: Others that began with the row, are under way, and have lasted longer than its failures.
    """
    return outlasting > 0 and _may_be_chance(row, outlasting, max(failing_share, PRIOR_SHARE), CHANCE)


def _may_be_chance(failed: int, others: int, share: float, chance: float) -> bool:
    """
    Return whether so many of `failed + others` attempts fail by chance more often than `chance`.

    Args:
        failed: At least 1.
        others: At least 0.
        share: Of attempts that fail, above 0 and below 1.
        chance: Above 0 and below 1.
    """
    attempts = failed + others
    found = failed / attempts
    if found <= share:
        return True
    divergence = found * math.log(found / share)
    if others:
        divergence += (1.0 - found) * math.log((1.0 - found) / (1.0 - share))
    return attempts * divergence < -math.log(chance)


def is_refusal_own(others_published: int, others_refused: int) -> bool:
    """
    Say whether the broker refuses an answer for its own sake.

    Args:
        others_published: Answers that were published after this one was first refused and before it was sent again.
        others_refused: Answers that are refused like this one.
    """
    return others_published > others_refused
