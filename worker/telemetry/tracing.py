"""
Tracing as the recorder sees it: what it tells a tracer about a delivery.  This tracer does nothing with it.

The recorder calls these methods at fixed points and knows nothing of spans; `worker.telemetry.spans` makes spans of the
calls, and is imported only where tracing is on.
"""

from worker.delivery import Delivery, Reply
from worker.policy.model import Decision
from worker.ports import Settlement


class Tracer:
    """
    What a tracer is told about deliveries; it raises nothing, awaits nothing, and writes to no delivery.

    The order is: `begin`, any number of pairs `attempt_starts` and `attempt_ends`, at most one pair `publish_starts`
    and `publish_ends`, `end`; pairs `payload_starts` and `payload_ends` before the attempts and inside the publish.
    These methods ignore everything: tracing is off.

    Threads: the event loop's only.
    """

    def begin(self, delivery: Delivery, metadata: bytes) -> None:
        """Note that the worker starts with a delivery; `metadata` is the request's, raw JSON."""

    def end(self, delivery: Delivery, settlement: Settlement) -> None:
        """Note how a delivery was settled, also one for which `begin` was never called."""

    def attempt_starts(self, delivery: Delivery) -> None:
        """Note that an attempt starts; its number is in `delivery.attempts`."""

    def attempt_ends(self, delivery: Delivery, decision: Decision | None) -> None:
        """Note the decision about the attempt, `None` when it was cancelled."""

    def payload_starts(self, delivery: Delivery, operation: str) -> None:
        """Note that a body is read from object storage or written to it: `read` or `write`."""

    def payload_ends(self, delivery: Delivery, *, size: int, fault: str) -> None:
        """Note that so many bytes were, or what was wrong."""

    def publish_starts(self, delivery: Delivery) -> None:
        """Note that the first publish of an answer starts."""

    def publish_ends(self, delivery: Delivery, reply: Reply, *, attempts: int, is_published: bool) -> None:
        """Note what the broker has, or did not accept, after so many publishes."""

    def inject(self, delivery: Delivery, carrier: dict[str, str]) -> None:
        """Add the context of the attempt or publish that runs to headers or attributes, in W3C's form."""

    def trace_id(self, delivery: Delivery) -> str | None:
        """Return the id of the delivery's trace, 32 hex digits; `None` without one."""

    async def aclose(self) -> None:
        """
        Send the spans that are left, for a bounded time; idempotent.

        Cancellation: spans that are left are lost.
        """
