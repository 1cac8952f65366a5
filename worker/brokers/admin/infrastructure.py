"""
Topics, subscriptions and IAM policies over RPC: looked up, created, changed.

The only caller is `inference-worker setup`; the running worker changes no infrastructure.  What to do is decided in
`plan`; here it is done, one RPC a call, and errors become sentences.

An emulator may not take every field (Google's refuses to update an expiry, and a retention over 7 days).  Against one,
a refused field is left out and reported; against the real service a refusal is an error.
"""

from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import Any

import grpc
from google.iam.v1 import iam_policy_pb2, policy_pb2
from google.pubsub_v1 import types

from worker.brokers.admin.resources import (
    MASKS,
    Binding,
    Field,
    Subscription,
    Topic,
    UnsupportedField,
    read_subscription,
    read_topic,
    write_subscription,
    write_topic,
)
from worker.errors import BrokerError, BrokerResourceError

TIMEOUT_S = 20.0
"""Of one RPC; creating a subscription takes the service a few seconds at most."""
PUBLISHER, SUBSCRIBER, IAM = "google.pubsub.v1.Publisher", "google.pubsub.v1.Subscriber", "google.iam.v1.IAMPolicy"
POLICY_VERSION = 3
"""Of IAM: from it on conditions are shown (https://cloud.google.com/iam/docs/policies#versions)."""

_NOT_TAKEN = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNIMPLEMENTED}

_Topic: Any = types.Topic.pb()
_Subscription: Any = types.Subscription.pb()


