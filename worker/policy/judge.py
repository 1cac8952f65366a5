"""
What is done with a delivery: the only code that says reply, nack or hold.

Theory of operation.  Whatever can end a step of a delivery is a value: an attempt ended (`AttemptEnd`), the gate let it
not start (`NotAdmitted`), its deadline passed (`DeadlinePassed`) or is too near (`DeadlineUnreachable`), no route takes
it (`NoRoute`), its sender has cancelled it (`Withdrawn`), the worker has to stop (`Cancelled`), the worker's own code
failed (`Unexpected`).  `judge` turns such a value, together with what is left to spend (`Budget`) and what the gate
knows of the backend (`BackendHealth`), into a `Verdict`.  `report` says what the gate learns of an attempt; the gate
applies it as it is.  `inference-worker policy explain` runs this code.

The kind of a failure comes from the table, the operator's rules and the hooks (`engine`), as a proposed `Decision`.
Here it meets the circumstances, in this order:

1. A deadline that cut the attempt is no failure of the backend.
2. A broken stream that can be resumed here is held: another process would generate it anew.
3. A failure that is the message's own, since others are served (`blame`), is not held.  A refused connection is none.
4. A failure that another server of the same route may not have is held, and tried there at once.
5. A failure that others share is an outage: it is held, and the attempt does not count (`OUTAGE_DETECTION_S`).
6. The budgets have the last word: attempts of the class, deadline, lease, hold time, drain, last delivery attempt.

Nothing here reads a clock, draws a random number or keeps state.
"""

from dataclasses import replace

import msgspec
from msgspec import structs

from worker.policy.blame import UNKNOWN, Blame, is_in_doubt, speaks_against_backend
from worker.policy.budgets import Budget, apply_budgets, next_delay_s
from worker.policy.model import BreakerAction, Decision, Disposition, ErrorClass, ErrorEvent, Fault, Scope
from worker.policy.own_replies import (
    INTERNAL,
    INTERRUPTED,
    WITHDRAWN,
    deadline_passed,
    deadline_unreachable,
    never_started,
    no_route,
)

OUTAGE_DETECTION_S = 1.0
"""How long a failure that counts against the breaker waits before it is nacked: if others fail as well within it, the
breaker opens, the failure is the backend's and no delivery attempt is spent.  Far below any retry policy's backoff."""
MAX_OUTAGE_RETRIES = 30
"""Failures of one message that are attributed to outages, and no more than twice its delivery attempts.  The same
failure behind an open breaker is an outage, or a prompt that kills its server while nothing else is sent that could
tell; after this many (with probes every four seconds: after minutes as the only probe) the message is nacked and runs
out of attempts."""
OUTAGE_RETRIES_PER_ATTEMPT = 2
"""So a message that always fails is sent at most three times as often as it may be delivered."""
MAX_OWN_FAILURES = 5
"""Failures of a message's own after which it is answered where the subscription counts no delivery attempts."""
CONTRADICTED_PROBE_WAIT_S = 1.0
"""After a probe whose failure says nothing: until the next probe, which is another message where one waits."""
PAUSING_MESSAGES = 2
"""So many messages must be refused with Retry-After, none served between them, before the window pauses for it."""
MAX_COSTLY_OUTAGE_RETRIES = 5
"""The same for failures that cost the server something: a restart where the request may have taken it down, which is
minutes of GPU time, or the generation of an answer that cannot be read.  A refusal costs nothing."""
MAX_CONTINUATIONS = 5
"""Times one delivery is held to be resumed, whatever its class allows: a connection that breaks again and again may
hold elsewhere."""
DEADLINE_MARGIN_S = 0.05
"""An attempt that ended so shortly before its deadline was cut by it: timers and clocks differ by less."""
MAX_RETRY_AFTER_PAUSE_S = 60.0
"""Longest pause of the window for a Retry-After: an hour named in one 429 must not stop a route that serves others."""
MIN_PROBE_WAIT_S = 0.1

_COSTLY = frozenset(
    {
        ErrorClass.CONNECTION_LOST,
        ErrorClass.ABORTED,
        ErrorClass.STREAM_BROKEN,
        ErrorClass.STREAM_IDLE,
        ErrorClass.TIMEOUT,
        ErrorClass.MALFORMED,
    }
)
_ERRORS = 400
_CONTINUATION = "continuation"


