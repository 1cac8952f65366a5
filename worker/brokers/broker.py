"""
One connection to Pub/Sub: names, credentials, and the channels that publishers and subscribers are made on.

What the rest of the program sees of this package beside the ports.
"""

import asyncio
from typing import Any

from worker.brokers.checks import check_resource
from worker.brokers.connection import Names, async_channel, full_topic, resolve, sync_channel
from worker.brokers.publisher import PubSubPublisher
from worker.brokers.resources import LocalNames, create_local_resources
from worker.brokers.subscriber import SETTLE_S, PubSubSubscriber
from worker.settings.schema import PubSubSettings
from worker.telemetry.metrics import Metrics


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
        """
        return cls(settings, *await asyncio.to_thread(resolve, settings))

    def publisher(self, topic: str | None = None) -> PubSubPublisher:
        """Return a publisher for a topic (short or full name), by default the response topic."""
        name = self.names.topic if topic is None else full_topic(topic, self._settings, self.names)
        return PubSubPublisher(async_channel(self._settings, self._credentials), name, self._settings.publish)

    def subscriber(self, metrics: Metrics, *, settle_s: float = SETTLE_S) -> PubSubSubscriber:
        """Return a subscriber to the request subscription, whose drain leaves the last acks `settle_s` seconds."""
        channel = sync_channel(self._settings, self._credentials)
        return PubSubSubscriber(channel, self.names.subscription, self._settings, metrics, settle_s=settle_s)

    async def check(self) -> bool:
        """
        Check that subscription and topic are there and ours to use; return whether the subscription's part is certain.

        Raises:
            BrokerResourceError: One is missing or refused; permanent.
            ConnectionError: Pub/Sub cannot be reached; retryable.
        """
        is_certain = await check_resource(self._channel, self.names.subscription)
        await check_resource(self._channel, self.names.topic)
        return is_certain

    async def create_local(self, project: str, requests: str, responses: str) -> LocalNames:
        """Create what a local run needs in the embedded server; see `create_local_resources`."""
        return await create_local_resources(self._channel, project, requests, responses)

    async def aclose(self) -> None:
        """Close the channel of the checks; publishers and subscribers close their own."""
        await self._channel.close(None)
