"""
One delivery from bytes to settlement; the only place that orders "publish, then ack".

`Processor.handle` is called once per delivery and returns what the broker is told.  Inside: decode, find the route,
wait at its gate, make an attempt, let the policy judge it, then answer, hold or hand back.  What is done about a
failure is decided in `worker.policy`, who may start is decided in `worker.flow`; this file only walks between them.

Promises, each a named test: publish is confirmed before ack; every delivery settles exactly once; an exception nobody
foresaw is an `internal_error`, a traceback and a nack; a failed publish never repeats inference while the lease can be
kept; the same message in flight twice reaches the backend once.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from worker.delivery import Delivery, Limits, Reply
from worker.errors import AdmissionClosedError, AdmissionError, MessageError
from worker.flow.gate import AttemptSignal, Permit
from worker.flow.queue import AdmissionOrder
from worker.pipeline.attempt import Attempts
from worker.pipeline.coalescing import Flights
from worker.pipeline.dead_letters import DeadLetters
from worker.pipeline.dedupe import Dedupe, Deduper
from worker.pipeline.reading import RequestReader
from worker.pipeline.replies import Replier
from worker.pipeline.routes import Route, Router
from worker.pipeline.shutdown import Finisher
from worker.pipeline.verdicts import INTERNAL, INTERRUPTED, TOO_LATE, build_reply, conflict, no_route, refusal
from worker.policy.budgets import Budget, apply_budgets, waiting_decision
from worker.policy.model import Decision, Disposition, ErrorClass
from worker.ports import Settlement
from worker.settings.schema import RequestSettings
from worker.telemetry.record import Recorder
from worker.telemetry.tracing import NO_TRACER, Tracer
from worker.wire.message import ReceivedMessage, RequestMessage

DEADLINE_SLACK_S = 0.01
"""Added to a wait that ends at a deadline, so that the deadline has passed for certain when it is over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What the processor needs of the settings."""

    request: RequestSettings
    limits: Limits
    settle_s: float
    """How long an answer may still be published after the grace is over."""


class _AnsweredError(Exception):
    """The delivery's answer is out already; only the ack is missing."""


