"""
Routes: which requests are taken, which backend each goes to, and the gate in front of it.

Routes are tried in the order of the settings; the first whose patterns all match takes the request.
"""

import random
import re
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from functools import partial

import msgspec
from msgspec import structs

from worker.errors import MessageError, did_you_mean
from worker.flow.circuit import PROBE_JITTER, CircuitConfig
from worker.flow.clock import Clock
from worker.flow.evidence import ForbiddenRow
from worker.flow.gate import AttemptSignal, Permit, RouteGate
from worker.flow.lane import BreakerChange, BreakerEffect, BreakerScope
from worker.flow.window.adaptive import AdaptiveWindow
from worker.policy.backoff import Backoff
from worker.policy.blame import UNKNOWN, Blame
from worker.policy.engine import ErrorPolicy
from worker.policy.judge import HEALTHY, BackendHealth, Report
from worker.policy.model import BreakerAction, Decision, Disposition, ErrorClass, ErrorEvent, Scope
from worker.policy.table import FORBIDDEN_IN_A_ROW
from worker.ports import Backend
from worker.settings.schema import RequestSettings, RouteMatch, RouteSettings
from worker.wire.message import BODY_SHA256, ReceivedMessage, RequestMessage, decode_request, metadata_value

MAX_TENANT_CHARS = 100
"""Of a tenant's name; what is longer is cut, since names stand in metrics and logs."""
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_SCOPES = {Scope.MODEL: BreakerScope.LANE, Scope.BACKEND: BreakerScope.ROUTE}


class Route(msgspec.Struct, eq=False):
    """One backend with its gate."""

    name: str
    backend: Backend
    gate: RouteGate
    clock: Clock
    match: RouteMatch = msgspec.field(default_factory=RouteMatch)
    forbidden_row: ForbiddenRow = msgspec.field(default_factory=ForbiddenRow)
    foreign_headers: frozenset[str] = frozenset()
    """Headers that a message may set for other routes only: they are left out here."""

    def is_open(self) -> bool:
        """Whether a breaker, the route's or that of a model, keeps attempts back."""
        return self.gate.is_stopped()

    def health(self, lane: str | None) -> BackendHealth:
        """Return what the gate knows of the backend that concerns the next attempt of a `RequestMessage.lane`."""
        circuit = self.gate.stopping(lane)
        if circuit is None:
            return HEALTHY
        probe_at = circuit.next_probe_at
        return BackendHealth(
            stopped_by=ErrorClass(circuit.error_class) if circuit.error_class else ErrorClass.OVERLOADED,
            next_probe_s=None if probe_at is None else probe_at - self.clock.now(),
            has_others_waiting=self.gate.others_waiting(lane),
        )

    def decide(self, policy: ErrorPolicy, event: ErrorEvent) -> Decision:
        """Return what the policy proposes, and remember what that says about our credentials."""
        now = self.clock.now()
        in_a_row = self.forbidden_row.length(event.model, event.path, now)
        decision = policy.decide(event, forbidden_in_a_row=in_a_row)
        if decision.error_class is None:
            self.forbidden_row.served(now)
        elif decision.error_class is ErrorClass.FORBIDDEN or (
            decision.error_class is ErrorClass.AUTH and in_a_row >= FORBIDDEN_IN_A_ROW
        ):
            self.forbidden_row.forbidden(event.model, event.path)
        return decision

    def report(self, permit: Permit, report: Report, *, work: int | None = None) -> None:
        """
        End the permit and tell the gate how the attempt went.

        Args:
            permit: Of the attempt.
            report: What its end says about the backend.
            work: Output tokens of a good answer, where known.
        """
        permit.finish(
            AttemptSignal(
                breaker=BreakerEffect(report.breaker.value),
                overload=report.is_overload,
                error_class=report.error_class or "",
                scope=_SCOPES[report.scope],
                retry_after_s=report.retry_after_s,
                pause_s=report.pause_s,
                work=work,
            )
        )

    def takes(self, model: str | None, path: str) -> bool:
        """Whether every list of patterns that is given matches."""
        if self.match.models and not any(fnmatchcase(model or "", pattern) for pattern in self.match.models):
            return False
        return not self.match.paths or any(fnmatchcase(path, pattern) for pattern in self.match.paths)


def record_failure(permit: Permit, decision: Decision) -> Blame:
    """Note a failed attempt as evidence and return what is known about its message; nothing is noted of an answer."""
    if decision.breaker is BreakerAction.SUCCESS:
        return UNKNOWN
    if decision.disposition is Disposition.REPLY and decision.breaker is BreakerAction.NONE:
        return UNKNOWN
    return permit.record_failure(_SCOPES[decision.scope])


class Router:
    """Finds the route of a request; remembers nothing about requests."""

    def __init__(self, routes: Iterable[Route]) -> None:
        self.routes = tuple(routes)

    def find(self, model: str | None, path: str) -> Route | None:
        """Return the first route that takes it, `None` when there is none."""
        for route in self.routes:
            if route.takes(model, path):
                return route
        return None


