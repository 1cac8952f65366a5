"""
One attempt against one backend: invoke it, have the policy judge how it ended, tell the route's gate.

Nothing here waits for admission, counts budgets or settles: that is the processor's.
"""

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import replace

from worker.delivery import Delivery
from worker.errors import BackendError
from worker.flow.breaker import BreakerEffect, BreakerScope
from worker.flow.circuit import CircuitStatistics
from worker.flow.gate import AttemptSignal, Permit
from worker.pipeline.routes import Route
from worker.pipeline.verdicts import TOO_LATE
from worker.policy.answers import asks_about_nothing
from worker.policy.budgets import next_delay_s
from worker.policy.engine import ErrorPolicy
from worker.policy.model import BreakerAction, Decision, Disposition, ErrorClass, ErrorEvent, Fault, Scope
from worker.ports import AttemptResult, BackendRequest
from worker.telemetry.logs import get_logger
from worker.telemetry.record import Recorder, output_tokens
from worker.telemetry.tracing import NO_TRACER, Tracer
from worker.wire.message import RequestMessage

SUSPICION_S = 1.0
"""How long a failure that counts against the breaker waits before it is handed back: if others fail as well within it,
the breaker opens, the backend is to blame and no delivery attempt is spent.  Far below any retry policy's backoff."""

MAX_EXCUSED = 30
"""Failures of one delivery that are laid at the backend's door.  The same failure behind an open breaker is an outage,
or a prompt that kills its server while nothing else is sent that could tell; so after this many (with probes every
five seconds: after minutes of being the only probe) the message is handed back and runs out of attempts."""
MAX_EXCUSED_CRASHES = 5
"""The same for failures that look as if the request had taken the server down: each costs a restart, which is minutes
of GPU time, where an error that was answered costs nothing."""
MAX_CONTINUATIONS = 5
"""Times one delivery is kept to be continued, whatever its class allows: a connection that breaks again and again may
hold elsewhere."""
MAX_RETRY_AFTER_PAUSE_S = 60.0
"""Longest Retry-After of an overload for which a route admits nothing: a pause yields no answers that could correct a
wrong hint."""
DEADLINE_MARGIN_S = 0.05
"""An attempt that ended so shortly before its deadline was cut by it: timers and clocks differ by less."""

_ANSWERED = frozenset({ErrorClass.MALFORMED, ErrorClass.EMPTY_CHOICES})
"""A backend that answers with success, only not what was asked for, is not away: more likely it is the request."""
_CRASHES = frozenset(
    {
        ErrorClass.CONNECTION_LOST,
        ErrorClass.ABORTED,
        ErrorClass.STREAM_BROKEN,
        ErrorClass.STREAM_IDLE,
        ErrorClass.TIMEOUT,
    }
)
_FORBIDDEN = 403
_ERRORS = 400

_log = get_logger("attempts")


