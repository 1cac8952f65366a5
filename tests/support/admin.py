"""Topics, subscriptions and plain pulls over Google's generated stubs: what tests need beside the code under test."""

import time
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.api_core import exceptions
from google.cloud import pubsub_v1
from google.protobuf import duration_pb2
from google.pubsub_v1 import types
from google.pubsub_v1.services.publisher.transports import PublisherGrpcTransport
from google.pubsub_v1.services.subscriber.transports import SubscriberGrpcTransport

EMULATOR_POLL_S = 0.05
"""How often a stream of Google's emulator looks for messages, and at its subscription."""

OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


def seconds(value: float) -> duration_pb2.Duration:
    return duration_pb2.Duration(seconds=int(value), nanos=round((value % 1) * 1e9))


@dataclass
class Admin:
    """The administrator's side of one broker; every name it makes is new."""

    address: str
    project: str = "exam"
    _channels: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        channel = grpc.insecure_channel(self.address, options=OPTIONS)
        self._channels.append(channel)
        self.publisher = pubsub_v1.PublisherClient(
            transport=PublisherGrpcTransport(channel=channel),
            batch_settings=pubsub_v1.types.BatchSettings(max_latency=0.001),
        )
        self.subscriber = pubsub_v1.SubscriberClient(transport=SubscriberGrpcTransport(channel=channel))

    def close(self) -> None:
        for channel in self._channels:
            channel.close()

    def topic(self, name: str = "topic") -> str:
        path = f"projects/{self.project}/topics/{name}-{uuid.uuid4().hex[:12]}"
        self.publisher.create_topic(request={"name": path})
        return path

    def subscription(self, topic: str, **fields: Any) -> str:
        """Create one; `backoff=(min, max)` and `dead_letter=(topic, attempts)` stand for the policies."""
        path = f"projects/{self.project}/subscriptions/sub-{uuid.uuid4().hex[:12]}"
        backoff, dead_letter = fields.pop("backoff", None), fields.pop("dead_letter", None)
        if backoff is not None:
            fields["retry_policy"] = types.RetryPolicy(
                minimum_backoff=seconds(backoff[0]), maximum_backoff=seconds(backoff[1])
            )
        if dead_letter is not None:
            fields["dead_letter_policy"] = types.DeadLetterPolicy(
                dead_letter_topic=dead_letter[0], max_delivery_attempts=dead_letter[1]
            )
        self.subscriber.create_subscription(
            request={"name": path, "topic": topic, "ack_deadline_seconds": 10, **fields}
        )
        return path

    def publish(self, topic: str, data: bytes, **attributes: str) -> str:
        return str(self.publisher.publish(topic, data, **attributes).result(30))

    def pull(self, subscription: str, at_most: int = 100, timeout: float = 5.0) -> list[types.ReceivedMessage]:
        """Pull once; empty when nothing came within the time."""
        try:
            answer = self.subscriber.pull(
                request={"subscription": subscription, "max_messages": at_most}, timeout=timeout, retry=None
            )
        except (exceptions.DeadlineExceeded, exceptions.Cancelled, exceptions.ServiceUnavailable):
            return []
        return list(answer.received_messages)

    def take(self, subscription: str, count: int, timeout: float = 20.0) -> list[types.PubsubMessage]:
        """Pull and ack until `count` messages came or nothing more comes within the time."""
        got: list[types.PubsubMessage] = []
        while len(got) < count:
            batch = self.take_once(subscription, timeout, at_most=min(1000, count - len(got)))
            if not batch:
                break
            got += batch
        return got

    def take_once(self, subscription: str, timeout: float, at_most: int = 1000) -> list[types.PubsubMessage]:
        """Pull once and ack; empty when nothing came within the time."""
        batch = self.pull(subscription, at_most=at_most, timeout=timeout)
        if batch:
            with suppress(exceptions.GoogleAPICallError):  # it comes again, under the same message id
                self.subscriber.acknowledge(
                    request={"subscription": subscription, "ack_ids": [item.ack_id for item in batch]},
                    retry=None,
                    timeout=10,
                )
        return [item.message for item in batch]

    def is_empty(self, subscription: str, timeout: float = 1.5) -> bool:
        """Whether nothing is delivered within the time."""
        return not self.pull(subscription, timeout=timeout)

    def end_dead_streams(self, subscription: str) -> None:
        """
        Do for Google's emulator what it cannot do itself: end the streams of a client that was killed.

        Its jar (0.8.20) holds two versions of gRPC that do not fit: what should tell a stream of its cancellation
        raises `NoSuchMethodError: io.grpc.InternalStatus.asRuntimeException`, so the stream lives on until the client's
        deadline, half an hour, and every message that it is given waits for the end of a lease, 60 s.  A subscription
        that is a push subscription for a moment ends its streams.  Nothing is pushed: everything published is leased.
        """
        for endpoint in ("http://127.0.0.1:9/", ""):
            self.subscriber.modify_push_config(
                request={"subscription": subscription, "push_config": {"push_endpoint": endpoint}}
            )
            time.sleep(4 * EMULATOR_POLL_S)
