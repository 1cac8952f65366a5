"""
Settings of `inference-worker setup`: what it creates around the subscription and the topic of `pubsub`.

Part of `worker.settings.schema`, which says how they are read; nothing else imports this module.  The running worker
reads none of it.  Bounds are the service's own
(https://cloud.google.com/pubsub/docs/reference/rest/v1/projects.subscriptions).
"""

from typing import Annotated

from pydantic import Field

from worker.settings.backend import Section

DAY_S = 86_400
MAX_RETENTION_S = 31 * DAY_S

SubscriptionName = Annotated[str, Field(pattern=r"^(?:[^/\s]*|projects/[^/\s]+/subscriptions/[^/\s]+)$")]
TopicName = Annotated[str, Field(pattern=r"^(?:[^/\s]*|projects/[^/\s]+/topics/[^/\s]+)$")]
Retention = Annotated[int, Field(ge=600, le=MAX_RETENTION_S)]
Backoff = Annotated[float, Field(ge=0, le=600)]


class SetupSettings(Section):
    """What `inference-worker setup` creates, for those without Terraform; the worker itself does not read it."""

    request_topic: TopicName | None = None
    """Topic that requests are published to.  Default: the request subscription's id without a `-worker` at its end;
    `setup` asks for one where it has none."""
    response_subscription: SubscriptionName | None = None
    """A subscription to the response topic, for whoever collects the answers; `null`: none is made."""
    dead_letter_topic: TopicName | None = None
    """Where Pub/Sub puts what was delivered `max_delivery_attempts` times.  Default: the request topic's id with
    `-dead-letters`; empty text: no dead-letter policy.  It gets a subscription named like it, with `-hold`: without one
    the messages would be gone."""
    dead_letter_retention_s: Retention = MAX_RETENTION_S
    """How long the hold subscriptions keep what nobody has looked at; 31 days is the longest Pub/Sub has."""
    max_delivery_attempts: Annotated[int, Field(ge=5, le=100)] = 20
    """Deliveries before a message is dead-lettered.  Every handing back costs one, also a Spot eviction's; the worker
    answers the last one itself."""
    minimum_backoff_s: Backoff = 10
    """First wait before a message that was handed back comes again."""
    maximum_backoff_s: Backoff = 600
    """Longest such wait."""
    ack_deadline_s: Annotated[int, Field(ge=10, le=600)] = 60
    """How long the messages of a killed worker stay away; a living one extends its leases by itself."""
    retention_s: Retention = 7 * DAY_S
    """How long a message that is not acked is kept."""
    worker_member: Annotated[str, Field(pattern=r"^[^\s'\"$`]*$")] = ""
    """Who the worker is, as IAM writes it (`serviceAccount:…`, `principal://…`): `setup` then says which of its roles
    are missing.  Empty: the credentials that run `setup` are looked at instead."""