class Attempts:
    """
    Makes attempts.

    Args:
        policy: Judges how each ended.
        recorder: Counts them.
        send_idempotency_key: Whether `Idempotency-Key` carries the message id.
        suspicion_s: See `SUSPICION_S`.
        tracer: Is told about each.
        wall_clock: Unix seconds.
    """

    def __init__(
        self,
        policy: ErrorPolicy,
        recorder: Recorder,
        *,
        send_idempotency_key: bool = False,
        suspicion_s: float = SUSPICION_S,
        tracer: Tracer = NO_TRACER,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._policy = policy
        self._recorder = recorder
        self._send_idempotency_key = send_idempotency_key
        self._suspicion_s = suspicion_s
        self._tracer = tracer
        self._wall_clock = wall_clock
        self._random = random.Random()  # noqa: S311 - jitter

    async def make(self, delivery: Delivery, request: RequestMessage, route: Route, permit: Permit) -> Decision:
        """
        Make one attempt with the permit and return what is to be done, before the budgets.

        Cancellation: the connection is closed and the permit given back with a signal that says nothing.  An answer
        that was whole by then is judged all the same, in `delivery.decision`.
        """
        decision: Decision | None = None
        try:
            decision = await self._make(delivery, request, route, permit)
        finally:
            self._tracer.attempt_ends(delivery, decision)
        return decision

    async def _make(self, delivery: Delivery, request: RequestMessage, route: Route, permit: Permit) -> Decision:
        with permit:
            event = await self._invoke(delivery, request, route, permit)
            if self._was_cut_by_deadline(event, request):
                return TOO_LATE  # that says nothing about the backend: short deadlines must not open the breaker
            decision = await self._policy.decide(event, consecutive_forbidden=route.forbidden_in_a_row)
            if decision.breaker is BreakerAction.SUCCESS:
                permit.finish(AttemptSignal(breaker=BreakerEffect.SUCCESS, work=output_tokens(delivery.result)))
            else:
                self._report_failure(permit, decision, route, request.model)
        return decision

    async def _invoke(self, delivery: Delivery, request: RequestMessage, route: Route, permit: Permit) -> ErrorEvent:
        result = delivery.result = AttemptResult()
        delivery.tries += 1
        delivery.charged_tries += 1
        fault, detail = None, ""
        self._recorder.attempt_starts(delivery)
        self._tracer.attempt_starts(delivery)
        try:
            await route.backend.invoke(self._backend_request(delivery, request, permit), result)
        except BackendError as error:
            fault, detail = Fault(error.fault), error.detail
        except asyncio.CancelledError:
            if result.is_whole:  # an answer that exists is not thrown away
                delivery.event = self._event(delivery, request, route, None, "")
                delivery.decision = self._policy.judge(delivery.event).decision
            raise
        except Exception as error:  # noqa: BLE001 - a fault of ours must end in a settlement
            self._recorder.internal_error(delivery)
            fault, detail = Fault.INTERNAL, repr(error)
        finally:
            self._recorder.attempt_ends()
            delivery.resume_point = result.resume_point
        if result.status == _FORBIDDEN:
            route.forbidden_in_a_row += 1
        elif fault is None and result.status is not None and result.status < 300:  # noqa: PLR2004
            route.forbidden_in_a_row = 0
        event = delivery.event = self._event(delivery, request, route, fault, detail)
        return event

    @staticmethod
    def _event(
        delivery: Delivery, request: RequestMessage, route: Route, fault: Fault | None, detail: str
    ) -> ErrorEvent:
        result = delivery.result or AttemptResult()
        return ErrorEvent(
            backend=route.name,
            path=request.path,
            model=request.model,
            phase=result.phase,
            status=result.status,
            headers=result.headers,
            body=result.body,
            fault=fault,
            detail=detail,
            in_stream=result.in_stream,
            has_partial=result.content_events > 0,
            input_is_empty=asks_about_nothing(request.path, request.body or b""),
            delivery_attempt=delivery.message.delivery_attempt,
            attempts=delivery.tries,
        )

    def _was_cut_by_deadline(self, event: ErrorEvent, request: RequestMessage) -> bool:
        if event.fault is not Fault.TOTAL_TIMEOUT or request.deadline is None or (event.status or 0) >= _ERRORS:
            return False
        return self._wall_clock() >= request.deadline - DEADLINE_MARGIN_S

    def _backend_request(self, delivery: Delivery, request: RequestMessage, permit: Permit) -> BackendRequest:
        message = delivery.message
        headers = dict(request.headers)
        headers["x-request-id"] = f"{message.message_id}-{message.delivery_attempt or 1}-{delivery.tries}"
        if self._send_idempotency_key:
            headers["idempotency-key"] = message.message_id
        self._tracer.inject(delivery, headers)
        assert request.body is not None
        return BackendRequest(
            path=request.path,
            body=request.body,
            headers=headers,
            stream_requested=request.stream,
            timeout_s=None if request.deadline is None else max(0.0, request.deadline - self._wall_clock()),
            resume_point=delivery.resume_point,
            on_connected=permit.connected if permit.is_probe else None,
            on_first_token=permit.first_byte,
        )

    def _report_failure(self, permit: Permit, decision: Decision, route: Route, model: str | None) -> None:
        was_blocked, was_open = route.blocked_by(model) is not None, route.is_open()
        permit.finish(failure_signal(decision, is_fresh=permit.is_refusal_fresh(), is_probe=permit.is_probe))
        is_open, circuit = route.is_open(), route.blocked_by(model)
        if circuit is not None and (not was_blocked or (is_open and not was_open)):
            error_class = circuit.error_class or ""
            self._recorder.breaker_opened(route.name, error_class)
            whose = {} if is_open else {"model": model}
            _log.warning("breaker_opened", backend=route.name, error_class=error_class, **whose)

    @staticmethod
    def keep_for_continuation(delivery: Delivery, route: Route, decision: Decision) -> Decision:
        """
        Hold instead of handing back when the next attempt here can go on from what a broken stream had generated.

        Another process would begin anew, since what was salvaged lives in this one only.  The try counts against its
        class's limit like any other, and the budgets have the last word.  Behind an open breaker nothing is changed:
        there `discount_outage` decides, and what it holds is continued all the same.
        """
        is_possible = delivery.resume_point is not None and delivery.continuations < MAX_CONTINUATIONS
        if decision.disposition is not Disposition.NACK or not is_possible or _blocking(delivery, route) is not None:
            return decision
        delivery.continuations += 1
        return replace(decision, disposition=Disposition.HOLD, rule=f"{decision.rule}+continuation")

    async def discount_outage(
        self, delivery: Delivery, route: Route, decision: Decision, draining: asyncio.Event
    ) -> Decision:
        """
        Hold instead of handing back when the failure turns out to be the backend's: others fail at the same time.

        Without it an outage that answers 500 would cost every message in flight at its start one delivery attempt.  A
        prompt that kills its server is not protected by it: while the others are served the breaker stays closed.

        Cancellation: leaves nothing behind.
        """
        is_blameless = decision.error_class in _ANSWERED or decision.breaker is not BreakerAction.COUNT
        if decision.disposition is not Disposition.NACK or is_blameless:
            return decision
        if _blocking(delivery, route) is None:
            await _wait(draining, self._suspicion_s)
        limit = MAX_EXCUSED_CRASHES if decision.error_class in _CRASHES else MAX_EXCUSED
        is_excused = delivery.tries - delivery.charged_tries < limit
        if _blocking(delivery, route) is None or draining.is_set() or not is_excused:
            return decision
        delivery.charged_tries -= 1
        return replace(decision, disposition=Disposition.HOLD, rule=f"{decision.rule}+outage", max_tries=None)

    def delay_s(self, delivery: Delivery, route: Route, decision: Decision) -> float:
        """
        Return the wait before a held message's next try, seconds.

        Behind an open breaker it is just long enough that another message is the next probe: were it always the same
        one, a prompt that kills its server could keep the breaker open.
        """
        circuit = _blocking(delivery, route)
        if circuit is None:
            return next_delay_s(decision, delivery.tries, self._random)
        probe_at = circuit.next_probe_at
        if probe_at is None or route.gate.statistics().waiting == 0:
            return 0.0
        return self._random.uniform(1.0, 2.0) * max(0.1, probe_at - route.clock.now())


def failure_signal(decision: Decision, *, is_fresh: bool, is_probe: bool) -> AttemptSignal:
    """
    Return what the gate is told of an attempt that failed.

    Args:
        decision: What the policy says of it.
        is_fresh: See `Permit.is_refusal_fresh`.
        is_probe: See `Permit.is_probe`.
    """
    effect, pause_s = BreakerEffect(decision.breaker.value), None
    if decision.is_overload:
        # The window answers for capacity.  The breaker counts one failure for all attempts refused together, so that
        # it opens when refusals go on although the window has decreased.
        if effect is BreakerEffect.TRIP:
            effect = BreakerEffect.COUNT
        if not (is_fresh or is_probe):
            effect = BreakerEffect.NONE
        if decision.retry_after_s is not None:
            pause_s = min(decision.retry_after_s, MAX_RETRY_AFTER_PAUSE_S)
    return AttemptSignal(
        breaker=effect,
        overload=decision.is_overload,
        pause_s=pause_s,
        error_class=decision.error_class or "",
        scope=BreakerScope.MODEL if decision.scope is Scope.MODEL else BreakerScope.ROUTE,
        retry_after_s=decision.retry_after_s,
    )


def _blocking(delivery: Delivery, route: Route) -> CircuitStatistics | None:
    """Return the circuit that keeps the delivery's next try back, the route's or its model's."""
    return route.blocked_by(delivery.request.model if delivery.request is not None else None)


async def _wait(event: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return
