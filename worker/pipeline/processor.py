"""
One delivery from bytes to settlement: the walk.

Read, fetch a body that the message only names, find the route, then wait at its gate, make an attempt, tell the gate
how it ended and have it judged, until the verdict is not to hold; publish the answer, then ack.  What is done about a
failure is decided in `policy.judge`, which request may start in `flow.gate`; this file has no rule of its own.  It
alone writes to a `Delivery`.

Promises, each a named test: publish is confirmed before ack; every delivery settles exactly once; an unexpected
exception is an `internal_error`, a traceback and a nack; a failed publish never repeats inference while the lease can
be kept; the same message in flight twice reaches the backend once.
"""

import asyncio
import random
import time
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
from msgspec import structs

from worker.delivery import AlreadyAnswered, Delivery, Limits, Nack, Outcome, Reply, bad_message, build_reply, conflict
from worker.errors import (
    AdmissionClosedError,
    AdmissionError,
    AdmissionMovedError,
    AdmissionTimeoutError,
    MessageError,
    PayloadError,
)
from worker.flow.circuit import DOUBT_S
from worker.flow.clock import wait_for
from worker.flow.gate import Permit
from worker.flow.queue import ALONE, AdmissionOrder
from worker.pipeline.attempt import Attempts, event_of
from worker.pipeline.cancels import Cancels
from worker.pipeline.coalescing import InFlightDeliveries
from worker.pipeline.dead_letters import DeadLetters
from worker.pipeline.dedupe import Dedupe, Deduper
from worker.pipeline.referenced_bodies import ReferencedBodies
from worker.pipeline.replies import Replier
from worker.pipeline.routes import Choice, RequestReader, Route, Router, Target, record_failure
from worker.pipeline.shutdown import ShutdownGrace
from worker.pipeline.tenants import Tenants
from worker.policy.budgets import Budget
from worker.policy.engine import ErrorPolicy
from worker.policy.judge import (
    HEALTHY,
    OUTAGE_DETECTION_S,
    AttemptEnd,
    BackendHealth,
    Cancelled,
    DeadlinePassed,
    DeadlineUnreachable,
    End,
    NoRoute,
    NotAdmitted,
    Unexpected,
    Verdict,
    Withdrawn,
    judge,
    report,
)
from worker.policy.model import Disposition, ErrorEvent, Fault, Phase
from worker.ports import Settlement
from worker.settings.schema import RequestSettings
from worker.telemetry.record import Recorder
from worker.wire.control import CancelRequest
from worker.wire.message import ReceivedMessage, RequestMessage

DEADLINE_SLACK_S = 0.01
"""Added to a wait that ends at a deadline, so that the deadline has passed for certain when it is over."""


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """What the processor needs of the settings."""

    request: RequestSettings
    limits: Limits
    settle_s: float
    """How long an answer may still be published after the grace is over."""
    outage_detection_s: float = OUTAGE_DETECTION_S
    """How long a failure waits for others of its kind before it is nacked."""
    tenants_share_windows: bool = False
    deadline_chance: float = 0.0
    """Part of the recent answers that must have been faster than a deadline leaves; 0: any is tried."""


