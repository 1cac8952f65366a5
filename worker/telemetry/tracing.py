"""
Tracing as the pipeline sees it: what it tells about a delivery, and the tracer that does not listen.

The pipeline calls these methods at fixed places and knows nothing of spans; `worker.telemetry.otel` makes spans of the
calls, and is imported only where tracing is on.  `NO_TRACER` costs a few empty calls per message and allocates nothing.
"""

from typing import Protocol

from worker.delivery import Delivery, Reply
from worker.policy.model import Decision
from worker.ports import Settlement


class Tracer(Protocol):
    """
    Is told about deliveries; raises nothing, awaits nothing.

    What it has to remember about one is in `Delivery.trace`.  The order is: `begin`, any number of pairs
    `attempt_starts` and `attempt_ends`, at most one pair `publish_starts` and `publish_ends`, `end`.

    Threads: the event loop's only.
    """

    def begin(self, delivery: Delivery, metadata: bytes) -> None:
        """Note that a delivery is worked on; `metadata` is the request's, raw JSON."""

    def end(self, delivery: Delivery, settlement: Settlement) -> None:
        """Note how it was settled; also of a delivery that never began."""

    def attempt_starts(self, delivery: Delivery) -> None:
        """Note that an attempt starts; its number is in `delivery.attempts`."""

    def attempt_ends(self, delivery: Delivery, decision: Decision | None) -> None:
        """Note what was decided about the attempt, `None` when it was given up."""

    def publish_starts(self, delivery: Delivery) -> None:
        """Note that an answer is about to be published."""

    def publish_ends(self, delivery: Delivery, reply: Reply, *, tries: int, is_published: bool) -> None:
        """Note what the broker has, or what it did not take."""

    def inject(self, delivery: Delivery, carrier: dict[str, str]) -> None:
        """Add the context of what is under way (attempt, publish) to headers or attributes, in W3C's form."""

    async def aclose(self) -> None:
        """Send what is left, for a bounded time; idempotent."""


class NoTracer:
    """Does not listen."""

    def begin(self, delivery: Delivery, metadata: bytes) -> None:
        """Do nothing."""

    def end(self, delivery: Delivery, settlement: Settlement) -> None:
        """Do nothing."""

    def attempt_starts(self, delivery: Delivery) -> None:
        """Do nothing."""

    def attempt_ends(self, delivery: Delivery, decision: Decision | None) -> None:
        """Do nothing."""

    def publish_starts(self, delivery: Delivery) -> None:
        """Do nothing."""

    def publish_ends(self, delivery: Delivery, reply: Reply, *, tries: int, is_published: bool) -> None:
        """Do nothing."""

    def inject(self, delivery: Delivery, carrier: dict[str, str]) -> None:
        """Do nothing."""

    async def aclose(self) -> None:
        """Do nothing."""


NO_TRACER: Tracer = NoTracer()