class AttemptEnd(msgspec.Struct, frozen=True, kw_only=True):
    """An attempt ended, well or not."""

    event: ErrorEvent
    decision: Decision
    """Proposed by table, rules and hooks."""
    can_resume: bool = False
    """The next attempt in this process can go on from what this one had generated."""
    blame: Blame = UNKNOWN
    """Of a failure: what is known about the message and the others of its lane."""
    is_outage_checked: bool = False
    """The wait that `Verdict.needs_outage_check` asks for is over."""


class NotAdmitted(msgspec.Struct, frozen=True, kw_only=True):
    """The gate did not let an attempt start."""

    last: Decision | None = None
    """About the latest attempt; `None` when there was none."""
    is_draining: bool = False
    """The gate is closed; otherwise the time for waiting is over."""


class DeadlinePassed(msgspec.Struct, frozen=True, kw_only=True):
    """The request's deadline passed before an attempt could start."""

    last: Decision | None = None
    """About the latest attempt; `None` when there was none."""


class DeadlineUnreachable(msgspec.Struct, frozen=True, kw_only=True):
    """The request's deadline is nearer than nearly all recent answers took."""

    needed_s: float
    """What these took at least, seconds."""
    last: Decision | None = None
    """About the latest attempt; `None` when there was none."""


class Cancelled(msgspec.Struct, frozen=True, kw_only=True):
    """The worker was stopped while the delivery was worked on."""

    last: Decision | None = None
    """About the latest attempt, a whole answer included; `None` when none was judged."""


class Withdrawn(msgspec.Struct, frozen=True, kw_only=True):
    """The requester wants no answer any more."""

    last: Decision | None = None
    """About the latest attempt, a whole answer included; `None` when none was judged."""


class NoRoute(msgspec.Struct, frozen=True, kw_only=True):
    """No backend takes the request."""

    model: str | None
    path: str


class Unexpected(msgspec.Struct, frozen=True):
    """The worker's own code raised an exception."""


End = AttemptEnd | NotAdmitted | DeadlinePassed | DeadlineUnreachable | Withdrawn | Cancelled | NoRoute | Unexpected


class BackendHealth(msgspec.Struct, frozen=True, kw_only=True):
    """What the gate knows of the backend that concerns one delivery's next attempt."""

    stopped_by: ErrorClass | None = None
    """The class that opened the breaker of the route, or else of the model; `None` while both are closed."""
    next_probe_s: float | None = None
    """Seconds until that breaker lets a probe through; `None` when it is closed or a probe is under way."""
    has_others_waiting: bool = False
    """Other messages could be the next probe."""
    has_untried_target: bool = False
    """Another server of the same route works and has not failed this message."""


HEALTHY = BackendHealth()


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What the gate learns of an attempt; it is applied as it stands."""

    breaker: BreakerAction
    scope: Scope = Scope.MODEL
    error_class: ErrorClass | None = None
    is_overload: bool = False
    """The window decreases."""
    retry_after_s: float | None = None
    """The backend's hint, for the next probe of an open breaker; seconds."""
    pause_s: float | None = None
    """The window admits nothing for this long; seconds."""


SERVED = Report(breaker=BreakerAction.SUCCESS)


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What is done with the delivery."""

    decision: Decision
    """Its disposition is what happens; its rule names everything that had a part."""
    delay_s: float = 0.0
    """Of a hold: seconds before the next attempt."""
    is_outage: bool = False
    """The attempt is attributed to an outage and does not count against its class's limit."""
    is_continuation: bool = False
    """Held so that the next attempt resumes the broken stream."""
    needs_outage_check: bool = False
    """Not final: ask again, with `is_outage_checked`, after `OUTAGE_DETECTION_S`, in which others may fail as well."""


def report(end: AttemptEnd, budget: Budget, *, is_refusal_fresh: bool = True, is_probe: bool = False) -> Report:
    """
    Return what the gate learns of an attempt.

    A failure that the success of others contradicts changes neither breaker nor window.  An overload is first of all
    the window's affair: a crowd that is refused together is one sign for the breaker, so that only a refusal the window
    has not reacted to yet counts there, or that of a probe.

    Args:
        end: How the attempt ended.
        budget: With the time until the request's deadline.
        is_refusal_fresh: The window has not been decreased since the attempt started.
        is_probe: The attempt decides about an open breaker.
    """
    decision = end.decision
    if decision.breaker is BreakerAction.SUCCESS:
        return SERVED
    if _is_cut_by_deadline(end, budget):
        return Report(breaker=BreakerAction.NONE)  # short deadlines must not open the breaker
    blame = blame_for(decision, end.blame)
    if blame.is_contradicted:
        return Report(
            breaker=BreakerAction.NONE,
            scope=decision.scope,
            error_class=decision.error_class,
            retry_after_s=CONTRADICTED_PROBE_WAIT_S,
        )
    breaker, pause_s = decision.breaker, None
    if decision.is_overload:
        if decision.retry_after_s is not None and _is_heard_by_several(blame):
            pause_s = min(decision.retry_after_s, MAX_RETRY_AFTER_PAUSE_S)
        if breaker is BreakerAction.COUNT and not is_refusal_fresh and not is_probe:
            breaker = BreakerAction.NONE
    return Report(
        breaker=breaker,
        scope=decision.scope,
        error_class=decision.error_class,
        is_overload=decision.is_overload,
        retry_after_s=decision.retry_after_s,
        pause_s=pause_s,
    )


