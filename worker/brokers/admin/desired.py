"""What the settings want of Pub/Sub: topics, subscriptions and roles, by full names.  Pure."""

from dataclasses import dataclass

from worker.brokers.admin.iam import PUBLISHER, SUBSCRIBER, VIEWER, Need
from worker.brokers.admin.resources import Field, Policy, Subscription
from worker.errors import SettingsError
from worker.settings.schema import Settings

PLACEHOLDER = "WORKER_MEMBER"
"""Stands in a printed command for the worker's account, where the settings do not name it."""

SUFFIX = "-worker"
"""By which the subscription of a topic is known to be ours, in Terraform's names as well (deploy/terraform)."""


@dataclass(frozen=True, slots=True)
class Desired:
    """The infrastructure that the settings describe; full names."""

    topics: tuple[str, ...]
    subscriptions: tuple[Subscription, ...]
    needs: tuple[Need, ...]


@dataclass(frozen=True, slots=True)
class _Names:
    """Full names; `None` for what is not wanted."""

    requests: str
    pulled: str
    responses: str
    collected: str | None
    dead: str | None
    copies: str | None


def desired_by(settings: Settings, *, subscription: str, topic: str) -> Desired:
    """
    Return what the settings want.

    Args:
        settings: In force.
        subscription: Full name of the request subscription; other short names are completed with its project, unless
            `pubsub.project_id` names one.
        topic: Full name of the response topic.

    Raises:
        SettingsError: Names or numbers cannot work together; permanent.
    """
    _refuse(_faults(settings, subscription))
    names = _complete(settings, subscription, topic)
    _refuse(_clashes(names))
    dead_letters = tuple(dict.fromkeys(name for name in (names.dead, names.copies) if name is not None))
    topics = (names.requests, names.responses, *dead_letters)
    return Desired(topics, _subscriptions(settings, names, dead_letters), _needs(settings, names))


def _complete(settings: Settings, subscription: str, topic: str) -> _Names:
    setup, copies = settings.setup, settings.dead_letter.topic
    project = settings.pubsub.project_id or subscription.split("/")[1]
    requests = _full(setup.request_topic, "topics", project) if setup.request_topic else _topic_of(subscription)
    dead = f"{requests}-dead-letters" if setup.dead_letter_topic is None else setup.dead_letter_topic
    collected = setup.response_subscription
    return _Names(
        requests=requests,
        pulled=subscription,
        responses=topic,
        collected=_full(collected, "subscriptions", project) if collected else None,
        dead=_full(dead, "topics", project) if dead else None,
        copies=_full(copies, "topics", project) if copies else None,
    )


def _topic_of(subscription: str) -> str:
    """Return the topic in the subscription's project whose id is its own without the suffix; empty without one."""
    _, project, _, short = subscription.split("/")
    topic = short.removesuffix(SUFFIX)
    return f"projects/{project}/topics/{topic}" if topic not in {"", short} else ""


def _full(name: str, collection: str, project: str) -> str:
    return name if name.startswith("projects/") else f"projects/{project}/{collection}/{name}"


def _subscriptions(settings: Settings, names: _Names, dead_letters: tuple[str, ...]) -> tuple[Subscription, ...]:
    setup = settings.setup
    kept: Policy = {Field.ACK_DEADLINE: setup.ack_deadline_s, Field.RETENTION: setup.retention_s, Field.EXPIRY: None}
    held: Policy = {**kept, Field.RETENTION: setup.dead_letter_retention_s}
    retried: Policy = {
        **kept,
        Field.MINIMUM_BACKOFF: setup.minimum_backoff_s,
        Field.MAXIMUM_BACKOFF: setup.maximum_backoff_s,
        Field.DEAD_LETTER_TOPIC: names.dead,
        Field.MAX_DELIVERY_ATTEMPTS: setup.max_delivery_attempts if names.dead else None,
    }
    subscriptions = [Subscription(names.pulled, names.requests, retried)]
    if names.collected is not None:
        subscriptions.append(Subscription(names.collected, names.responses, kept))
    return (*subscriptions, *(Subscription(_hold(topic), topic, held) for topic in dead_letters))


def _hold(topic: str) -> str:
    """Return the subscription that keeps what comes to a dead-letter topic: named like it, in its project."""
    _, project, _, short = topic.split("/")
    return f"projects/{project}/subscriptions/{short}-hold"


def _needs(settings: Settings, names: _Names) -> tuple[Need, ...]:
    project, worker = names.pulled.split("/")[1], settings.setup.worker_member or PLACEHOLDER
    needs = []
    if names.dead is not None:
        needs += [
            Need(names.dead, PUBLISHER, None, project, "to dead-letter anything"),
            Need(names.pulled, SUBSCRIBER, None, project, "to dead-letter anything"),
        ]
    needs += [
        Need(names.pulled, SUBSCRIBER, worker, project, "to pull requests"),
        Need(names.responses, PUBLISHER, worker, project, "to publish answers"),
    ]
    if settings.pubsub.max_delivery_attempts == "auto":
        needs.append(Need(names.pulled, VIEWER, worker, project, "to read its number of delivery attempts"))
    if names.copies is not None:
        needs.append(Need(names.copies, PUBLISHER, worker, project, "to publish copies of what failed"))
    return tuple(needs)


def _refuse(faults: list[str]) -> None:
    if faults:
        raise SettingsError(faults)


def _faults(settings: Settings, subscription: str) -> list[str]:
    setup, attempts = settings.setup, settings.pubsub.max_delivery_attempts
    faults = []
    if not setup.request_topic and not _topic_of(subscription):
        faults.append(
            f"setup.request_topic: is required by setup (WORKER_SETUP__REQUEST_TOPIC), since the name {subscription} "
            f"does not end with {SUFFIX}"
        )
    if setup.minimum_backoff_s > setup.maximum_backoff_s:
        faults.append("setup.minimum_backoff_s: must not exceed setup.maximum_backoff_s")
    if attempts != "auto" and attempts > setup.max_delivery_attempts:
        faults.append(
            f"pubsub.max_delivery_attempts: {attempts} exceeds setup.max_delivery_attempts "
            f"({setup.max_delivery_attempts}), so messages would be dead-lettered before the worker answers them"
        )
    return faults


def _clashes(names: _Names) -> list[str]:
    """Return one sentence for each pair that must not be the same; copies may share the dead-letter topic."""
    pairs = [
        ("setup.request_topic", names.requests, "pubsub.response_topic", names.responses),
        ("setup.dead_letter_topic", names.dead, "setup.request_topic", names.requests),
        ("setup.dead_letter_topic", names.dead, "pubsub.response_topic", names.responses),
        ("dead_letter.topic", names.copies, "setup.request_topic", names.requests),
        ("dead_letter.topic", names.copies, "pubsub.response_topic", names.responses),
        ("setup.response_subscription", names.collected, "pubsub.request_subscription", names.pulled),
    ]
    return [f"{key}: must not be {name}, which is {other}" for key, name, other, same in pairs if name == same]
