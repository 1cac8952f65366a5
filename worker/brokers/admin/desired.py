"""What the settings want of Pub/Sub: topics, subscriptions and roles, by full names.  Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from worker.brokers.admin.iam import PUBLISHER, SUBSCRIBER, VIEWER, Control, Need
from worker.brokers.admin.resources import Field, Policy, Subscription, Topic
from worker.errors import SettingsError
from worker.settings.schema import MAX_RETENTION_S, MIN_RETENTION_S, Settings

WORKER, BATCHES = "WORKER_MEMBER", "BATCHES_MEMBER"
PLACEHOLDERS = {WORKER: ("the worker", "setup.worker_member"), BATCHES: ("`batches serve`", "setup.batches_member")}
"""What stands in a printed command for an account that the settings do not name: whose it is, and the setting."""
BATCH_FILTER = 'hasPrefix(attributes.run_id, "batch_")'
"""The messages of the lines of batches (`worker.batches.lines`); the same as in deploy/terraform."""

SUFFIX = "-worker"
"""By which the subscription of a topic is known to be ours, in Terraform's names as well (deploy/terraform)."""


@dataclass(frozen=True, slots=True)
class Desired:
    """The infrastructure that the settings describe; full names."""

    topics: tuple[Topic, ...]
    subscriptions: tuple[Subscription, ...]
    needs: tuple[Need, ...]
    control: Control | None
    """Who hears the control topic; `None`: there is none."""


@dataclass(frozen=True, slots=True)
class _Pulled:
    """A subscription that the worker pulls from; full names."""

    name: str
    topic: str
    filter: str
    dead: str | None
    """Where its failed messages go; `None`: nowhere."""


@dataclass(frozen=True, slots=True)
class _Batches:
    """What the Files and Batches API uses; full names."""

    requests: str
    answers: str
    """Subscription to the answers to lines."""
    dead: str | None
    """Subscription to the lines that Pub/Sub has given up; `None`: not wanted."""


@dataclass(frozen=True, slots=True)
class _Names:
    """Full names; `None` for what is not wanted."""

    pulled: tuple[_Pulled, ...]
    responses: str
    collected: str | None
    copies: str | None
    control: str | None
    batches: "_Batches | None"

    @property
    def requests(self) -> tuple[str, ...]:
        """Topics of requests, each once."""
        return tuple(dict.fromkeys(each.topic for each in self.pulled))

    def dead_of(self, requests: str) -> tuple[str, ...]:
        """Return the dead-letter topics of those that pull from a topic, each once."""
        found = (each.dead for each in self.pulled if each.topic == requests and each.dead is not None)
        return tuple(dict.fromkeys(found))

    @property
    def dead(self) -> tuple[str, ...]:
        """Dead-letter topics of Pub/Sub's own, each once."""
        return tuple(dict.fromkeys(each.dead for each in self.pulled if each.dead is not None))


def desired_by(settings: Settings, *, subscriptions: Sequence[str], topic: str) -> Desired:
    """
    Return what the settings want.

    Args:
        settings: In force.
        subscriptions: Full names of the request subscriptions, in the order of the settings; other short names are
            completed with the project of the first, unless `pubsub.project_id` names one.
        topic: Full name of the response topic.

    Raises:
        SettingsError: Names or numbers cannot work together; permanent.
    """
    project = settings.pubsub.project_id or subscriptions[0].split("/")[1]
    topics = [_request_topic(settings, number, name, project) for number, name in enumerate(subscriptions)]
    _refuse(_faults(settings, [name for name, topic in zip(subscriptions, topics, strict=True) if not topic]))
    names = _complete(settings, subscriptions, topics, topic, project)
    _refuse([*_clashes(names), *_batch_faults(names)])
    dead_letters = tuple(dict.fromkeys((*names.dead, *([names.copies] if names.copies is not None else []))))
    wanted = [Topic(each) for each in (*names.requests, names.responses, *dead_letters)]
    control = None
    if names.control is not None:
        kept_s = min(max(settings.pubsub.control_remember_s, MIN_RETENTION_S), MAX_RETENTION_S)
        wanted.append(Topic(names.control, kept_s))
        control = Control(names.control.split("/")[1], settings.setup.worker_member or WORKER)
    return Desired(tuple(wanted), _subscriptions(settings, names, dead_letters), _needs(settings, names), control)


