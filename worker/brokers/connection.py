"""
One connection to Pub/Sub: names, credentials, channels, and what is asked or made over them at start.

The real service, Google's emulator and the embedded server are reached by the same code.  With an emulator the client
library opens a bare channel whose receive limit is gRPC's 4 MB: one larger response and the stream reopens for ever,
with nothing in the logs.  So channels are made here, without that limit.

The checks: `TestIamPermissions` needs no permission of its own, so it is asked first; servers without IAM (the
emulators) are asked for the resource itself.  What cannot be found out is not an error: the first pull or
publish tells.

A worker creates nothing in Google Cloud, where infrastructure is declared (deploy/); `create_local_resources` is for
local runs, whose embedded server starts empty.
"""

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import grpc
import msgspec
from google.protobuf import duration_pb2

from worker.brokers.group import SubscriberGroup
from worker.brokers.messages import (
    DeadLetterPolicy,
    GetSubscriptionRequest,
    GetTopicRequest,
    RetryPolicy,
    Subscription,
    TestIamPermissionsRequest,
    TestIamPermissionsResponse,
    Topic,
)
from worker.brokers.publisher import PubSubPublisher
from worker.brokers.subscriber import SETTLE_S, PubSubSubscriber
from worker.errors import BrokerResourceError, SettingsError
from worker.ports import Subscriber
from worker.settings.schema import PubSubSettings
from worker.telemetry.logs import get_logger
from worker.telemetry.metrics import Metrics
from worker.wire.control import CancelRequest

if TYPE_CHECKING:
    from worker.brokers.control import ControlListener

HOST = "pubsub.googleapis.com"
SCOPES = ("https://www.googleapis.com/auth/pubsub",)
OPTIONS = [
    ("grpc.max_reconnect_backoff_ms", 3_000),  # gRPC's own two minutes would outlast most outages
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_metadata_size", 4 * 1024 * 1024),  # ErrorInfo of exactly-once acks names every ack id
]
KEEPALIVE = [("grpc.keepalive_time_ms", 30_000)]
"""The value of Google's client, for the real service only: gRPC servers that are not told otherwise, emulators among
them, answer pings this frequent with `too_many_pings` and end the connection."""
EMULATOR_KEEPALIVE = [("grpc.keepalive_time_ms", 310_000)]
"""Just above the five minutes that such servers allow, so that a connection whose peer is gone without a word ends at
last (https://github.com/grpc/grpc/blob/master/doc/keepalive.md)."""


class Names(msgspec.Struct, frozen=True):
    """Full resource names."""

    subscription: str
    """The first one, where there are several."""
    topic: str
    several: tuple[str, ...] = ()
    """All of them in the order of the settings, where there are several."""

    @property
    def subscriptions(self) -> tuple[str, ...]:
        """All of them, in the order of the settings."""
        return self.several or (self.subscription,)


def resolve(settings: PubSubSettings) -> tuple[Names, Any]:
    """
    Return the full names, and the credentials (`None` for an emulator).

    May ask the metadata server, so it blocks: call it in a thread.

    Raises:
        SettingsError: No credentials, or no project to complete a short name with; permanent.
    """
    credentials, project = None, settings.project_id
    if settings.emulator_host is None:
        import google.auth  # noqa: PLC0415 - of the real service, like the channels' helpers: 0.1 s of CPU
        from google.auth.exceptions import DefaultCredentialsError  # noqa: PLC0415

        try:
            credentials, found = google.auth.default(scopes=SCOPES)
        except DefaultCredentialsError as error:
            raise SettingsError([f"no Google Cloud credentials: {str(error).splitlines()[0]}"]) from error
        project = project or found
    elif project is None:
        project = "local"
    pulled = [_full(source.request_subscription, "subscriptions", project) for source in settings.sources()]
    return Names(
        pulled[0], _full(settings.response_topic, "topics", project), tuple(pulled) if settings.subscriptions else ()
    ), credentials


def expire(credentials: Any) -> None:
    """
    Have the next call fetch a new token: the library keeps one until its time is over, also one that was revoked.

    Credentials without a token of their own, and none, are left alone.
    """
    if getattr(credentials, "token", None) is not None:
        credentials.token = None


def source_of(subscription: str) -> str:
    """Return what messages of a subscription have as their `source`, of several: its id."""
    return subscription.rpartition("/")[2]


def full_topic(name: str, settings: PubSubSettings, like: Names) -> str:
    """Return the full name of another topic in the project of the response topic."""
    return _full(name, "topics", settings.project_id or like.topic.split("/")[1])


def _full(name: str, collection: str, project: str | None) -> str:
    if name.startswith("projects/"):
        return name
    if project is None:
        raise SettingsError(["pubsub.project_id: is required, the credentials name no project"])
    return f"projects/{project}/{collection}/{name}"


def async_channel(settings: PubSubSettings, credentials: Any) -> grpc.aio.Channel:
    """Return a channel bound to the running event loop."""
    if settings.emulator_host is not None:
        return grpc.aio.insecure_channel(settings.emulator_host, options=[*OPTIONS, *EMULATOR_KEEPALIVE])
    from google.api_core import grpc_helpers_async  # noqa: PLC0415

    channel: grpc.aio.Channel = grpc_helpers_async.create_channel(
        f"{HOST}:443", credentials=credentials, default_scopes=SCOPES, scopes=SCOPES, options=[*OPTIONS, *KEEPALIVE]
    )
    return channel