class Processor:
    """
    Turns deliveries into settlements.

    Args:
        router: The backends.
        policy: Says what kind of failure an attempt's end is.
        attempts: Sends attempts.
        replier: Publishes answers.
        recorder: Is told what happens to each delivery.
        rules: Settings.
        deduper: Knows what was answered already.
        bodies: Fetches bodies that requests name; `None` where none may.
        dead_letters: Takes copies of what failed for good; `None` for no copies.
        tenants: Says whose part of the window a request uses and how long it has to wait; `None`: all are alike.
        cancels: Knows which requests were cancelled; `None` where none can be.
        clock: Monotonic seconds.
        wall_clock: Unix seconds.
        rng: Jitter of waits; `None` for one of its own.
    """

    def __init__(
        self,
        *,
        router: Router,
        policy: ErrorPolicy,
        attempts: Attempts,
        replier: Replier,
        recorder: Recorder,
        rules: Rules,
        deduper: Deduper,
        bodies: ReferencedBodies | None = None,
        dead_letters: DeadLetters | None = None,
        tenants: Tenants | None = None,
        cancels: Cancels | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        rng: random.Random | None = None,
    ) -> None:
        self._router = router
        self._policy = policy
        self._attempts = attempts
        self._replier = replier
        self._recorder = recorder
        self._limits = rules.limits
        self._outage_detection_s = rules.outage_detection_s
        self._deadline_chance = rules.deadline_chance
        self._tenants = tenants
        self._cancels = cancels
        self._deduper = deduper
        self._dead_letters = dead_letters
        self._clock = clock
        self._wall_clock = wall_clock
        self._random = rng or random.Random()  # noqa: S311 - jitter
        self._bodies = bodies
        self._reader = RequestReader(
            rules.request, None if bodies is None else bodies.check, shares_windows=rules.tenants_share_windows
        )
        self._draining = asyncio.Event()
        self._grace = ShutdownGrace(rules.settle_s, clock=clock)
        self._in_flight = InFlightDeliveries(self._process, self._grace, recorder, clock=clock)

    def begin_drain(self) -> None:
        """Start nothing any more: what waits for a backend is nacked at once; attempts go on.  Idempotent."""
        self._draining.set()
        for target in self._router.targets:
            target.gate.close()
        if self._bodies is not None:
            self._bodies.close()

    def hurry(self, settle_s: float) -> None:
        """Leave the last answers `settle_s` from now, also those that are waited for already; on the event loop."""
        self._grace.hurry(settle_s)

    def cancel(self, request: CancelRequest) -> None:
        """
        Answer the requests that are meant as cancelled: now what is under way here, and what comes when it comes.

        An attempt that runs is cut and its connection closed, unless it is to finish: then its answer goes out, and no
        further attempt is made.  An answer that is whole, or on its way to the topic, goes out all the same.  On the
        event loop; raises nothing.
        """
        if self._cancels is None:
            return
        self._cancels.add(request)
        for delivery in self._in_flight:
            if delivery.is_concluded or delivery.is_withdrawn or delivery.task is None:
                continue
            if request.let_running_finish and delivery.is_running:
                continue
            if self._cancels.covers(delivery.message):
                delivery.is_withdrawn = True
                delivery.task.cancel()

    def handle(self, message: ReceivedMessage) -> Coroutine[Any, Any, Settlement]:
        """
        Process one delivery and return its settlement; to be awaited, never raises.

        A message that is in flight already shares the outcome of the first delivery: one backend call, both settled.

        Cancellation: an attempt under way is given up and the message nacked, or answered when this was its last
        delivery attempt; an answer that exists is still published, for at most `settle_s`.
        """
        return self._in_flight.handle(message)

    async def _process(self, delivery: Delivery) -> Settlement:
        settlement = Settlement.NACK
        if self._cancels is not None:
            delivery.task = asyncio.current_task()
        try:
            settlement = await self._settle(delivery, await self._outcome(delivery))
            if self._tenants is not None:
                await self._tenants.settle(delivery)
        except Exception:  # noqa: BLE001 - the invariant: whatever happens, the delivery settles and the pull goes on
            self._recorder.internal_error(delivery)
            settlement = Settlement.ACK if delivery.is_answered else Settlement.NACK
        finally:
            self._recorder.delivery_ends(delivery, settlement)
        return settlement

    async def _outcome(self, delivery: Delivery) -> Outcome:
        """Return the outcome, whatever goes wrong on the way."""
        end: End
        try:
            outcome = await self._walk(delivery)
        except asyncio.CancelledError:
            if delivery.decision is None:
                delivery.event = None  # an end that was not judged yet says nothing
            if _is_only_withdrawn(delivery):
                self._recorder.withdrawn(delivery)
                end = Withdrawn(last=delivery.decision)
            else:
                delivery.cancelled_at = self._clock()
                end = Cancelled(last=delivery.decision)
        except Exception:  # noqa: BLE001 - answered too when the delivery attempts are used up
            self._recorder.internal_error(delivery)
            end = Unexpected()
        else:
            delivery.is_concluded = True
            return outcome
        delivery.is_concluded = True
        return self._conclude(delivery, judge(end, self._budget(delivery)))

    async def _walk(self, delivery: Delivery) -> Outcome:
        refused: MessageError | None = None
        try:
            delivery.request = self._reader.read(delivery.message)
            self._recorder.delivery_starts(delivery, delivery.request.metadata)
        except MessageError as error:
            refused = error
            self._recorder.delivery_starts(delivery, error.metadata)
        known = await self._deduper.get(delivery)
        if known is Dedupe.HIT:
            return AlreadyAnswered()
        request = delivery.request
        if refused is not None or request is None:
            assert refused is not None
            return bad_message(refused)
        if known is Dedupe.CONFLICT:
            return conflict(self._deduper.key(delivery), request.metadata)
        if request.body is None:
            return await self._pursue_referenced(delivery, request)
        try:
            return self._conclude(delivery, await self._find_and_pursue(delivery, request))
        except MessageError as error:
            return bad_message(error)

    async def _pursue_referenced(self, delivery: Delivery, request: RequestMessage) -> Outcome:
        """Fetch the body that the request names, and let go of it as soon as the verdict is known."""
        assert self._bodies is not None  # the reader refuses what nothing can fetch
        try:
            loaded = await self._load(delivery, request, self._bodies)
        except MessageError as error:
            return bad_message(error)
        if isinstance(loaded, Verdict):
            return self._conclude(delivery, loaded)
        try:
            delivery.request = loaded
            return self._conclude(delivery, await self._find_and_pursue(delivery, loaded))
        except MessageError as error:
            return bad_message(error)
        finally:
            delivery.request = structs.replace(loaded, body=None)
            self._bodies.release(loaded)

    async def _load(
        self, delivery: Delivery, request: RequestMessage, bodies: ReferencedBodies
    ) -> RequestMessage | Verdict:
        """Return the request with its body, or the verdict where it cannot be fetched."""
        fetches = 0
        while True:
            if self._is_late(request):
                return self._judge(delivery, DeadlinePassed(last=delivery.decision))
            if self._draining.is_set():
                return self._judge(delivery, NotAdmitted(last=delivery.decision, is_draining=True))
            try:
                loaded = await bodies.load(delivery, request, give_up_s=self._give_up_s(self._budget(delivery)))
            except AdmissionClosedError:
                return self._judge(delivery, NotAdmitted(last=delivery.decision, is_draining=True))
            except PayloadError as error:
                fetches += 1
                verdict = self._judge_fetch(delivery, request, error, fetches)
                if verdict.decision.disposition is not Disposition.HOLD:
                    return verdict
                held_since = self._clock()
                await wait_for(self._draining, verdict.delay_s)
                delivery.held_s += self._clock() - held_since
            else:
                delivery.event = delivery.decision = None
                return loaded

    def _judge_fetch(self, delivery: Delivery, request: RequestMessage, error: PayloadError, fetches: int) -> Verdict:
        """Have a failed fetch judged like a failed attempt that no backend has a part in."""
        delivery.event = event = ErrorEvent(
            backend="",
            path=request.path,
            phase=Phase.PREPARE,
            fault=Fault(error.fault),
            detail=error.detail,
            delivery_attempt=delivery.message.delivery_attempt,
            attempts=fetches,
        )
        end = AttemptEnd(event=event, decision=self._policy.decide(event))
        budget = structs.replace(self._budget(delivery), attempts=fetches, counted_attempts=fetches)
        verdict = judge(end, budget, jitter=self._random.random())
        delivery.decision = verdict.decision
        self._recorder.fetch_failed(delivery, verdict.decision)
        return verdict

    async def _find_and_pursue(self, delivery: Delivery, request: RequestMessage) -> Verdict:
        """
        Find the route and make attempts there.

        Raises:
            MessageError: The request cannot be changed as the route wants it.
        """
        if self._cancels is not None and self._cancels.covers(delivery.message):
            self._recorder.withdrawn(delivery)
            return self._judge(delivery, Withdrawn())
        route = self._router.find(request, delivery.message.attributes)
        if route is None:
            return self._judge(delivery, NoRoute(model=request.model, path=request.path))
        if self._tenants is not None:
            await self._tenants.reserve(delivery, request)
        return await self._pursue(delivery, request, route)

    async def _pursue(self, delivery: Delivery, original: RequestMessage, route: Route) -> Verdict:
        """Make attempts until the verdict is not to hold, each where its route says at that time."""
        delay_s, serving, request, lane = 0.0, None, original, original.lane
        while True:
            waiting_since = self._clock()
            if delivery.attempts and self._cancels is not None and self._cancels.covers(delivery.message):
                self._recorder.withdrawn(delivery)
                return self._judge(delivery, Withdrawn(last=delivery.decision))
            choice = self._router.choose(route, delivery.message.key, lane, delivery.failed_at)
            if choice.route is not serving:
                serving = choice.route
                delivery.backend = serving.name
                request = serving.prepare(delivery.message, original)
            too_late = None if original.deadline is None else self._too_late(delivery, original.deadline, choice, lane)
            if too_late is not None:
                return self._judge(delivery, too_late)
            try:
                target, permit = await self._admit(delivery, request, choice, delay_s)
            except AdmissionMovedError:
                delay_s = 0.0
                continue
            except AdmissionError as error:
                not_admitted = NotAdmitted(last=delivery.decision, is_draining=isinstance(error, AdmissionClosedError))
                return self._judge(delivery, not_admitted, choice.health(lane))
            finally:
                if delivery.attempts:
                    delivery.held_s += self._clock() - waiting_since
            delivery.is_running = True
            try:
                verdict = await self._try(delivery, request, choice, target, permit)
            finally:
                delivery.is_running = False
            if verdict.decision.disposition is not Disposition.HOLD:
                return verdict
            delay_s = verdict.delay_s

    async def _try(
        self, delivery: Delivery, request: RequestMessage, choice: Choice, target: Target, permit: Permit
    ) -> Verdict:
        """Make the attempt that the permit is for, unless it is too late by now, and have it judged."""
        with permit:
            if self._is_late(request):
                return self._judge(delivery, DeadlinePassed(last=delivery.decision))
            delivery.backend = target.name
            if choice.is_fallback or delivery.failed_at:
                self._recorder.rerouted(delivery, is_fallback=choice.is_fallback)
            end, budget = await self._attempt(delivery, request, target, permit)
        if end.decision.error_class is not None and len(choice.route.targets) > 1:
            delivery.failed_at = (*delivery.failed_at, target.name)
        return await self._verdict(
            delivery,
            end,
            budget,
            lambda: choice.health(request.lane, target, delivery.failed_at),
            lambda: target.gate.is_in_doubt(request.lane),
        )

    async def _verdict(
        self,
        delivery: Delivery,
        end: AttemptEnd,
        budget: Budget,
        health: Callable[[], BackendHealth],
        is_in_doubt: Callable[[], bool],
    ) -> Verdict:
        """Have an attempt judged, a second time where it takes a moment to know whether others fail as well."""
        verdict = judge(end, budget, health(), jitter=self._random.random())
        if verdict.needs_outage_check:
            await wait_for(self._draining, self._outage_detection_s)
            if is_in_doubt():  # others under way are to tell
                await wait_for(self._draining, DOUBT_S)
            verdict = self._judge(delivery, structs.replace(end, is_outage_checked=True), health())
        delivery.decision = verdict.decision
        delivery.counted_attempts -= verdict.is_outage
        delivery.continuations += verdict.is_continuation
        self._recorder.attempt_judged(delivery, verdict.decision)
        return verdict

    def _admit(
        self, delivery: Delivery, request: RequestMessage, choice: Choice, delay_s: float
    ) -> Coroutine[Any, Any, tuple[Target, Permit]]:
        """Wait, once awaited, for one of the targets, no longer than lease, deadline and hold allow."""
        budget = self._budget(delivery)
        give_up_s = self._give_up_s(budget)
        if delivery.attempts:
            held = delivery.decision
            hold_max_s = held.hold_max_s if held and held.hold_max_s else budget.hold_max_s
            give_up_s = max(0.0, min(give_up_s, hold_max_s - budget.held_s))
        limited_s = 0.0 if delivery.limited_until is None else delivery.limited_until - self._clock()
        order = AdmissionOrder(
            priority=request.priority,
            deadline=request.deadline,
            publish_time=delivery.message.publish_time,
            held=delivery.attempts > 0,
            share=ALONE if self._tenants is None else self._tenants.share(delivery.message.source, request.tenant),
            limited=limited_s > 0.0,
            prefix=choice.route.prefix(request),
        )
        backend = choice.targets[0].backend
        streamed = request.body is not None and backend.streams(request.path, request.body)
        spare_s = None if delivery.is_tried_late else self._spare_s(budget, choice, request.lane)
        is_short = spare_s is not None and spare_s < give_up_s
        admission = self._router.admit(
            choice,
            order,
            key=delivery.message.key,
            lane_name=request.lane,
            give_up_s=spare_s if is_short and spare_s is not None else give_up_s,
            delay_s=max(delay_s, limited_s),
            streamed=streamed,
        )
        return self._admit_in_time(admission) if is_short else admission

    @staticmethod
    async def _admit_in_time(admission: Coroutine[Any, Any, tuple[Target, Permit]]) -> tuple[Target, Permit]:
        """Wait only as long as the deadline can be met, and then have it looked at again."""
        try:
            return await admission
        except AdmissionTimeoutError as error:
            raise AdmissionMovedError("its deadline may be too near") from error

    def _spare_s(self, budget: Budget, choice: Choice, lane: str | None) -> float | None:
        """Return for how long a request can wait and still meet its deadline; `None` where that is not known."""
        if budget.deadline_left_s is None or self._deadline_chance == 0.0:
            return None
        needed_s = choice.answer_s(lane, self._deadline_chance)
        return None if needed_s is None else max(0.0, budget.deadline_left_s - needed_s) + DEADLINE_SLACK_S

    def _too_late(
        self, delivery: Delivery, deadline: float, choice: Choice, lane: str | None
    ) -> DeadlinePassed | DeadlineUnreachable | None:
        """Return what is to be judged if an attempt would come too late."""
        left_s = deadline - self._wall_clock()
        if left_s <= 0.0:
            return DeadlinePassed(last=delivery.decision)
        if delivery.is_tried_late or self._deadline_chance == 0.0:
            return None
        needed_s = choice.answer_s(lane, self._deadline_chance)
        if needed_s is None or needed_s <= left_s:
            return None
        delivery.is_tried_late = choice.is_tried_late(lane)
        self._recorder.deadline_unreachable(delivery, is_tried=delivery.is_tried_late)
        return None if delivery.is_tried_late else DeadlineUnreachable(needed_s=needed_s, last=delivery.decision)

    async def _attempt(
        self, delivery: Delivery, request: RequestMessage, target: Target, permit: Permit
    ) -> tuple[AttemptEnd, Budget]:
        """Make one attempt and tell the gate how it ended."""
        result = delivery.start_attempt(self._clock(), self._wall_clock())
        decision = None
        self._recorder.attempt_starts(delivery)
        try:
            event = await self._attempts.send(delivery, request, target, permit)
            decision = target.decide(self._policy, event)
        except asyncio.CancelledError:
            if result.is_whole:  # an answer that exists is not thrown away
                delivery.event = event_of(delivery, request)
                delivery.decision = self._policy.classify(delivery.event).decision
            raise
        finally:
            delivery.resume_point = result.resume_point
            self._recorder.attempt_ends(delivery, decision)
        delivery.event, delivery.decision = event, decision
        end = AttemptEnd(
            event=event,
            decision=decision,
            can_resume=delivery.resume_point is not None,
            blame=record_failure(permit, decision),
        )
        budget = self._budget(delivery)
        told = report(end, budget, is_refusal_fresh=permit.is_refusal_fresh(), is_probe=permit.is_probe)
        work = result.usage.output if decision.error_class is None else None
        target.report(permit, told, work=work)
        return end, budget

    def _judge(self, delivery: Delivery, end: End, health: BackendHealth = HEALTHY) -> Verdict:
        return judge(end, self._budget(delivery), health, jitter=self._random.random())

    def _budget(self, delivery: Delivery) -> Budget:
        return self._limits.budget(
            delivery, now=self._clock(), now_unix=self._wall_clock(), is_draining=self._draining.is_set()
        )

    @staticmethod
    def _give_up_s(budget: Budget) -> float:
        """Return how long lease and deadline allow to wait."""
        if budget.deadline_left_s is None:
            return max(0.0, budget.lease_left_s)
        return max(0.0, min(budget.lease_left_s, budget.deadline_left_s + DEADLINE_SLACK_S))

    def _is_late(self, request: RequestMessage) -> bool:
        return request.deadline is not None and request.deadline <= self._wall_clock()

    def _conclude(self, delivery: Delivery, verdict: Verdict) -> Outcome:
        """Return the outcome of a final verdict."""
        decision = delivery.decision = verdict.decision
        if decision.disposition is not Disposition.REPLY:
            return Nack(reason="drain" if self._draining.is_set() else decision.error_class or "internal_error")
        return build_reply(delivery, decision, stats=self._recorder.stats(delivery))

    async def _settle(self, delivery: Delivery, outcome: Outcome) -> Settlement:
        match outcome:
            case AlreadyAnswered():
                self._recorder.duplicate_acked(delivery)
                return Settlement.ACK
            case Nack():
                self._recorder.nacked(delivery, outcome.reason)
                return Settlement.NACK
            case Reply():
                delivery.cancelled_at = await self._grace.finish(
                    self._publish(delivery, outcome), delivery.cancelled_at
                )
                if delivery.is_answered:
                    return Settlement.ACK
                self._recorder.unpublished(delivery, outcome)
                return Settlement.NACK

    async def _publish(self, delivery: Delivery, reply: Reply) -> None:
        """Put the answer on the topic and do what comes between that and the ack."""
        published = await self._replier.publish(delivery, reply)
        if published is None:
            return
        delivery.is_answered = True
        self._recorder.answered(delivery, published)
        await self._deduper.put(delivery, published)
        if self._dead_letters is not None:
            await self._dead_letters.copy(delivery.message, published)


def _is_only_withdrawn(delivery: Delivery) -> bool:
    """Say whether a cancelled task was cancelled for its request alone, and let it go on then."""
    if not delivery.is_withdrawn or delivery.task is None:
        return False
    return delivery.task.uncancel() == 0
