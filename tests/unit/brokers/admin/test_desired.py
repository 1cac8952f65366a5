"""What the settings want: names completed, numbers passed on, combinations refused."""

from typing import Any

import pytest

from worker.brokers.admin.desired import BATCH_FILTER, BATCHES, WORKER, Desired, desired_by
from worker.brokers.admin.iam import PUBLISHER, SUBSCRIBER, VIEWER
from worker.brokers.admin.resources import Field, Topic
from worker.errors import SettingsError
from worker.settings.schema import Settings

PULLED, RESPONSES = "projects/p/subscriptions/worker", "projects/p/topics/responses"


def want(*, subscription: str = PULLED, topic: str = RESPONSES, **sections: Any) -> Desired:
    sections["setup"] = {"request_topic": "requests", **sections.get("setup", {})}
    return desired_by(Settings.model_validate(sections), subscriptions=[subscription], topic=topic)


def test_the_defaults_are_the_safe_values() -> None:
    """20 s of ack deadline, a week, no expiry, 10 to 600 s of backoff, a dead-letter topic after 20, held for 31 days."""
    wanted = want()
    request, hold = wanted.subscriptions
    assert (request.name, request.topic) == (PULLED, "projects/p/topics/requests")
    assert request.policy == {
        Field.ACK_DEADLINE: 20,
        Field.RETENTION: 604_800,
        Field.EXPIRY: None,
        Field.MINIMUM_BACKOFF: 10,
        Field.MAXIMUM_BACKOFF: 600,
        Field.DEAD_LETTER_TOPIC: "projects/p/topics/requests-dead-letters",
        Field.MAX_DELIVERY_ATTEMPTS: 20,
    }
    assert (hold.name, hold.topic) == (
        "projects/p/subscriptions/requests-dead-letters-hold",
        "projects/p/topics/requests-dead-letters",
    )
    assert hold.policy == {Field.ACK_DEADLINE: 20, Field.RETENTION: 2_678_400, Field.EXPIRY: None}
    names = ("projects/p/topics/requests", RESPONSES, "projects/p/topics/requests-dead-letters")
    assert wanted.topics == tuple(map(Topic, names))
    assert wanted.control is None


def test_several_subscriptions_have_filters_and_topics_of_their_own() -> None:
    """Each with the retries, the dead letters and the roles that a single one has."""
    several = [
        {"name": "llama", "filter": 'attributes.model = "llama"'},
        {"name": "people-worker", "topic": "people"},
    ]
    settings = {"pubsub": {"project_id": "p", "subscriptions": several}, "setup": {"request_topic": "requests"}}
    names = [f"projects/p/subscriptions/{each['name']}" for each in several]
    wanted = desired_by(Settings.model_validate(settings), subscriptions=names, topic=RESPONSES)
    llama, people, *holds = wanted.subscriptions
    assert (llama.topic, llama.filter) == ("projects/p/topics/requests", 'attributes.model = "llama"')
    assert (people.topic, people.filter) == ("projects/p/topics/people", "")
    assert people.policy[Field.DEAD_LETTER_TOPIC] == "projects/p/topics/people-dead-letters"
    assert {hold.topic for hold in holds} == {
        llama.policy[Field.DEAD_LETTER_TOPIC],
        people.policy[Field.DEAD_LETTER_TOPIC],
    }
    worker = {(need.resource, need.role) for need in wanted.needs if need.member is not None}
    assert {(name, role) for name in names for role in (SUBSCRIBER, VIEWER)} < worker


def test_every_number_is_the_settings() -> None:
    """None of the seven is hard-wired."""
    numbers = {
        "ack_deadline_s": 30,
        "retention_s": 7200,
        "dead_letter_retention_s": 9000,
        "minimum_backoff_s": 2,
        "maximum_backoff_s": 3,
        "max_delivery_attempts": 7,
        "dead_letter_topic": "projects/other/topics/dead",
    }
    request, hold = want(setup=numbers).subscriptions
    assert list(request.policy.values()) == [30, 7200, None, 2, 3, "projects/other/topics/dead", 7]
    assert (hold.name, hold.policy[Field.RETENTION]) == ("projects/other/subscriptions/dead-hold", 9000)