class Processor:
    """
    Turns deliveries into settlements.

    Args:
        router: The backends.
        attempts: Makes attempts.
        replier: Publishes answers.
        recorder: Metrics and the canonical log line.
        rules: Settings.
        deduper: Knows what was answered already.
        dead_letters: Takes copies of what failed for good; `None` for no copies.
        tracer: Is told where each delivery stands.
        clock: Monotonic seconds.
        wall_clock: Unix seconds.
    """

    def __init__(
        self,
        router: Router,
        attempts: Attempts,
        replier: Replier,
        recorder: Recorder,
        rules: Rules,
        *,
        deduper: Deduper,
        dead_letters: DeadLetters | None = None,
        tracer: Tracer = NO_TRACER,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._router = router
        self._attempts = attempts
        self._replier = replier
        self._recorder = recorder
        self._rules = rules
        self._deduper = deduper
        self._dead_letters = dead_letters
        self._tracer = tracer
        self._clock = clock
        self._wall_clock = wall_clock
        self._reader = RequestReader(rules.request)
        self._draining = asyncio.Event()
        self._finisher = Finisher(rules.settle_s, clock=clock)
        self._flights = Flights(self._finisher)

    def begin_drain(self) -> None:
        """Start nothing any more: whoever waits for a backend is handed back at once; attempts go on.  Idempotent."""
        self._draining.set()
        for route in self._router.routes:
            route.gate.close()

    def hurry(self, settle_s: float) -> None:
        """Leave the last answers `settle_s` from now, also those that are waited for already; on the event loop."""
        self._finisher.hurry(settle_s)

    async def handle(self, message: ReceivedMessage) -> Settlement:
        """
        Process one delivery and return its settlement; never raises.

        A message that is in flight already shares the outcome of the first delivery: one backend call, both settled.

        Cancellation: an attempt under way is given up and the message handed back, or answered when this was its last
        delivery attempt; an answer that exists is still published, for at most `settle_s`.
        """
        flight = self._flights.find(message)
        if flight is not None:
            self._recorder.duplicate("in_flight")
            return await self._flights.join(flight, message)
        delivery = Delivery(message, self._clock())
        self._flights.begin(delivery)
        settlement = Settlement.NACK
        try:
            settlement = await self._settle(delivery)
        except Exception:  # noqa: BLE001 - the invariant: whatever happens, the delivery settles and the puller lives
            self._recorder.internal_error(delivery)
            settlement = Settlement.ACK if delivery.is_answered else Settlement.NACK
        finally:
            self._flights.end(delivery, settlement)
            self._tracer.end(delivery, settlement)
        return settlement

    async def _settle(self, delivery: Delivery) -> Settlement:
        try:
            reply = await self._answer(delivery)
        except _AnsweredError:
            self._recorder.settled_again(delivery)
            return Settlement.ACK
        if reply is None:
            self._recorder.handed_back(delivery, draining=self._draining.is_set())
            return Settlement.NACK
        await self._finisher.finish(delivery, self._publish(delivery, reply))
        if delivery.is_answered:
            return Settlement.ACK
        self._recorder.unpublished(delivery, reply)
        return Settlement.NACK

    async def _publish(self, delivery: Delivery, reply: Reply) -> None:
        """Put the answer on the topic and do what comes between that and the ack."""
        published = await self._replier.publish(delivery, reply)
        if published is None:
            return
        delivery.is_answered = True
        self._recorder.answered(delivery, published)
        await self._deduper.put(delivery, published)
        if self._dead_letters is not None and (published.retryable or published.error_class == ErrorClass.BAD_MESSAGE):
            await self._dead_letters.copy(delivery.message, published)

    async def _answer(self, delivery: Delivery) -> Reply | None:
        """Return the answer, `None` to hand the message back, whatever goes wrong on the way."""
        try:
            return await self._work(delivery)
        except asyncio.CancelledError:
            delivery.cancelled_at = self._clock()
            return self._give_up(delivery)
        except _AnsweredError:
            raise
        except Exception:  # noqa: BLE001 - what nobody foresaw is answered too when the attempts are used up
            self._recorder.internal_error(delivery)
            delivery.charged_tries = max(delivery.charged_tries, 1)  # it was tried: its age may end it
            return self._conclude(delivery, self._budgeted(delivery, INTERNAL))

    def _give_up(self, delivery: Delivery) -> Reply | None:
        """Return the answer of a delivery whose time is over: a whole one, or one instead of a silent dead letter."""
        decision = delivery.decision
        if decision is not None and decision.disposition is Disposition.REPLY:
            return self._conclude(delivery, decision)  # the answer was whole when its attempt was cut
        if decision is None:
            decision, delivery.event = INTERRUPTED, None  # an answer that was not judged yet says nothing
        decision = replace(decision, disposition=Disposition.NACK)
        return self._conclude(delivery, self._budgeted(delivery, decision, draining=True))

    async def _work(self, delivery: Delivery) -> Reply | None:
        """Return the answer, or `None` to hand the message back."""
        refused: Reply | None = None
        try:
            delivery.request = self._reader.read(delivery.message)
            self._tracer.begin(delivery, delivery.request.metadata)
        except MessageError as error:
            refused = refusal(error)
            self._tracer.begin(delivery, refused.metadata)
        known = await self._deduper.get(delivery)
        if known is Dedupe.HIT:
            raise _AnsweredError
        request = delivery.request
        if refused is not None or request is None:
            return refused
        if known is Dedupe.CONFLICT:
            return conflict(self._deduper.key(delivery), request.metadata)
        route = self._router.find(request.model, request.path)
        if route is None:
            return self._conclude(delivery, no_route(request.model, request.path))
        delivery.backend = route.name
        return await self._pursue(delivery, request, route)

    async def _pursue(self, delivery: Delivery, request: RequestMessage, route: Route) -> Reply | None:
        """Attempt until the answer is decided or the message is to be handed back."""
        delay_s = 0.0
        while True:
            waiting_since = self._clock()
            if self._is_late(request):
                return self._conclude(delivery, TOO_LATE)
            try:
                permit = await self._admit(delivery, request, route, delay_s)
            except AdmissionError as error:
                return self._not_admitted(delivery, request, route, error)
            finally:
                if delivery.tries:
                    delivery.held_s += self._clock() - waiting_since
            if self._is_late(request):
                permit.finish(AttemptSignal())
                return self._conclude(delivery, TOO_LATE)
            decision = delivery.decision = await self._attempts.make(delivery, request, route, permit)
            if decision.disposition is not Disposition.REPLY:
                decision = self._attempts.keep_for_continuation(delivery, route, decision)
                decision = await self._attempts.discount_outage(delivery, route, decision, self._draining)
                delay_s = self._attempts.delay_s(delivery, route, decision)
                decision = self._budgeted(delivery, decision, delay_s=delay_s)
            delivery.decision = decision
            self._recorder.attempted(delivery, decision)
            if decision.disposition is not Disposition.HOLD:
                return self._conclude(delivery, decision)

    async def _admit(self, delivery: Delivery, request: RequestMessage, route: Route, delay_s: float) -> Permit:
        """Wait at the route's gate, no longer than lease, deadline and hold allow."""
        budget = self._budget(delivery)
        bounds = [budget.lease_left_s]
        if budget.deadline_left_s is not None:
            bounds.append(budget.deadline_left_s + DEADLINE_SLACK_S)
        if delivery.tries:
            held = delivery.decision
            bounds.append((held.hold_max_s if held and held.hold_max_s else budget.hold_max_s) - budget.held_s)
        order = AdmissionOrder(
            priority=request.priority,
            deadline=request.deadline,
            publish_time=delivery.message.publish_time,
            held=delivery.tries > 0,
        )
        give_up_s = max(0.0, min(bounds))
        streamed = route.backend.streams(request.path, request.body or b"", stream_requested=request.stream)
        return await route.gate.admit(
            order, model=request.model, give_up_s=give_up_s, delay_s=delay_s, streamed=streamed
        )

    def _not_admitted(
        self, delivery: Delivery, request: RequestMessage, route: Route, error: AdmissionError
    ) -> Reply | None:
        """Hand back what may not start, or answer it when nothing is left."""
        draining = isinstance(error, AdmissionClosedError)
        decision = delivery.decision
        if decision is None:
            if self._is_late(request):
                return self._conclude(delivery, TOO_LATE)
            circuit = route.blocked_by(request.model)
            blocked_by = circuit.error_class if circuit is not None else None
            waiting = waiting_decision(ErrorClass(blocked_by) if blocked_by else ErrorClass.OVERLOADED)
            decision = INTERRUPTED if draining and not blocked_by else waiting
        decision = self._budgeted(delivery, replace(decision, disposition=Disposition.NACK), draining=draining)
        return self._conclude(delivery, decision)

    def _is_late(self, request: RequestMessage) -> bool:
        return request.deadline is not None and request.deadline <= self._wall_clock()

    def _budget(self, delivery: Delivery, *, draining: bool | None = None) -> Budget:
        return self._rules.limits.budget(
            delivery,
            now=self._clock(),
            now_unix=self._wall_clock(),
            draining=self._draining.is_set() if draining is None else draining,
        )

    def _budgeted(
        self, delivery: Delivery, decision: Decision, *, draining: bool | None = None, delay_s: float | None = None
    ) -> Decision:
        return apply_budgets(decision, self._budget(delivery, draining=draining), delay_s=delay_s)

    def _conclude(self, delivery: Delivery, decision: Decision) -> Reply | None:
        """Return the answer of a decision, `None` for one that hands the message back."""
        delivery.decision = decision
        if decision.disposition is not Disposition.REPLY:
            return None
        return build_reply(delivery, decision, stats=self._recorder.stats(delivery))
