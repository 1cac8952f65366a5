"""What `setup` would do: steps, what counts as weaker, and how it reads."""

from dataclasses import replace

import pytest

from worker.brokers.admin.plan import Change, Plan, Verb, plan, show, weakening
from worker.brokers.admin.resources import Field, Policy, Subscription, Topic, Value

TOPIC, DEAD, NAME = "projects/p/topics/requests", "projects/p/topics/dead", "projects/p/subscriptions/worker"
POLICY: Policy = {
    Field.ACK_DEADLINE: 60,
    Field.RETENTION: 604_800,
    Field.EXPIRY: None,
    Field.MINIMUM_BACKOFF: 10,
    Field.MAXIMUM_BACKOFF: 600,
    Field.DEAD_LETTER_TOPIC: DEAD,
    Field.MAX_DELIVERY_ATTEMPTS: 20,
}
WANTED = Subscription(NAME, TOPIC, POLICY)


def against(found: Subscription | None, *, wanted: Subscription = WANTED) -> Plan:
    return plan((Topic(TOPIC),), {TOPIC: Topic(TOPIC)}, (wanted,), {NAME: found})


def found_with(field: Field, value: Value) -> Subscription:
    return replace(WANTED, policy={**POLICY, field: value})


def test_what_is_missing_is_created_topics_first() -> None:
    """A step for each, in an order in which they can be carried out; a new subscription shows every field."""
    steps = plan((Topic(TOPIC), Topic(DEAD)), {TOPIC: None, DEAD: Topic(DEAD)}, (WANTED,), {NAME: None}).steps
    assert [(step.verb, step.name) for step in steps] == [
        (Verb.CREATE, TOPIC),
        (Verb.KEEP, DEAD),
        (Verb.CREATE, NAME),
    ]
    assert [(change.field, change.new) for change in steps[2].changes] == list(POLICY.items())
    assert not against(None).weakenings


def test_what_is_as_wanted_is_left_alone() -> None:
    """Nothing to do, nothing to change."""
    step = against(WANTED).steps[-1]
    assert (step.verb, step.changes) == (Verb.KEEP, ())


def test_fields_that_are_not_listed_belong_to_the_owner() -> None:
    """A retry policy of a subscription whose retries nobody asked us to look after stays."""
    wanted = replace(WANTED, policy={Field.ACK_DEADLINE: 60})
    assert against(found_with(Field.MINIMUM_BACKOFF, 99), wanted=wanted).steps[-1].verb is Verb.KEEP


WEAKER = [
    (Field.ACK_DEADLINE, 300, "stalls"),
    (Field.RETENTION, 2_678_400, "is gone"),
    (Field.MINIMUM_BACKOFF, 30, "sooner"),
    (Field.MAXIMUM_BACKOFF, 601, "sooner"),
    (Field.DEAD_LETTER_TOPIC, "projects/p/topics/other", "no longer go to projects/p/topics/other"),
    (Field.MAX_DELIVERY_ATTEMPTS, 21, "dead-lettered sooner"),
]


@pytest.mark.parametrize(("field", "old", "loss"), WEAKER, ids=[str(field) for field, _, _ in WEAKER])
def test_taking_something_away_is_weaker(field: Field, old: Value, loss: str) -> None:
    """Every field has a direction that messages lose by, and the plan says what they lose."""
    ((step, change),) = against(found_with(field, old)).weakenings
    assert (step.verb, change.field, change.old, change.new) == (Verb.CHANGE, field, old, POLICY[field])
    assert loss in str(change.weakening)


STRONGER = [
    (Field.ACK_DEADLINE, 10),
    (Field.RETENTION, 600),
    (Field.EXPIRY, 86_400),
    (Field.MINIMUM_BACKOFF, 1),
    (Field.MAXIMUM_BACKOFF, 10),
    (Field.MINIMUM_BACKOFF, None),
    (Field.DEAD_LETTER_TOPIC, None),
    (Field.MAX_DELIVERY_ATTEMPTS, 5),
    (Field.MAX_DELIVERY_ATTEMPTS, None),
]


@pytest.mark.parametrize(("field", "old"), STRONGER, ids=[f"{field}-{old}" for field, old in STRONGER])
def test_adding_protection_needs_no_force(field: Field, old: Value) -> None:
    """The other direction is a change like any other."""
    steps = against(found_with(field, old))
    assert steps.steps[-1].changes == (Change(field, old, POLICY[field], None),)
    assert not steps.weakenings


