"""
Questions asked once at start: is the topic there, may we use it, may we use the subscription.

`TestIamPermissions` needs no permission of its own, so it is asked first; servers without IAM (the emulators) are asked
for the resource itself.  What cannot be found out is not an error: the first pull or publish will tell.
"""

from typing import Any

import grpc
from google.iam.v1 import iam_policy_pb2
from google.pubsub_v1 import types

from worker.errors import BrokerResourceError
from worker.telemetry.logs import get_logger

TIMEOUT_S = 10.0
_TEST = "/google.iam.v1.IAMPolicy/TestIamPermissions"
_GET = {
    "topics": ("/google.pubsub.v1.Publisher/GetTopic", types.GetTopicRequest.pb(), types.Topic.pb(), "topic"),
    "subscriptions": (
        "/google.pubsub.v1.Subscriber/GetSubscription",
        types.GetSubscriptionRequest.pb(),
        types.Subscription.pb(),
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
    request = iam_policy_pb2.TestIamPermissionsRequest(resource=name, permissions=[permission])
    try:
        answer = await _call(channel, _TEST, request, iam_policy_pb2.TestIamPermissionsResponse, f"resource={name}")
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.UNIMPLEMENTED:
            _judge(error, name, permission, role)
            return False
        return await _check_exists(channel, name, kind)
    if permission not in answer.permissions:
        raise BrokerResourceError(f"{name}: the worker lacks {permission}; grant it {role}")
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