class Infrastructure:
    """
    Pub/Sub's administration.

    Args:
        channel: Open; not closed here.
        is_emulator: Whether a field that the server refuses is left out instead of being an error.
    """

    def __init__(self, channel: grpc.aio.Channel, *, is_emulator: bool) -> None:
        self._channel = channel
        self._is_emulator = is_emulator

    async def find_topic(self, name: str) -> Topic | None:
        """
        Return a topic, `None` where there is none.

        Raises:
            BrokerError: Unreachable (retryable) or refused (`BrokerResourceError`, permanent); so does every method.

        Cancellation: of any method here: the change may or may not have been made.
        """
        request = types.GetTopicRequest.pb()(topic=name)
        found = await self._find(PUBLISHER, "GetTopic", request, _Topic, f"topic={name}")
        return None if found is None else read_topic(found)

    async def create_topic(self, wanted: Topic) -> list[UnsupportedField]:
        """Create a topic; return what an emulator did not take."""
        try:
            await self._create_topic(wanted)
        except _NotTakenError as error:
            if wanted.retention_s is None:
                raise
            await self._create_topic(Topic(wanted.name))
            return [UnsupportedField(wanted.name, Field.RETENTION, error.text)]
        return []

    async def update_topic(self, wanted: Topic) -> list[UnsupportedField]:
        """Change a topic's retention; return what an emulator did not take."""
        request = types.UpdateTopicRequest.pb()(topic=write_topic(wanted))
        request.update_mask.paths.append(MASKS[Field.RETENTION])
        try:
            await self._call(PUBLISHER, "UpdateTopic", request, _Topic, f"topic.name={wanted.name}")
        except _NotTakenError as error:
            return [UnsupportedField(wanted.name, Field.RETENTION, error.text)]
        return []

    async def find_subscription(self, name: str) -> Subscription | None:
        """Return a subscription with every field, `None` where there is none."""
        request = types.GetSubscriptionRequest.pb()(subscription=name)
        found = await self._find(SUBSCRIBER, "GetSubscription", request, _Subscription, f"subscription={name}")
        return None if found is None else read_subscription(found)

    async def create_subscription(self, wanted: Subscription) -> list[UnsupportedField]:
        """Create a subscription; return what an emulator did not take."""
        try:
            await self._create(wanted)
        except _NotTakenError as error:
            return await self._create_partly(wanted, error)
        return []

    async def update_subscription(self, wanted: Subscription, fields: Collection[Field]) -> list[UnsupportedField]:
        """Change some fields to what is wanted; return what an emulator did not take."""
        try:
            await self._update(wanted, fields)
        except _NotTakenError:
            return await self._update_singly(wanted, fields)
        return []

    async def has_access_control(self, resource: str, permission: str) -> bool:
        """Whether the server knows roles at all; asked by a permission that fits the resource.  Emulators know none."""
        return await self.own_permissions(resource, [permission]) is not None

    async def bindings(self, resource: str) -> list[Binding] | None:
        """Return who has which role on a resource; `None` where that may not be asked."""
        request = iam_policy_pb2.GetIamPolicyRequest(resource=resource)
        request.options.requested_policy_version = POLICY_VERSION
        try:
            policy = await self._find(IAM, "GetIamPolicy", request, policy_pb2.Policy, f"resource={resource}")
        except _NotAllowedError:
            return None
        # A role under a condition may not hold now, so it does not count.
        bindings = () if policy is None else policy.bindings
        return [Binding(each.role, frozenset(each.members)) for each in bindings if not each.HasField("condition")]

    async def own_permissions(self, resource: str, permissions: Iterable[str]) -> frozenset[str] | None:
        """Return which of the permissions these credentials have; `None` where the server has no IAM."""
        request = iam_policy_pb2.TestIamPermissionsRequest(resource=resource, permissions=list(permissions))
        answer_type = iam_policy_pb2.TestIamPermissionsResponse
        try:
            answer = await self._find(IAM, "TestIamPermissions", request, answer_type, f"resource={resource}")
        except _NoAccessControlError:
            return None
        return frozenset() if answer is None else frozenset(answer.permissions)

    async def _create_topic(self, wanted: Topic) -> None:
        await self._call(PUBLISHER, "CreateTopic", write_topic(wanted), _Topic, f"name={wanted.name}")

    async def _create(self, wanted: Subscription) -> None:
        params = f"name={wanted.name}"
        await self._call(SUBSCRIBER, "CreateSubscription", write_subscription(wanted), _Subscription, params)

    async def _create_partly(self, wanted: Subscription, error: "_NotTakenError") -> list[UnsupportedField]:
        """Create it without the one field at fault; where that is not enough, bare and then field by field."""
        for path in dict.fromkeys(MASKS[each] for each in wanted.policy):
            left_out = [each for each in wanted.policy if MASKS[each] == path]
            try:
                await self._create(_without(wanted, left_out))
            except _NotTakenError:
                continue
            return [UnsupportedField(wanted.name, each, error.text) for each in left_out]
        await self._create(_without(wanted, wanted.policy))
        return await self._update_singly(wanted, wanted.policy)

    async def _update(self, wanted: Subscription, fields: Collection[Field]) -> None:
        request = types.UpdateSubscriptionRequest.pb()(subscription=write_subscription(wanted))
        request.update_mask.paths.extend(sorted({MASKS[each] for each in fields}))
        params = f"subscription.name={wanted.name}"
        await self._call(SUBSCRIBER, "UpdateSubscription", request, _Subscription, params)

    async def _update_singly(self, wanted: Subscription, fields: Collection[Field]) -> list[UnsupportedField]:
        lacks = []
        for path in dict.fromkeys(MASKS[each] for each in fields):
            together = [each for each in fields if MASKS[each] == path]
            try:
                await self._update(wanted, together)
            except _NotTakenError as error:
                lacks += [UnsupportedField(wanted.name, each, error.text) for each in together]
        return lacks

    async def _find(self, service: str, method: str, request: Any, answer_type: Any, params: str) -> Any:
        """Call, and return `None` for what does not exist."""
        try:
            return await self._call(service, method, request, answer_type, params)
        except _MissingError:
            return None

    async def _call(self, service: str, method: str, request: Any, answer_type: Any, params: str) -> Any:
        call = self._channel.unary_unary(
            f"/{service}/{method}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=answer_type.FromString,
        )
        name = params.partition("=")[2]
        try:
            return await call(request, timeout=TIMEOUT_S, metadata=(("x-goog-request-params", params),))
        except grpc.aio.AioRpcError as error:
            raise self._own_error(error, service, name) or _sentence(error, method, name) from error

    def _own_error(self, error: grpc.aio.AioRpcError, service: str, name: str) -> BrokerError | None:
        """Return the error that a method above deals with, if it is one of those."""
        code, text = error.code(), (error.details() or "").strip()
        if service == IAM and code is grpc.StatusCode.UNIMPLEMENTED:
            return _NoAccessControlError(f"{name}: {text}")
        if service == IAM and code is grpc.StatusCode.PERMISSION_DENIED:
            return _NotAllowedError(f"{name}: {text}")
        if code is grpc.StatusCode.NOT_FOUND:
            return _MissingError(f"{name}: {text or 'does not exist'}")
        if self._is_emulator and code in _NOT_TAKEN:
            return _NotTakenError(f"{name}: {text}", text or code.name)
        return None


def _sentence(error: grpc.aio.AioRpcError, method: str, name: str) -> BrokerError:
    code, text = error.code(), (error.details() or "").strip()
    if code is grpc.StatusCode.PERMISSION_DENIED:
        return BrokerResourceError(
            f"{name}: {method} is not permitted; setup needs roles/pubsub.editor on the project ({text})"
        )
    if code is grpc.StatusCode.ALREADY_EXISTS:
        return BrokerError(f"{name}: it was created meanwhile by another caller; run setup again")
    if code in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}:
        return BrokerError(f"Pub/Sub cannot be reached, run setup again later: {name}: {code.name}: {text}")
    return BrokerResourceError(f"{name}: {method}: {code.name}: {text}")


class _MissingError(BrokerResourceError):
    """What was named does not exist."""


class _NotAllowedError(BrokerResourceError):
    """An IAM policy may not be looked at."""


class _NoAccessControlError(BrokerResourceError):
    """The server has no IAM."""


class _NotTakenError(BrokerResourceError):
    """An emulator refuses a field."""

    def __init__(self, sentence: str, text: str) -> None:
        self.text = text
        super().__init__(sentence)


def _without(wanted: Subscription, fields: Iterable[Field]) -> Subscription:
    left_out = set(fields)
    return replace(wanted, policy={key: value for key, value in wanted.policy.items() if key not in left_out})
