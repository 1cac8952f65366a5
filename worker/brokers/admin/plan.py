"""
What `inference-worker setup` would do: wanted infrastructure against what was found, as a list of steps.  Pure.

A step says what becomes of one topic or subscription.  A change that takes protection away from messages is *weakening*
and is only carried out by force; what no change can repair is an *obstacle*, and then nothing at all is done.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from worker.brokers.admin.resources import Field, Subscription, Topic, Value

_DAY_S = 86_400
_WIDTH = 22
"""Column of the values: the longest field's name and one."""


class Verb(StrEnum):
    """What is done; the value is the mark in front of the line."""

    CREATE = "+"
    CHANGE = "~"
    KEEP = "="
    OBSTACLE = "!"


@dataclass(frozen=True, slots=True)
class Change:
    """One field, old and new."""

    field: Field
    old: Value
    new: Value
    weakening: str | None
    """What messages lose by it; `None`: nothing."""


@dataclass(frozen=True, slots=True)
class Step:
    """What becomes of one topic or subscription."""

    verb: Verb
    wanted: Subscription | Topic
    changes: tuple[Change, ...] = ()
    """Of what is new: every field, with `None` as its old value."""
    obstacle: str = ""

    @property
    def name(self) -> str:
        """Full name of the topic or subscription."""
        return self.wanted.name

    @property
    def kind(self) -> str:
        """`topic` or `subscription`."""
        return "topic" if isinstance(self.wanted, Topic) else "subscription"

    def render(self) -> Iterator[str]:
        """Yield the lines of the step, without line ends."""
        yield f"{self.verb} {self.kind} {self.name}"
        if self.obstacle:
            yield f"    {self.obstacle}"
        if self.verb is Verb.CREATE and isinstance(self.wanted, Subscription) and self.wanted.filter:
            yield f"    {'filter':<{_WIDTH}} {self.wanted.filter}"
        for change in self.changes:
            new = show(change.field, change.new)
            values = new if self.verb is Verb.CREATE else f"{show(change.field, change.old)} -> {new}"
            loss = f"   weaker: {change.weakening}" if change.weakening else ""
            yield f"    {change.field:<{_WIDTH}} {values}{loss}"


@dataclass(frozen=True, slots=True)
class Plan:
    """Every step, topics first, so that each can be carried out in order."""

    steps: tuple[Step, ...]

    @property
    def obstacles(self) -> tuple[Step, ...]:
        """Steps that cannot be carried out at all."""
        return tuple(step for step in self.steps if step.verb is Verb.OBSTACLE)

    @property
    def weakenings(self) -> tuple[tuple[Step, Change], ...]:
        """Changes that need force."""
        return tuple((step, change) for step in self.steps for change in step.changes if change.weakening)

    def count(self, verb: Verb) -> int:
        """Return how many steps do this."""
        return sum(step.verb is verb for step in self.steps)

    def render(self) -> str:
        """Return the whole plan as text: a block a step, and the sum."""
        lines = [line for step in self.steps for line in step.render()]
        sums = {"to create": Verb.CREATE, "to change": Verb.CHANGE, "as wanted": Verb.KEEP, "in the way": Verb.OBSTACLE}
        counts = ", ".join(f"{self.count(verb)} {words}" for words, verb in sums.items() if self.count(verb))
        return "\n".join([*lines, "", counts]) + "\n"


def plan(
    topics: Iterable[Topic],
    found_topics: Mapping[str, Topic | None],
    wanted: Iterable[Subscription],
    found: Mapping[str, Subscription | None],
) -> Plan:
    """
    Compare what is wanted with what is there.

    Args:
        topics: Topics that are wanted, in order.
        found_topics: What was found under the name of each of them; `None`: nothing.
        wanted: Subscriptions; only the fields they list are looked at.
        found: What was found under the name of each of them; `None`: nothing.
    """
    steps = [_topic_step(each, found_topics[each.name]) for each in topics]
    steps += [_step(each, found[each.name]) for each in wanted]
    return Plan(tuple(steps))


def _topic_step(wanted: Topic, found: Topic | None) -> Step:
    old = None if found is None else found.retention_s
    is_longer = wanted.retention_s is not None and (old or 0) < wanted.retention_s
    changes = (Change(Field.RETENTION, old, wanted.retention_s, None),) if is_longer else ()
    verb = Verb.CREATE if found is None else Verb.CHANGE if changes else Verb.KEEP
    return Step(verb, wanted, changes)


def _step(wanted: Subscription, found: Subscription | None) -> Step:
    step = Step(Verb.KEEP, wanted)
    if found is None:
        fresh = tuple(Change(field, None, value, None) for field, value in wanted.policy.items())
        return replace(step, verb=Verb.CREATE, changes=fresh)
    if found.obstacle is not None:
        return replace(step, verb=Verb.OBSTACLE, obstacle=found.obstacle)
    if found.topic != wanted.topic:
        obstacle = (
            f"it is subscribed to {found.topic}, not to {wanted.topic}, and that cannot be changed; "
            "delete it or choose another name"
        )
        return replace(step, verb=Verb.OBSTACLE, obstacle=obstacle)
    if found.filter != wanted.filter:
        obstacle = (
            f"its filter is {found.filter or 'none'}, not {wanted.filter or 'none'}, and that cannot be changed; "
            "delete it or choose another name"
        )
        return replace(step, verb=Verb.OBSTACLE, obstacle=obstacle)
    changes = tuple(
        Change(field, found.policy[field], value, weakening(field, found.policy[field], value))
        for field, value in wanted.policy.items()
        if found.policy[field] != value
    )
    return replace(step, verb=Verb.CHANGE, changes=changes) if changes else step


_LOSSES: Mapping[Field, str] = {
    Field.ACK_DEADLINE: "a worker that stalls loses its messages sooner, each at the price of an attempt",
    Field.RETENTION: "what waits longer than that is gone",
    Field.MINIMUM_BACKOFF: "an outage uses up the attempts sooner",
    Field.MAXIMUM_BACKOFF: "an outage uses up the attempts sooner",
    Field.MAX_DELIVERY_ATTEMPTS: "messages are dead-lettered sooner",
}
"""What messages lose when the number gets smaller."""


def weakening(field: Field, old: Value, new: Value) -> str | None:
    """
    Return what messages lose by a change, `None` where it protects them as well or better.

    `None` as a value: see `Field`.
    """
    if field is Field.DEAD_LETTER_TOPIC:
        if old is None or old == new:
            return None
        return "failed messages are kept nowhere" if new is None else f"failed messages no longer go to {old}"
    if field is Field.EXPIRY:
        is_sooner = isinstance(new, int | float) and (old is None or (isinstance(old, int | float) and new < old))
        return "the subscription deletes itself when it is idle" if is_sooner else None
    if not isinstance(old, int | float) or not isinstance(new, int | float):
        return None  # there was none before, or the dead-letter policy goes as a whole
    return _LOSSES[field] if new < old else None


def show(field: Field, value: Value) -> str:
    """Return a value as people read it."""
    if value is None:
        return "never" if field is Field.EXPIRY else "none"
    if isinstance(value, str):
        return value
    days = f" ({value / _DAY_S:g} days)" if value >= _DAY_S and field is not Field.MAX_DELIVERY_ATTEMPTS else ""
    return f"{value:.0f}{days}" if days else f"{value:g}"
