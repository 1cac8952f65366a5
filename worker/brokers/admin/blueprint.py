"""
Topics and subscriptions as values: what is wanted and what was found, in the words of the settings.

Pure: `infrastructure` turns them into RPCs, `worker.setup_plan` compares them.  A wanted subscription lists only the
fields that are to be looked after; what it does not list is the owner's and stays as it is.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class Field(StrEnum):
    """What `setup` looks after in a subscription; durations are seconds."""

    ACK_DEADLINE = "ack_deadline_s"
    RETENTION = "retention_s"
    EXPIRY = "expiry_s"
    """Idle time after which the subscription is deleted; `None`: never."""
    MINIMUM_BACKOFF = "minimum_backoff_s"
    """`None`: no retry policy, a message handed back comes again at once."""
    MAXIMUM_BACKOFF = "maximum_backoff_s"
    DEAD_LETTER_TOPIC = "dead_letter_topic"
    """Full name; `None`: no dead-letter policy."""
    MAX_DELIVERY_ATTEMPTS = "max_delivery_attempts"


Value = float | str | None
Policy = Mapping[Field, Value]


@dataclass(frozen=True, slots=True)
class Subscription:
    """A pull subscription."""

    name: str
    """Full name."""
    topic: str
    """Full name of what it is subscribed to; cannot be changed later."""
    policy: Policy
    obstacle: str | None = field(default=None, kw_only=True)
    """Of one that was found: why the worker can never pull from it, whatever is changed; `None`: nothing."""


@dataclass(frozen=True, slots=True)
class Lack:
    """A field that a server does not take; only emulators lack any."""

    subscription: str
    field: Field
    text: str
    """The server's own words."""


@dataclass(frozen=True, slots=True)
class Binding:
    """One role of an IAM policy."""

    role: str
    members: frozenset[str]
