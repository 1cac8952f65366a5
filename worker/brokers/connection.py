"""
Channels to Pub/Sub: the real service, Google's emulator or the embedded server, by the same code.

With an emulator the client library opens a bare channel whose receive limit is gRPC's 4 MB: one larger response and
the stream reopens for ever, with nothing in the logs.  So both kinds of channel are made here, without that limit.
"""

import json
from dataclasses import dataclass
from typing import Any

import google.auth
import grpc
from google.api_core import grpc_helpers, grpc_helpers_async
from google.auth.exceptions import DefaultCredentialsError

from worker.errors import SettingsError
from worker.settings.schema import PubSubSettings

HOST = "pubsub.googleapis.com"
SCOPES = ("https://www.googleapis.com/auth/pubsub",)
_PULL = {"service": "google.pubsub.v1.Subscriber", "method": "StreamingPull"}
_WAITING = json.dumps({"methodConfig": [{"name": [_PULL], "waitForReady": True}]})
"""A pull waits for a connection instead of failing without one: the client library allows five failures in ten seconds
and would sleep through the broker's return
(https://github.com/grpc/grpc/blob/master/doc/service_config.md, https://github.com/grpc/grpc/blob/master/doc/wait-for-ready.md)."""
OPTIONS = [
    ("grpc.service_config", _WAITING),
    ("grpc.max_reconnect_backoff_ms", 3_000),  # gRPC's own two minutes would outlast most outages
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_metadata_size", 4 * 1024 * 1024),  # ErrorInfo of exactly-once acks names every ack id
]
KEEPALIVE = [("grpc.keepalive_time_ms", 30_000)]
"""The client library's own value, for the real service only: gRPC servers that are not told otherwise, emulators among
them, answer pings this frequent with `too_many_pings` and end the connection."""


@dataclass(frozen=True, slots=True)
class Names:
    """Full resource names."""

    subscription: str
    topic: str


def resolve(settings: PubSubSettings) -> tuple[Names, Any]:
    """
    Return the full names, and the credentials (`None` for an emulator).

    May ask the metadata server, so it blocks: call it in a thread.

    Raises:
        SettingsError: No credentials, or no project to complete a short name with; permanent.
    """
    credentials, project = None, settings.project_id
    if settings.emulator_host is None:
        try:
            credentials, found = google.auth.default(scopes=SCOPES)
        except DefaultCredentialsError as error:
            raise SettingsError([f"no Google Cloud credentials: {str(error).splitlines()[0]}"]) from error
        project = project or found
    elif project is None:
        project = "local"
    names = (
        _full(settings.request_subscription, "subscriptions", project),
        _full(settings.response_topic, "topics", project),
    )
    return Names(*names), credentials


def full_topic(name: str, settings: PubSubSettings, like: Names) -> str:
    """Return the full name of another topic in the project of the response topic."""
    return _full(name, "topics", settings.project_id or like.topic.split("/")[1])


def _full(name: str, collection: str, project: str | None) -> str:
    if name.startswith("projects/"):
        return name
    if project is None:
        raise SettingsError(["pubsub.project_id: is required, the credentials name no project"])
    return f"projects/{project}/{collection}/{name}"


def sync_channel(settings: PubSubSettings, credentials: Any) -> grpc.Channel:
    """Return a channel for the high-level subscriber client."""
    if settings.emulator_host is not None:
        return grpc.insecure_channel(settings.emulator_host, options=OPTIONS)
    channel: grpc.Channel = grpc_helpers.create_channel(
        f"{HOST}:443", credentials=credentials, default_scopes=SCOPES, scopes=SCOPES, options=[*OPTIONS, *KEEPALIVE]
    )
    return channel


def async_channel(settings: PubSubSettings, credentials: Any) -> grpc.aio.Channel:
    """Return a channel bound to the running event loop."""
    if settings.emulator_host is not None:
        return grpc.aio.insecure_channel(settings.emulator_host, options=OPTIONS)
    channel: grpc.aio.Channel = grpc_helpers_async.create_channel(
        f"{HOST}:443", credentials=credentials, default_scopes=SCOPES, scopes=SCOPES, options=[*OPTIONS, *KEEPALIVE]
    )
    return channel
