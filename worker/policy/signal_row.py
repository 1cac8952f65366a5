"""
One known sign by which a server says what went wrong: its conditions, and how they are tested.

Fields are compared by equality and the message by a pattern anchored at its first character, never searched: a prompt
echoed in an error may contain any of these words and must not decide anything.
"""

import re
from dataclasses import dataclass

from worker.policy.model import ErrorClass
from worker.policy.normalise import Facts, Shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Signal:
    """One sign; every condition that is given must hold."""

    error_class: ErrorClass
    source: str
    """Where the server says so."""
    statuses: frozenset[int] | None = None
    """HTTP statuses it may come with; an error that has no status (inside a stream) passes too.  `None`: any; empty:
    without a status only."""
    shape: Shape | None = None
    """The form of the body; for words so plain that only the form makes them a sign."""
    names: frozenset[str] = frozenset()
    """Lower case; one of them must equal the code, the type or the inner code."""
    params: frozenset[str] = frozenset()
    """One of them must equal the param."""
    message: re.Pattern[str] | None = None
    """Must match from the first character of the message."""

    def matches(self, facts: Facts, status: int | None) -> bool:
        """Say whether the facts show this sign under a status."""
        if self.statuses is not None and status is not None and status not in self.statuses:
            return False
        if self.shape is not None and self.shape is not facts.shape:
            return False
        if self.names and not self.names & {
            name.lower() for name in (facts.code, facts.type, facts.inner_code) if name is not None
        }:
            return False
        if self.params and facts.param not in self.params:
            return False
        return self.message is None or self.message.match(facts.message) is not None


def begins(*alternatives: str) -> re.Pattern[str]:
    """Compile a pattern for the beginning of a message."""
    return re.compile("(?:" + "|".join(alternatives) + ")", re.ASCII | re.DOTALL)