def test_removing_the_dead_letter_policy_is_told_once() -> None:
    """The topic's line says what is lost; the number that goes with it says nothing more."""
    bare = replace(WANTED, policy={**POLICY, Field.DEAD_LETTER_TOPIC: None, Field.MAX_DELIVERY_ATTEMPTS: None})
    ((_, change),) = against(WANTED, wanted=bare).weakenings
    assert (change.field, change.weakening) == (Field.DEAD_LETTER_TOPIC, "failed messages are kept nowhere")


@pytest.mark.parametrize(("old", "is_weaker"), [(None, True), (2_678_400, True), (86_400, False), (3_600, False)])
def test_an_expiry_is_weaker_the_sooner_it_comes(old: Value, is_weaker: bool) -> None:
    """`None` is never, so anything is sooner."""
    assert bool(weakening(Field.EXPIRY, old, 86_400)) is is_weaker


@pytest.mark.parametrize(
    ("found", "word"),
    [
        (replace(WANTED, obstacle="it pushes to a URL"), "pushes"),
        (replace(WANTED, topic="projects/p/topics/else"), "subscribed to projects/p/topics/else"),
    ],
    ids=["not a pull subscription", "another topic"],
)
def test_what_no_change_repairs_is_an_obstacle(found: Subscription, word: str) -> None:
    """It is told, and it is no change that force could make."""
    steps = against(found)
    (step,) = steps.obstacles
    assert word in step.obstacle
    assert step.changes == ()
    assert f"! subscription {NAME}\n    it" in steps.render()


def test_the_plan_reads_like_a_plan() -> None:
    """A mark and a name a line, below it old -> new, at the end the sum."""
    found = replace(
        WANTED, policy={**POLICY, Field.ACK_DEADLINE: 10, Field.EXPIRY: 2_678_400, Field.RETENTION: 864_000}
    )
    assert plan((Topic(TOPIC), Topic(DEAD)), {TOPIC: Topic(TOPIC), DEAD: None}, (WANTED,), {NAME: found}).render() == (
        f"= topic {TOPIC}\n"
        f"+ topic {DEAD}\n"
        f"~ subscription {NAME}\n"
        "    ack_deadline_s         10 -> 60\n"
        "    retention_s            864000 (10 days) -> 604800 (7 days)   weaker: what waits longer than that is gone\n"
        "    expiry_s               2678400 (31 days) -> never\n"
        "\n"
        "1 to create, 1 to change, 1 as wanted\n"
    )


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        (Field.EXPIRY, None, "never"),
        (Field.MINIMUM_BACKOFF, None, "none"),
        (Field.MINIMUM_BACKOFF, 0.5, "0.5"),
        (Field.RETENTION, 1_000_000, "1000000 (11.5741 days)"),
        (Field.DEAD_LETTER_TOPIC, DEAD, DEAD),
    ],
)
def test_values_as_people_read_them(field: Field, value: Value, text: str) -> None:
    """No scientific notation, days where they help."""
    assert show(field, value) == text


def test_a_filter_cannot_be_changed() -> None:
    """Pub/Sub has no way: the plan says so instead of making a subscription that gets other messages."""
    wanted = Subscription("projects/p/subscriptions/s", "projects/p/topics/t", {}, 'attributes.model = "a"')
    found = Subscription(wanted.name, wanted.topic, {})
    (step,) = plan((), {}, (wanted,), {wanted.name: found}).steps
    assert (step.verb, "its filter is none, not attributes.model" in step.obstacle) == (Verb.OBSTACLE, True)
    (step,) = plan((), {}, (wanted,), {wanted.name: None}).steps
    assert 'filter                 attributes.model = "a"' in "\n".join(step.render())
    (step,) = plan((), {}, (wanted,), {wanted.name: wanted}).steps
    assert step.verb is Verb.KEEP


@pytest.mark.parametrize(
    ("found", "verb", "old"),
    [
        (None, Verb.CREATE, None),
        (Topic(TOPIC), Verb.CHANGE, None),
        (Topic(TOPIC, 600), Verb.CHANGE, 600),
        (Topic(TOPIC, 86_400), Verb.KEEP, ...),
        (Topic(TOPIC, 604_800), Verb.KEEP, ...),
    ],
)
def test_a_topic_keeps_its_messages_at_least_as_long_as_wanted(found: Topic | None, verb: Verb, old: Value) -> None:
    """One that keeps them longer is left alone."""
    steps = plan((Topic(TOPIC, 86_400),), {TOPIC: found}, (), {})
    assert steps.steps[0].verb is verb
    assert [(change.field, change.old, change.new) for change in steps.steps[0].changes] == (
        [] if verb is Verb.KEEP else [(Field.RETENTION, old, 86_400)]
    )
    assert not steps.weakenings