def _request_topic(settings: Settings, number: int, subscription: str, project: str) -> str:
    """Return the topic of a request subscription, as it or all of them name it, or by its name; empty without any."""
    several = settings.pubsub.subscriptions
    named = (several[number].topic if several else None) or settings.setup.request_topic
    return _full(named, "topics", project) if named else _topic_of(subscription)


def _complete(
    settings: Settings, subscriptions: Sequence[str], topics: Sequence[str], responses: str, project: str
) -> _Names:
    setup, copies, control = settings.setup, settings.dead_letter.topic, settings.pubsub.control_topic
    collected, several = setup.response_subscription, settings.pubsub.subscriptions
    pulled = []
    for number, (name, requests) in enumerate(zip(subscriptions, topics, strict=True)):
        dead = f"{requests}-dead-letters" if setup.dead_letter_topic is None else setup.dead_letter_topic
        filter_ = several[number].filter if several else ""
        pulled.append(_Pulled(name, requests, filter_, _full(dead, "topics", project) if dead else None))
    return _Names(
        pulled=tuple(pulled),
        responses=responses,
        collected=_full(collected, "subscriptions", project) if collected else None,
        copies=_full(copies, "topics", project) if copies else None,
        control=_full(control, "topics", project) if control else None,
        batches=_batches(settings, pulled, project),
    )