def build_route(
    settings: RouteSettings,
    backend: Backend,
    clock: Clock,
    *,
    on_breaker_change: Callable[[str, BreakerChange], None] | None = None,
    foreign_headers: frozenset[str] = frozenset(),
    rng: random.Random | None = None,
) -> Route:
    """
    Return a route with its window and breaker behind a gate.

    Args:
        settings: Of the route.
        backend: Its server.
        clock: That of the running event loop.
        on_breaker_change: Called with the route's name when its breaker, or one of its models', opens or closes.
        foreign_headers: See `Route.foreign_headers`.
        rng: See `RouteGate`.
    """
    window, breaker = settings.window, settings.breaker
    probe = Backoff(base_s=breaker.probe_interval_s, max_s=breaker.max_probe_interval_s, jitter=PROBE_JITTER)
    gate = RouteGate(
        lambda: AdaptiveWindow(window.initial, window.min, window.max, now=clock.now),
        CircuitConfig(failures=breaker.failures, probe=probe),
        clock,
        on_change=None if on_breaker_change is None else partial(on_breaker_change, settings.name),
        rng=rng,
    )
    return Route(
        name=settings.name,
        backend=backend,
        gate=gate,
        clock=clock,
        match=settings.match,
        foreign_headers=frozenset() if settings.is_sagemaker else foreign_headers,
    )


class RequestReader:
    """
    Reads requests.

    Args:
        rules: Paths and headers that may be asked for.
        check_uri: Raises ValueError for a `body_uri` that is not allowed; `None` where none is.
    """

    def __init__(self, rules: RequestSettings, check_uri: Callable[[str], None] | None = None) -> None:
        self._rules = rules
        self._check_uri = check_uri
        self._usual_paths = frozenset(rules.allowed_paths)

    def read(self, message: ReceivedMessage) -> RequestMessage:
        """
        Return the request of a message; its body is there, or its `body_uri` is allowed.

        Raises:
            MessageError: It cannot be read, or asks for what is not allowed; permanent.
        """
        request = decode_request(message.data)
        path = request.path.partition("?")[0]
        if path not in self._usual_paths and not any(
            fnmatchcase(path, pattern) for pattern in self._rules.allowed_paths
        ):
            near = did_you_mean(path, self._usual_paths)
            raise MessageError(f"path {path} is not allowed{near}", param="path", metadata=request.metadata)
        for name in request.headers:
            if name not in self._rules.allowed_headers:
                raise MessageError(f"header {name!r} is not allowed", param="headers", metadata=request.metadata)
        tenant = self._tenant(message, request)
        if tenant is not None:
            request = structs.replace(request, tenant=tenant[:MAX_TENANT_CHARS])
        return request if request.body_uri is None else self._referring(message, request, request.body_uri)

    def _referring(self, message: ReceivedMessage, request: RequestMessage, uri: str) -> RequestMessage:
        """Return a request whose body is an object, with what the message says about that object."""
        if self._check_uri is None:
            raise MessageError("body_uri is not accepted by this worker", param="body_uri", metadata=request.metadata)
        try:
            self._check_uri(uri)
        except ValueError as error:
            raise MessageError(f"body_uri {error}", param="body_uri", metadata=request.metadata) from None
        sha256 = message.attributes.get(BODY_SHA256)
        if sha256 is None:
            return request
        if _SHA256.fullmatch(sha256) is None:
            reason = f"attribute {BODY_SHA256} must be 64 hex digits"
            raise MessageError(reason, param="body_uri", metadata=request.metadata)
        return structs.replace(request, body_sha256=sha256.lower())

    def _tenant(self, message: ReceivedMessage, request: RequestMessage) -> str | None:
        if self._rules.tenant_attribute is not None:
            return message.attributes.get(self._rules.tenant_attribute)
        if self._rules.tenant_metadata_key is not None:
            value = metadata_value(request.metadata, self._rules.tenant_metadata_key)
            return value[1:-1] if value is not None and value.startswith('"') else value
        return None


class IntakePause:
    """
    Pauses the start of attempts for reasons that concern the whole worker.

    Each reason pauses every gate; the gates resume when the last reason is gone.  Attempts under way go on, leases are
    kept, and since no slot frees, the broker's flow control stops the pull.

    Args:
        routes: Their gates are paused and resumed.
        on_change: Called with a reason and whether it holds now.
    """

    def __init__(self, routes: Iterable[Route], on_change: Callable[[str, bool], None]) -> None:
        self._gates = [route.gate for route in routes]
        self._on_change = on_change
        self._reasons: set[str] = set()

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why nothing is started; empty while nothing is paused."""
        return tuple(sorted(self._reasons))

    def set(self, reason: str, holds: bool) -> None:
        """Add or remove a reason; idempotent."""
        if holds == (reason in self._reasons):
            return
        if holds:
            self._reasons.add(reason)
        else:
            self._reasons.discard(reason)
        self._on_change(reason, holds)
        for gate in self._gates:
            if self._reasons:
                gate.pause()
            else:
                gate.resume()