def test_short_names_are_completed_with_the_project_of_the_settings() -> None:
    """Else with that of the request subscription."""
    assert want(subscription="projects/s/subscriptions/worker").topics[0].name == "projects/s/topics/requests"
    wanted = want(subscription="projects/s/subscriptions/worker", pubsub={"project_id": "q"})
    assert wanted.topics[0].name == "projects/q/topics/requests"


def test_the_request_topic_follows_from_the_subscriptions_name() -> None:
    """As Terraform names them: `requests-worker` is a subscription to `requests`, in the subscription's own project."""
    none = {"request_topic": None}
    wanted = want(subscription="projects/s/subscriptions/in-requests-worker", setup=none, pubsub={"project_id": "q"})
    assert wanted.topics[0].name == wanted.subscriptions[0].topic == "projects/s/topics/in-requests"
    with pytest.raises(SettingsError, match="does not end with -worker"):
        want(subscription="projects/s/subscriptions/-worker", setup=none)


def test_the_collectors_subscription_keeps_its_own_retries() -> None:
    """It is made when it is named; its retry and dead-letter policies are its owner's."""
    _, collected, _ = want(setup={"response_subscription": "collect"}).subscriptions
    assert (collected.name, collected.topic) == ("projects/p/subscriptions/collect", RESPONSES)
    assert set(collected.policy) == {Field.ACK_DEADLINE, Field.RETENTION, Field.EXPIRY}


def test_copies_of_failed_requests_are_held_as_well() -> None:
    """The worker's own dead-letter topic would lose them without a subscription; it may be the same as Pub/Sub's."""
    assert [each.name for each in want(dead_letter={"topic": "failed"}).subscriptions][1:] == [
        "projects/p/subscriptions/requests-dead-letters-hold",
        "projects/p/subscriptions/failed-hold",
    ]
    assert len(want(dead_letter={"topic": "requests-dead-letters"}).subscriptions) == 2


def test_a_dead_letter_policy_can_be_done_without() -> None:
    """Empty text: no topic, no hold, no attempts, and nothing that the service agent needs."""
    wanted = want(setup={"dead_letter_topic": ""})
    (request,) = wanted.subscriptions
    assert (request.policy[Field.DEAD_LETTER_TOPIC], request.policy[Field.MAX_DELIVERY_ATTEMPTS]) == (None, None)
    assert all(need.member is not None for need in wanted.needs)


def test_the_roles_are_the_fewest() -> None:
    """Two of Pub/Sub's agent, two or three of the worker, none on a project."""
    needs = {(need.resource.rpartition("/")[2], need.role, need.member) for need in want().needs}
    assert needs == {
        ("requests-dead-letters", PUBLISHER, None),
        ("worker", SUBSCRIBER, None),
        ("worker", SUBSCRIBER, WORKER),
        ("worker", VIEWER, WORKER),
        ("responses", PUBLISHER, WORKER),
    }
    sections: dict[str, Any] = {
        "pubsub": {"max_delivery_attempts": 20},
        "dead_letter": {"topic": "failed"},
        "setup": {"worker_member": "serviceAccount:w@p"},
    }
    workers = {(need.resource.rpartition("/")[2], need.role) for need in want(**sections).needs if need.member}
    assert workers == {("worker", SUBSCRIBER), ("responses", PUBLISHER), ("failed", PUBLISHER)}


def test_the_control_topic_keeps_what_workers_remember() -> None:
    """Within what Pub/Sub allows; the permissions are those of the topic's project, the role on it the worker's."""
    for remembered, kept in ((86_400.0, 86_400.0), (5.0, 600.0)):
        wanted = want(pubsub={"control_topic": "projects/q/topics/c", "control_remember_s": remembered})
        assert wanted.topics[-1] == Topic("projects/q/topics/c", kept)
    assert wanted.control is not None
    assert (wanted.control.project, wanted.control.member) == ("q", WORKER)
    (need,) = [need for need in wanted.needs if need.resource == "projects/q/topics/c"]
    assert (need.role, need.permission, need.member) == (SUBSCRIBER, "pubsub.topics.attachSubscription", WORKER)