def blame_for(decision: Decision, blame: Blame) -> Blame:
    """
    Return what is known about a failure of this class.

    A connection that is refused is no message's own trouble, whoever is served before or after it.
    """
    if decision.error_class is not ErrorClass.CONNECT:
        return blame
    return structs.replace(blame, is_contradicted=False, is_served_since=False)


def judge(  # noqa: PLR0911 - one return a kind of end
    end: End, budget: Budget, health: BackendHealth = HEALTHY, *, jitter: float = 0.0
) -> Verdict:
    """
    Return what is done with a delivery.

    Args:
        end: What happened.
        budget: What is left to spend on the delivery.
        health: What the gate knows of the backend after the report.
        jitter: A uniform random number in [0, 1), for the wait before the next attempt.
    """
    match end:
        case AttemptEnd():
            blame = blame_for(end.decision, end.blame)
            return _judge_attempt(structs.replace(end, blame=blame), budget, health, jitter)
        case DeadlinePassed():
            return Verdict(decision=deadline_passed(end.last))
        case DeadlineUnreachable():
            return Verdict(decision=deadline_unreachable(end.needed_s, end.last))
        case NoRoute():
            return Verdict(decision=no_route(end.model, end.path))
        case NotAdmitted():
            return Verdict(decision=apply_budgets(_not_admitted(end, budget, health), budget))
        case Withdrawn():
            is_answered = end.last is not None and end.last.error_class is None
            return Verdict(decision=end.last if is_answered and end.last is not None else WITHDRAWN)
        case Cancelled():
            if end.last is not None and end.last.disposition is Disposition.REPLY:
                return Verdict(decision=end.last)  # the answer was whole when its attempt was cut
            nacked = replace(end.last or INTERRUPTED, disposition=Disposition.NACK)
            return Verdict(decision=apply_budgets(nacked, structs.replace(budget, is_draining=True)))
        case Unexpected():
            counted = max(budget.counted_attempts, 1)  # something was tried: the message's age may end it
            return Verdict(decision=apply_budgets(INTERNAL, structs.replace(budget, counted_attempts=counted)))


def _not_admitted(end: NotAdmitted, budget: Budget, health: BackendHealth) -> Decision:
    if end.last is not None:
        return replace(end.last, disposition=Disposition.NACK)
    if budget.deadline_left_s is not None and budget.deadline_left_s <= 0:
        return deadline_passed()
    if end.is_draining and health.stopped_by is None:
        return INTERRUPTED
    return never_started(health.stopped_by or ErrorClass.OVERLOADED)


def _judge_attempt(end: AttemptEnd, budget: Budget, health: BackendHealth, jitter: float) -> Verdict:
    decision = end.decision
    if _is_cut_by_deadline(end, budget):
        return Verdict(decision=deadline_passed())
    if decision.disposition is Disposition.REPLY:
        return Verdict(decision=decision)
    is_stopped = health.stopped_by is not None
    is_continuation = is_outage = False
    if end.blame.is_own(is_refusal=decision.is_overload):
        decision, budget = _own(decision, budget, end.blame)
    if decision.disposition is Disposition.NACK:
        reason = _reason_to_go_on(decision, end, budget, health)
        if reason is not None:
            is_continuation = reason == _CONTINUATION
            decision = _held(decision, reason)
        elif _may_be_outage(decision, end.blame):
            if not is_stopped and not end.is_outage_checked and not budget.is_draining:
                return Verdict(decision=decision, needs_outage_check=True)
            retries = max(budget.outage_retries, end.blame.failures)
            if is_stopped and not budget.is_draining and retries <= _max_outage_retries(decision, budget):
                is_outage = True
                decision = replace(_held(decision, "outage"), max_attempts=None)
    if is_outage:
        budget = structs.replace(budget, counted_attempts=budget.counted_attempts - 1)
    delay_s = _delay_s(decision, budget, health, end.blame, jitter)
    return Verdict(
        decision=apply_budgets(decision, budget, delay_s=delay_s),
        delay_s=delay_s,
        is_outage=is_outage,
        is_continuation=is_continuation,
    )