def _batches(settings: Settings, pulled: Sequence[_Pulled], project: str) -> _Batches | None:
    """Return what the Batches API uses; `None` where the settings name no subscription of its own."""
    batches = settings.batches
    if not batches.response_subscription:
        return None
    dead = batches.dead_letter_subscription
    return _Batches(
        requests=_full(batches.request_topic, "topics", project) if batches.request_topic else pulled[0].topic,
        answers=_full(batches.response_subscription, "subscriptions", project),
        dead=_full(dead, "subscriptions", project) if dead else None,
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
    subscriptions = []
    for pulled in names.pulled:
        retried: Policy = {
            **kept,
            Field.MINIMUM_BACKOFF: setup.minimum_backoff_s,
            Field.MAXIMUM_BACKOFF: setup.maximum_backoff_s,
            Field.DEAD_LETTER_TOPIC: pulled.dead,
            Field.MAX_DELIVERY_ATTEMPTS: setup.max_delivery_attempts if pulled.dead else None,
        }
        subscriptions.append(Subscription(pulled.name, pulled.topic, retried, pulled.filter))
    if names.collected is not None:
        subscriptions.append(Subscription(names.collected, names.responses, kept))
    if (batches := names.batches) is not None:
        subscriptions.append(Subscription(batches.answers, names.responses, kept, BATCH_FILTER))
        if batches.dead is not None:
            subscriptions.append(Subscription(batches.dead, names.dead_of(batches.requests)[0], kept, BATCH_FILTER))
    return (*subscriptions, *(Subscription(_hold(topic), topic, held) for topic in dead_letters))


def _hold(topic: str) -> str:
    """Return the subscription that keeps what comes to a dead-letter topic: named like it, in its project."""
    _, project, _, short = topic.split("/")
    return f"projects/{project}/subscriptions/{short}-hold"


def _needs(settings: Settings, names: _Names) -> tuple[Need, ...]:
    project = names.pulled[0].name.split("/")[1]
    worker, api = settings.setup.worker_member or WORKER, settings.setup.batches_member or BATCHES
    needs = [Need(dead, PUBLISHER, None, project, "to dead-letter anything") for dead in names.dead]
    needs += [
        Need(each.name, SUBSCRIBER, None, project, "to dead-letter anything")
        for each in names.pulled
        if each.dead is not None
    ]
    needs += [Need(each.name, SUBSCRIBER, worker, project, "to pull requests") for each in names.pulled]
    needs.append(Need(names.responses, PUBLISHER, worker, project, "to publish answers"))
    if settings.pubsub.max_delivery_attempts == "auto":
        needs += [
            Need(each.name, VIEWER, worker, project, "to read its number of delivery attempts") for each in names.pulled
        ]
    if names.copies is not None:
        needs.append(Need(names.copies, PUBLISHER, worker, project, "to publish copies of what failed"))
    if names.control is not None:
        needs.append(Need(names.control, SUBSCRIBER, worker, project, "to make a subscription to it"))
    if (batches := names.batches) is not None:
        needs.append(Need(batches.requests, PUBLISHER, api, project, "to publish lines of batches"))
        needs.append(Need(batches.answers, SUBSCRIBER, api, project, "to read their answers"))
        if names.control is not None:
            needs.append(Need(names.control, PUBLISHER, api, project, "to tell workers of cancelled batches"))
        if batches.dead is not None:
            needs.append(Need(batches.dead, SUBSCRIBER, api, project, "to read those that were given up"))
    return tuple(needs)


def _refuse(faults: list[str]) -> None:
    if faults:
        raise SettingsError(faults)


def _faults(settings: Settings, without_topic: Sequence[str]) -> list[str]:
    setup, attempts = settings.setup, settings.pubsub.max_delivery_attempts
    faults = [
        f"setup.request_topic: is required by setup (WORKER_SETUP__REQUEST_TOPIC), since the name {subscription} "
        f"does not end with {SUFFIX}"
        for subscription in without_topic
    ]
    if setup.minimum_backoff_s > setup.maximum_backoff_s:
        faults.append("setup.minimum_backoff_s: must not exceed setup.maximum_backoff_s")
    if attempts != "auto" and attempts > setup.max_delivery_attempts:
        faults.append(
            f"pubsub.max_delivery_attempts: {attempts} exceeds setup.max_delivery_attempts "
            f"({setup.max_delivery_attempts}), so messages would be dead-lettered before the worker answers them"
        )
    return faults


def _batch_faults(names: _Names) -> list[str]:
    """Return one sentence for each name of the Batches API that leads nowhere."""
    batches = names.batches
    if batches is None:
        return []
    if batches.requests not in names.requests:
        return [f"batches.request_topic: no subscription of the worker belongs to {batches.requests}"]
    if batches.dead is not None and len(names.dead_of(batches.requests)) != 1:
        return [f"batches.dead_letter_subscription: needs one dead-letter topic of the requests in {batches.requests}"]
    return []


def _clashes(names: _Names) -> list[str]:
    """Return one sentence for each pair that must not be the same; copies may share the dead-letter topic."""
    pulled = "pubsub.subscriptions" if len(names.pulled) > 1 else "pubsub.request_subscription"
    pairs: list[tuple[str, str | None, str, str]] = []
    for requests in names.requests:
        pairs.append(("setup.request_topic", requests, "pubsub.response_topic", names.responses))
        pairs += [("setup.dead_letter_topic", dead, "setup.request_topic", requests) for dead in names.dead]
    pairs += [("setup.dead_letter_topic", dead, "pubsub.response_topic", names.responses) for dead in names.dead]
    pairs += [("dead_letter.topic", names.copies, "setup.request_topic", requests) for requests in names.requests]
    pairs.append(("dead_letter.topic", names.copies, "pubsub.response_topic", names.responses))
    pairs += [("setup.response_subscription", names.collected, pulled, each.name) for each in names.pulled]
    for topic, key in [(each, "setup.request_topic") for each in names.requests] + [
        (names.responses, "pubsub.response_topic"),
        *((each, "setup.dead_letter_topic") for each in names.dead),
    ]:
        pairs.append(("pubsub.control_topic", names.control, key, topic))
    if (batches := names.batches) is not None:
        answers = "batches.response_subscription"
        pairs += [(answers, batches.answers, pulled, each.name) for each in names.pulled]
        pairs.append((answers, batches.answers, "setup.response_subscription", names.collected or ""))
        pairs.append(("batches.dead_letter_subscription", batches.dead, answers, batches.answers))
    return [f"{key}: must not be {name}, which is {other}" for key, name, other, same in pairs if name == same]
