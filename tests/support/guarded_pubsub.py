"""
The embedded Pub/Sub server behind access control: what Cloud Pub/Sub has and no emulator does.

A gRPC server that answers the IAM methods by itself, refuses what it was told to refuse, and hands everything else on
to an embedded server.  Small on purpose: it knows resources and members by their text alone.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Self

import grpc
import grpc.aio
from google.iam.v1 import iam_policy_pb2, policy_pb2

from worker.emulators.pubsub import LocalPubSub

_IAM = "/google.iam.v1.IAMPolicy/"


@dataclass
class GuardedPubSub:
    """Use it as `async with`; one event loop serves and asks."""

    policies: dict[str, policy_pb2.Policy] = field(default_factory=dict)
    """IAM policy of each resource; without one it is empty."""
    permissions: dict[str, list[str]] = field(default_factory=dict)
    """What the caller may do on each resource."""
    refusals: dict[str, tuple[grpc.StatusCode, str]] = field(default_factory=dict)
    """Methods that fail, by their last name."""
    calls: Counter[str] = field(default_factory=Counter)
    address: str = ""

    async def __aenter__(self) -> Self:
        self._inner = await LocalPubSub().__aenter__()
        self._channel = grpc.aio.insecure_channel(self._inner.address)
        self._server = grpc.aio.server()
        self._server.add_generic_rpc_handlers([self])
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        await self._server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._server.stop(0)
        await self._channel.close()
        await self._inner.stop()

    def service(self, call: grpc.HandlerCallDetails) -> Any:
        """Return the handler of a method, as gRPC asks for it."""

        async def handle(data: bytes, context: Any) -> Any:
            name = call.method.rpartition("/")[2]
            self.calls[name] += 1
            if name in self.refusals:
                await context.abort(*self.refusals[name])
            if call.method.startswith(_IAM):
                answer = self._iam(name, data)
                if answer is None:
                    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"not a request for {name}")
                return answer
            try:
                return bytes(await self._channel.unary_unary(call.method)(data))
            except grpc.aio.AioRpcError as error:
                await context.abort(error.code(), error.details())
                raise

        return grpc.unary_unary_rpc_method_handler(handle)

    def _iam(self, name: str, data: bytes) -> bytes | None:
        """Return the answer, `None` to a request that the service would not take."""
        if name == "GetIamPolicy":
            asked = iam_policy_pb2.GetIamPolicyRequest.FromString(data)
            policy = self.policies.get(asked.resource, policy_pb2.Policy())
            return policy.SerializeToString() if asked.options.requested_policy_version >= 3 else None
        request = iam_policy_pb2.TestIamPermissionsRequest.FromString(data)
        kind = request.resource.split("/")[2]
        if not request.permissions or not all(each.startswith(f"pubsub.{kind}.") for each in request.permissions):
            return None
        held = [each for each in request.permissions if each in self.permissions.get(request.resource, [])]
        return iam_policy_pb2.TestIamPermissionsResponse(permissions=held).SerializeToString()

    def bind(self, resource: str, role: str, *members: str, condition: str = "") -> None:
        """Give a role on a resource."""
        binding = self.policies.setdefault(resource, policy_pb2.Policy()).bindings.add(role=role, members=members)
        if condition:
            binding.condition.expression = condition