def _own(decision: Decision, budget: Budget, blame: Blame) -> tuple[Decision, Budget]:
    """Return decision and budget of a failure that is the message's own: it is not held, and ends in an answer."""
    if decision.disposition is Disposition.HOLD:
        decision = replace(decision, disposition=Disposition.NACK, rule=f"{decision.rule}+own")
    if budget.max_delivery_attempts is None or budget.delivery_attempt is None:
        decision = replace(decision, max_attempts=min(decision.max_attempts or MAX_OWN_FAILURES, MAX_OWN_FAILURES))
        budget = structs.replace(budget, counted_attempts=max(budget.counted_attempts, blame.failures))
    return decision, budget


def _may_be_outage(decision: Decision, blame: Blame) -> bool:
    """Say whether others may fail in the same way."""
    # Contradicted once is not enough: at the beginning of an outage, what began a little later is still served.
    return not blame.is_own(is_refusal=decision.is_overload) and decision.breaker is BreakerAction.COUNT


def _reason_to_go_on(decision: Decision, end: AttemptEnd, budget: Budget, health: BackendHealth) -> str | None:
    """Return why the next attempt is worth making here and now, `None` if nothing speaks for that."""
    if end.can_resume and health.stopped_by is None and budget.continuations < MAX_CONTINUATIONS:
        return _CONTINUATION
    # Another server may serve what this one did not, unless the request may cost that one as much.
    is_elsewhere = health.has_untried_target and not budget.is_draining and decision.error_class not in _COSTLY
    return "failover" if is_elsewhere and _may_be_outage(decision, end.blame) else None


def _held(decision: Decision, reason: str) -> Decision:
    return replace(decision, disposition=Disposition.HOLD, rule=f"{decision.rule}+{reason}")


def _is_heard_by_several(blame: Blame) -> bool:
    """Say whether more messages were refused in a row than chance explains."""
    row = blame.others_failing + 1
    if is_in_doubt(row, blame.failing_share, blame.undecided):
        return False
    return speaks_against_backend(row, PAUSING_MESSAGES, blame.failing_share, blame.undecided)


def _own_backoff(decision: Decision, blame: Blame) -> Decision:
    """
    Return the decision without a Retry-After that concerns the message at most.

    Such a message is tried again with its class's backoff: if others were served meanwhile, its next failures are its
    own, and it does not occupy a lease for the hint's time.
    """
    if blame.undecided == 0 or _is_heard_by_several(blame):
        return decision
    return replace(decision, retry_after_s=None)


def _max_outage_retries(decision: Decision, budget: Budget) -> int:
    most = MAX_COSTLY_OUTAGE_RETRIES if decision.error_class in _COSTLY else MAX_OUTAGE_RETRIES
    if budget.max_delivery_attempts is None:
        return most
    return min(most, OUTAGE_RETRIES_PER_ATTEMPT * budget.max_delivery_attempts)


def _delay_s(decision: Decision, budget: Budget, health: BackendHealth, blame: Blame, jitter: float) -> float:
    """
    Return the wait before a held message's next attempt, seconds.

    Behind an open breaker it is just long enough that another message is the next probe: if the probe were always the
    same message, a prompt that kills its server could keep the breaker open.  Where another server of the route works
    there is nothing to wait for.
    """
    if health.has_untried_target:
        return 0.0
    if health.stopped_by is None:
        return next_delay_s(_own_backoff(decision, blame), budget.attempts, jitter)
    if health.next_probe_s is None or not health.has_others_waiting:
        return 0.0
    return (1.0 + jitter) * max(MIN_PROBE_WAIT_S, health.next_probe_s)


def _is_cut_by_deadline(end: AttemptEnd, budget: Budget) -> bool:
    """Say whether the request's own deadline ended the attempt, which says nothing about the backend."""
    event = end.event
    if event.fault is not Fault.TOTAL_TIMEOUT or budget.deadline_left_s is None or (event.status or 0) >= _ERRORS:
        return False
    return budget.deadline_left_s <= DEADLINE_MARGIN_S