TIMEOUT_S = 10.0
_TEST = "/google.iam.v1.IAMPolicy/TestIamPermissions"
_GET = {
    "topics": ("/google.pubsub.v1.Publisher/GetTopic", GetTopicRequest, Topic, "topic"),
    "subscriptions": (
        "/google.pubsub.v1.Subscriber/GetSubscription",
        GetSubscriptionRequest,
        Subscription,
        "subscription",
    ),
}
_WANTED = {
    "topics": ("pubsub.topics.publish", "roles/pubsub.publisher"),
    "subscriptions": ("pubsub.subscriptions.consume", "roles/pubsub.subscriber"),
}

_log = get_logger("broker")


async def check_resource(channel: grpc.aio.Channel, name: str) -> bool:
    """
    Check that a topic can be published to, or a subscription pulled from.

    Args:
        channel: Open.
        name: Full resource name.

    Returns:
        Whether that is certain; if not, the first pull or publish will tell.

    Raises:
        BrokerResourceError: It does not exist or is not permitted; permanent until an operator acts.
        ConnectionError: Pub/Sub cannot be reached; retryable.

    Cancellation: leaves nothing behind.
    """
    kind = name.split("/")[2]
    permission, role = _WANTED[kind]
    request = TestIamPermissionsRequest(resource=name, permissions=[permission])
    try:
        answer = await _call(channel, _TEST, request, TestIamPermissionsResponse, f"resource={name}")
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.UNIMPLEMENTED:
            _judge(error, name, permission, role)
            return False
        return await _check_exists(channel, name, kind)
    if permission not in answer.permissions:
        raise BrokerResourceError(f"{name}: {permission} is not granted; {role} has it")
    return True


async def _check_exists(channel: grpc.aio.Channel, name: str, kind: str) -> bool:
    method, request_type, answer_type, field = _GET[kind]
    try:
        await _call(channel, method, request_type(**{field: name}), answer_type, f"{field}={name}")
    except grpc.aio.AioRpcError as error:
        permission, role = _WANTED[kind]
        _judge(error, name, permission, role)
        return False
    return True


async def _call(channel: grpc.aio.Channel, method: str, request: Any, answer_type: Any, params: str) -> Any:
    call = channel.unary_unary(
        method, request_serializer=type(request).SerializeToString, response_deserializer=answer_type.FromString
    )
    return await call(request, timeout=TIMEOUT_S, metadata=(("x-goog-request-params", params),))


def _judge(error: grpc.aio.AioRpcError, name: str, permission: str, role: str) -> None:
    code, text = error.code(), error.details() or ""
    kind = name.split("/")[2].removesuffix("s")
    if code is grpc.StatusCode.NOT_FOUND:
        raise BrokerResourceError(
            f"the {kind} {name} does not exist; create it with `inference-worker setup` or as in deploy/"
        ) from error
    if code is grpc.StatusCode.UNAUTHENTICATED:
        raise BrokerResourceError(f"{name}: the credentials are refused: {text}") from error
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        raise BrokerResourceError(f"{name}: is not a name Pub/Sub takes: {text}") from error
    if code is grpc.StatusCode.PERMISSION_DENIED:
        _log.info("permission_unchecked", resource=name, wanted=permission, role=role)
        return
    raise ConnectionError(f"{name}: {code.name}: {text}") from error


ACK_DEADLINE_S = 20
LOCAL_ATTEMPTS = 5
"""Delivery attempts of a local run: Pub/Sub's least, so that a line that fails for good is answered within a minute."""
LOCAL_BACKOFF_S = (1, 10)


class LocalNames(msgspec.Struct, frozen=True):
    """Full names of what a local run uses."""

    request_topic: str
    response_subscription: str


async def create_local_resources(channel: grpc.aio.Channel, project: str, requests: str, responses: str) -> LocalNames:
    """
    Create a topic and a subscription of the same name for requests and for responses, and a dead-letter topic.

    Raises:
        grpc.aio.AioRpcError: The server refused; permanent.

    Cancellation: some of them may exist.
    """
    for name in (requests, responses, "dead-letters"):
        topic = Topic(name=f"projects/{project}/topics/{name}")
        await _create_resource(channel, "/google.pubsub.v1.Publisher/CreateTopic", topic)
    backoff = RetryPolicy(
        minimum_backoff=duration_pb2.Duration(seconds=LOCAL_BACKOFF_S[0]),
        maximum_backoff=duration_pb2.Duration(seconds=LOCAL_BACKOFF_S[1]),
    )
    policy = DeadLetterPolicy(
        dead_letter_topic=f"projects/{project}/topics/dead-letters", max_delivery_attempts=LOCAL_ATTEMPTS
    )
    extra = {requests: {"retry_policy": backoff, "dead_letter_policy": policy}}
    for name in (requests, responses, "dead-letters"):
        subscription = Subscription(
            name=f"projects/{project}/subscriptions/{name}",
            topic=f"projects/{project}/topics/{name}",
            ack_deadline_seconds=ACK_DEADLINE_S,
            **extra.get(name, {}),
        )
        await _create_resource(channel, "/google.pubsub.v1.Subscriber/CreateSubscription", subscription)
    return LocalNames(f"projects/{project}/topics/{requests}", f"projects/{project}/subscriptions/{responses}")