def test_batches_have_subscriptions_and_an_account_of_their_own() -> None:
    """Made where they are named; that to the dead letters belongs to the topic of their requests."""
    names = {"response_subscription": "answers", "dead_letter_subscription": "given-up"}
    wanted = want(batches=names)
    answers, given_up = wanted.subscriptions[1:3]
    assert (answers.topic, given_up.topic) == (RESPONSES, "projects/p/topics/requests-dead-letters")
    assert {answers.filter, given_up.filter} == {BATCH_FILTER}
    assert Field.DEAD_LETTER_TOPIC not in answers.policy, "an answer that cannot be stored waits"
    needs = {(need.resource.rpartition("/")[2], need.role) for need in wanted.needs if need.member == BATCHES}
    assert needs == {("requests", PUBLISHER), ("answers", SUBSCRIBER), ("given-up", SUBSCRIBER)}
    assert len(want(batches={"request_topic": "requests"}).subscriptions) == 2, "none is named"
    both = want(batches=names, pubsub={"control_topic": "control"})
    publishes = {
        need.resource.rpartition("/")[2] for need in both.needs if (need.role, need.member) == (PUBLISHER, BATCHES)
    }
    assert publishes == {"requests", "control"}


@pytest.mark.parametrize(
    ("sections", "fault"),
    [
        (
            {"setup": {"request_topic": ""}},
            "setup.request_topic: is required by setup (WORKER_SETUP__REQUEST_TOPIC), since",
        ),
        ({"setup": {"minimum_backoff_s": 20, "maximum_backoff_s": 19}}, "setup.minimum_backoff_s: must not exceed"),
        ({"pubsub": {"max_delivery_attempts": 21}}, "pubsub.max_delivery_attempts: 21 exceeds"),
        ({"setup": {"request_topic": "responses"}}, "setup.request_topic: must not be"),
        ({"setup": {"dead_letter_topic": "requests"}}, "setup.dead_letter_topic: must not be"),
        ({"setup": {"dead_letter_topic": "responses"}}, "setup.dead_letter_topic: must not be"),
        ({"dead_letter": {"topic": "requests"}}, "dead_letter.topic: must not be"),
        ({"dead_letter": {"topic": "responses"}}, "dead_letter.topic: must not be"),
        ({"setup": {"response_subscription": "worker"}}, "setup.response_subscription: must not be"),
        ({"pubsub": {"control_topic": "requests"}}, "pubsub.control_topic: must not be"),
        ({"pubsub": {"control_topic": "responses"}}, "pubsub.control_topic: must not be"),
        ({"pubsub": {"control_topic": "requests-dead-letters"}}, "pubsub.control_topic: must not be"),
        ({"batches": {"response_subscription": "worker"}}, "batches.response_subscription: must not be"),
        (
            {"batches": {"response_subscription": "c"}, "setup": {"response_subscription": "c"}},
            "batches.response_subscription: must not be",
        ),
        (
            {"batches": {"response_subscription": "c", "dead_letter_subscription": "c"}},
            "batches.dead_letter_subscription: must not be",
        ),
        (
            {"batches": {"response_subscription": "c", "request_topic": "others"}},
            "batches.request_topic: no subscription of the worker belongs to projects/p/topics/others",
        ),
        (
            {
                "batches": {"response_subscription": "c", "dead_letter_subscription": "d"},
                "setup": {"dead_letter_topic": ""},
            },
            "batches.dead_letter_subscription: needs one dead-letter topic",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_work_is_refused(sections: dict[str, Any], fault: str) -> None:
    """A topic that feeds itself, or numbers against each other, are faults of the settings and name their key."""
    with pytest.raises(SettingsError) as caught:
        want(**sections)
    assert any(each.startswith(fault) for each in caught.value.faults)


@pytest.mark.parametrize(
    "setup",
    [
        {"ack_deadline_s": 9},
        {"ack_deadline_s": 601},
        {"retention_s": 599},
        {"retention_s": 2_678_401},
        {"maximum_backoff_s": 601},
        {"max_delivery_attempts": 4},
        {"max_delivery_attempts": 101},
        {"request_topic": "projects/p/subscriptions/s"},
        {"worker_member": 'x" && rm'},
    ],
    ids=str,
)
def test_what_pubsub_would_refuse_is_refused_before(setup: dict[str, Any]) -> None:
    """The bounds are the service's, so that nothing fails half-way; a member must be fit for a shell command."""
    with pytest.raises(ValueError, match=next(iter(setup))):
        Settings.model_validate({"setup": setup})