async def _create_resource(channel: grpc.aio.Channel, method: str, resource: Any) -> None:
    call = channel.unary_unary(
        method, request_serializer=type(resource).SerializeToString, response_deserializer=type(resource).FromString
    )
    await call(resource, timeout=30, wait_for_ready=True)


class Broker:
    """
    Pub/Sub as the settings name it; make it with `connect`.

    Attributes:
        names: Full names of subscription and topic.
    """

    def __init__(self, settings: PubSubSettings, names: Names, credentials: Any) -> None:
        self.names = names
        self._settings = settings
        self._credentials = credentials
        self._channel = async_channel(settings, credentials)

    @classmethod
    async def connect(cls, settings: PubSubSettings) -> "Broker":
        """
        Find credentials and names; opens no connection yet.

        Raises:
            SettingsError: No credentials or no project; permanent.

        Cancellation: the search for credentials ends in its thread.
        """
        return cls(settings, *await asyncio.to_thread(resolve, settings))

    def full_topic(self, name: str) -> str:
        """Return the full name of a topic."""
        return full_topic(name, self._settings, self.names)

    def full_subscription(self, name: str) -> str:
        """Return the full name of a subscription."""
        return _full(name, "subscriptions", self._settings.project_id or self.names.topic.split("/")[1])

    def channel(self) -> grpc.aio.Channel:
        """Return a channel to the same place; the caller closes it."""
        return async_channel(self._settings, self._credentials)

    def publisher(self, topic: str | None = None) -> PubSubPublisher:
        """Return a publisher for a topic (short or full name), by default the response topic."""
        name = self.names.topic if topic is None else full_topic(topic, self._settings, self.names)
        return PubSubPublisher(async_channel(self._settings, self._credentials), name, self._settings.publish)

    def subscriber(self, metrics: Metrics, *, settle_s: float = SETTLE_S) -> Subscriber:
        """Return a subscriber to all request subscriptions, whose drain leaves the last acks `settle_s` seconds."""
        has_several = bool(self._settings.subscriptions)
        members = [
            PubSubSubscriber(
                async_channel(self._settings, self._credentials),
                name,
                source,
                metrics,
                settle_s=settle_s,
                renew_credentials=lambda: expire(self._credentials),
                source=source_of(name) if has_several else "",
            )
            for name, source in zip(self.names.subscriptions, self._settings.sources(), strict=True)
        ]
        return SubscriberGroup(members) if has_several else members[0]

    async def control(
        self, metrics: Metrics, on_cancel: Callable[[CancelRequest], None], remember_s: float
    ) -> "ControlListener | None":
        """
        Make this process's subscription to the control topic; `None` where the settings name none.

        Args:
            metrics: Counts control messages.
            on_cancel: Called with each cancellation once the listener runs.
            remember_s: How far back it listens.

        Raises:
            BrokerResourceError: The topic is missing, or making a subscription is refused; permanent.
            ConnectionError: Pub/Sub cannot be reached; retryable.

        Cancellation: the subscription may exist, and expires.
        """
        if self._settings.control_topic is None:
            return None
        from worker.brokers.control import (  # noqa: PLC0415 - 20 MB of Google's types, which most workers do without
            ControlListener,
            create,
            new_name,
        )

        topic = self.full_topic(self._settings.control_topic)
        name = new_name(topic)
        await create(self._channel, name, topic, since=time.time() - remember_s)
        subscriber = PubSubSubscriber(self.channel(), name, self._settings, Metrics(), settle_s=0.0)
        return ControlListener(self.channel(), subscriber, on_cancel, metrics)

    async def check(self) -> bool:
        """
        Check that subscription and topic are there and ours to use; return whether the subscription's part is certain.

        Raises:
            BrokerResourceError: One is missing or refused; permanent.
            ConnectionError: Pub/Sub cannot be reached; retryable.

        Cancellation: leaves nothing behind.
        """
        is_certain = [await check_resource(self._channel, name) for name in self.names.subscriptions]
        await check_resource(self._channel, self.names.topic)
        return all(is_certain)

    async def check_topic(self, name: str) -> None:
        """Check that a topic, short or full, can be published to; see `check_resource`, also for cancellation."""
        await check_resource(self._channel, self.full_topic(name))

    async def create_local(self, project: str, requests: str, responses: str) -> LocalNames:
        """Create what a local run needs in the embedded server; see `create_local_resources`, also for cancellation."""
        return await create_local_resources(self._channel, project, requests, responses)

    async def aclose(self) -> None:
        """
        Close the channel of the checks; publishers and subscribers close their own.

        Cancellation: the channel is closed all the same.
        """
        await self._channel.close(None)
