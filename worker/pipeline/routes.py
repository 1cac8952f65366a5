"""
Routes: which requests are taken, which server each goes to, and what is changed in it on the way.

Routes are tried in the order of the settings; the first whose patterns all match takes the request.  A route has one
*target*, which is a server with a gate, or several:

* without weights a request goes to the target that lets it start first (`flow.several`);
* with weights the message's id determines the target, so that a redelivery goes to the same one, until that is stopped.

A failure at one target is tried at another at once where `policy.judge` says so.  A route that has been stopped for
longer than `fallback_after_s` leaves its requests to its fallback, but for those that are its probes.

Which target a request may go to is determined before each attempt, since backends stop and recover while it waits
(`Router.choose`).  What waits for a target that has stopped is moved once a second (`Router.move_waiting`).
"""

import math
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from hashlib import blake2b

import msgspec
from msgspec import structs

from worker.errors import MessageError, did_you_mean
from worker.flow.circuit import PROBE_JITTER, CircuitConfig
from worker.flow.clock import Clock
from worker.flow.evidence import ForbiddenRow
from worker.flow.gate import AttemptSignal, Permit, RouteGate
from worker.flow.lane import BreakerChange, BreakerEffect, BreakerScope
from worker.flow.queue import AdmissionOrder
from worker.flow.several import admit_to_any
from worker.flow.shares import RouteLoad
from worker.flow.window.adaptive import AdaptiveWindow
from worker.policy.backoff import Backoff
from worker.policy.blame import UNKNOWN, Blame
from worker.policy.engine import ErrorPolicy
from worker.policy.judge import HEALTHY, BackendHealth, Report
from worker.policy.model import BreakerAction, Decision, Disposition, ErrorClass, ErrorEvent, Scope
from worker.policy.table import FORBIDDEN_IN_A_ROW
from worker.ports import Backend
from worker.settings.schema import HeaderRuleSettings, RequestSettings, RouteMatch, RouteSettings, Settings
from worker.wire.body import BodyRules
from worker.wire.http import is_header
from worker.wire.message import BODY_SHA256, ReceivedMessage, RequestMessage, decode_request, metadata_value
from worker.wire.prefix import prompt_prefix

MAX_TENANT_CHARS = 100
"""Of a tenant's name; what is longer is cut, since names stand in metrics and logs."""
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_SCOPES = {Scope.MODEL: BreakerScope.LANE, Scope.BACKEND: BreakerScope.ROUTE}


class Target(msgspec.Struct, eq=False):
    """One server with its gate."""

    name: str
    """That of the route, and after a slash its own where the route has several."""
    backend: Backend
    gate: RouteGate
    clock: Clock
    known_models: Sequence[str] = ()
    """Names and patterns of models that its route is for."""
    weight: float | None = None
    rename: BodyRules | None = None
    """Gives the model the name that it has at this server; `None` where the route's rules do."""
    time_left_header: str | None = None
    """Tells the server how long it is to the request's deadline."""
    forbidden_row: ForbiddenRow = msgspec.field(default_factory=ForbiddenRow)
    foreign_headers: frozenset[str] = frozenset()
    """Headers that a message may set for other routes only: they are left out here."""

    def is_open(self) -> bool:
        """Whether a breaker, the server's or that of a model, keeps attempts back."""
        return self.gate.is_stopped()

    def works(self, lane: str | None) -> bool:
        """Whether no breaker keeps the attempts of a `RequestMessage.lane` back."""
        return self.gate.stopped_since(lane) is None

    def takes_more(self, lane: str | None) -> bool:
        """Whether it works and its metric gate is not closed."""
        return self.works(lane) and self.gate.part > 0.0

    def health(self, lane: str | None) -> BackendHealth:
        """Return what the gate knows of the server that concerns the next attempt of a lane."""
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


def record_failure(permit: Permit, decision: Decision) -> Blame:
    """Note a failed attempt as evidence and return what is known about its message; nothing is noted of an answer."""
    if decision.breaker is BreakerAction.SUCCESS:
        return UNKNOWN
    if decision.disposition is Disposition.REPLY and decision.breaker is BreakerAction.NONE:
        return UNKNOWN
    return permit.record_failure(_SCOPES[decision.scope])


class Route(msgspec.Struct, eq=False):
    """What takes a request: one target or several, and how the request is changed for them."""

    name: str
    targets: Sequence[Target]
    clock: Clock
    match: RouteMatch = msgspec.field(default_factory=RouteMatch)
    is_only_fallback: bool = False
    fallback: "Route | None" = None
    fallback_after_s: float = 0.0
    body_rules: BodyRules | None = None
    headers: HeaderRuleSettings | None = None
    prefix_bytes: int = 0
    """Requests whose prompts begin with the same so many bytes are started one after the other; 0: no heed is paid."""

    @property
    def is_plain(self) -> bool:
        """Whether its requests can go to one target only."""
        return self.fallback is None and len(self.targets) == 1

    def takes(self, request: RequestMessage, attributes: Mapping[str, str]) -> bool:
        """Whether every list of patterns that is given matches."""
        match = self.match
        if self.is_only_fallback:
            return False
        if match.models and not _matches(request.model or "", match.models):
            return False
        if match.paths and not _matches(request.path, match.paths):
            return False
        for key, patterns in match.attributes.items():
            value = attributes.get(key)
            if value is None or (patterns and not _matches(value, patterns)):
                return False
        for key, patterns in match.metadata.items():
            value = _metadata_text(request, key)
            if value is None or (patterns and not _matches(value, patterns)):
                return False
        return True

    def prefix(self, request: RequestMessage) -> int | None:
        """Return what is the same for requests whose prompts begin alike; `None` where that does not count."""
        if not self.prefix_bytes or request.body is None:
            return None
        return prompt_prefix(request.body, self.prefix_bytes)

    def prepare(self, message: ReceivedMessage, request: RequestMessage) -> RequestMessage:
        """
        Return the request as this route's targets get it; the same one where nothing is to be changed.

        Its model, and so its lane, is the one that the requester named.

        Raises:
            MessageError: Its body cannot be changed, or an attribute cannot stand in a header; permanent.
        """
        if self.body_rules is not None and request.body is not None:
            try:
                body = self.body_rules.apply(request.body)
            except ValueError as error:
                reason = f"body cannot be changed as the operator wants it: it {error}"
                raise MessageError(reason, param="body", metadata=request.metadata) from None
            request = structs.replace(request, body=body)
        if self.headers is not None:
            request = structs.replace(request, headers=self._headers(self.headers, message, request))
        return request

    @staticmethod
    def _headers(rules: HeaderRuleSettings, message: ReceivedMessage, request: RequestMessage) -> Mapping[str, str]:
        headers = {name: value for name, value in request.headers.items() if name not in rules.drop}
        sources = {name: message.attributes.get(key) for name, key in rules.from_attributes.items()}
        sources |= {name: _metadata_text(request, key) for name, key in rules.from_metadata.items()}
        if rules.tenant is not None:
            sources[rules.tenant] = request.tenant
        if rules.priority is not None:
            sources[rules.priority] = str(request.priority)
        for name, value in sources.items():
            if value is None:
                continue
            if not is_header(name, value):
                raise MessageError(f"the header {name} cannot have its value", metadata=request.metadata)
            headers[name] = value
        return headers

    def candidates(self, message_id: str, lane: str | None, failed_at: Sequence[str] = ()) -> Sequence[Target]:
        """
        Return the targets that a message may go to now.

        Args:
            message_id: Determines the target where they have weights.
            lane: Of the request.
            failed_at: Names of targets that have failed it; left out as long as another one works.
        """
        targets = self.targets
        if len(targets) == 1:
            return targets
        if failed_at:
            targets = [each for each in targets if each.name not in failed_at and each.takes_more(lane)] or targets
        if targets[0].weight is None:
            return targets
        assigned = _by_weight(targets, message_id)
        if assigned.works(lane) or assigned.gate.wants_probe(lane):
            return (assigned,)
        working = [each for each in targets if each.works(lane)]
        return (_by_weight(working, message_id),) if working else (assigned,)

    def stopped_for_s(self, lane: str | None) -> float | None:
        """Return how long all targets have been stopped for a lane, seconds; `None` while one of them works."""
        since = 0.0
        for target in self.targets:
            stopped_since = target.gate.stopped_since(lane)
            if stopped_since is None:
                return None
            since = max(since, stopped_since)
        return self.clock.now() - since

    def wants_probe(self, lane: str | None) -> bool:
        """Whether a stopped target would let an attempt of a lane start now."""
        return any(target.gate.wants_probe(lane) for target in self.targets)

    def load(self) -> RouteLoad:
        """Return what waits behind open circuits and pauses; a message that waits at several targets counts once."""
        loads = [target.gate.load() for target in self.targets]
        return RouteLoad(
            waiting=min(load.waiting for load in loads),
            has_working_lane=any(load.has_working_lane for load in loads),
            many_fail=any(load.many_fail for load in loads),
        )


class Choice(msgspec.Struct, frozen=True):
    """Where one attempt may go."""

    route: Route
    targets: Sequence[Target]
    is_fallback: bool = False

    def answer_s(self, lane: str | None, share: float) -> float | None:
        """Return the time than which a share of the recent answers were faster where they are fastest, seconds."""
        times = [target.gate.answer_s(lane, share) for target in self.targets]
        return None if None in times else min(each for each in times if each is not None)

    def is_tried_late(self, lane: str | None) -> bool:
        """Count a request whose deadline is too near, and return whether it is sent all the same."""
        return self.targets[0].gate.is_tried_late(lane)

    def health(self, lane: str | None, failed: Target | None = None, failed_at: Sequence[str] = ()) -> BackendHealth:
        """
        Return what concerns the next attempt of a request.

        Args:
            lane: Of the request.
            failed: The target of its latest attempt; `None` if no attempt could start.
            failed_at: Names of the targets that have failed it, the latest one included.
        """
        route = self.route
        if route.is_plain:
            return route.targets[0].health(lane)
        health = (failed or self.targets[0]).health(lane)
        others = [each for each in route.targets if each is not failed and each.takes_more(lane)]
        if not others:
            return health
        if failed is None:
            return HEALTHY
        has_untried = any(each.name not in failed_at for each in others)
        return structs.replace(health, next_probe_s=None, has_untried_target=has_untried)


class Router:
    """
    Finds the route of a request and the targets of each attempt; remembers nothing about requests.

    Args:
        routes: In the order in which they are tried.
        rng: Chooses among targets that are equally loaded.
    """

    def __init__(self, routes: Iterable[Route], rng: random.Random | None = None) -> None:
        self.routes = tuple(routes)
        self.targets = tuple(target for route in self.routes for target in route.targets)
        self._rng = rng or random.Random()  # noqa: S311 - no secret
        self._choices = {route.name: Choice(route, route.targets) for route in self.routes}

    def find(self, request: RequestMessage, attributes: Mapping[str, str]) -> Route | None:
        """Return the first route that takes it, `None` when there is none."""
        for route in self.routes:
            if route.takes(request, attributes):
                return route
        return None

    def choose(self, route: Route, message_id: str, lane: str | None, failed_at: Sequence[str] = ()) -> Choice:
        """Return where the next attempt of a message goes that `route` takes; see `Route.candidates`."""
        if route.is_plain:
            return self._choices[route.name]
        serving = self._serving(route, lane)
        return Choice(serving, serving.candidates(message_id, lane, failed_at), is_fallback=serving is not route)

    @staticmethod
    def _serving(route: Route, lane: str | None) -> Route:
        """Return the first of a route and its fallbacks that has not been stopped for too long; else the route."""
        step: Route | None = route
        while step is not None:
            stopped_for_s = step.stopped_for_s(lane)
            if stopped_for_s is None or stopped_for_s < step.fallback_after_s or step.wants_probe(lane):
                return step
            step = step.fallback
        return route

    async def admit(
        self,
        choice: Choice,
        order: AdmissionOrder,
        *,
        key: str,
        lane_name: str | None,
        give_up_s: float,
        delay_s: float,
        streamed: bool,
    ) -> tuple[Target, Permit]:
        """
        Wait until an attempt may start; see `RouteGate.admit`.

        Cancellation: as there.
        """
        targets = choice.targets
        if len(targets) == 1:
            target = targets[0]
            permit = await target.gate.admit(
                order, key=key, lane_name=lane_name, give_up_s=give_up_s, delay_s=delay_s, streamed=streamed
            )
            return target, permit
        permit = await admit_to_any(
            [target.gate for target in targets],
            order,
            clock=choice.route.clock,
            rng=self._rng,
            key=key,
            lane_name=lane_name,
            give_up_s=give_up_s,
            delay_s=delay_s,
            streamed=streamed,
        )
        return next(target for target in targets if target.gate is permit.gate), permit

    def move_waiting(self) -> int:
        """Let what waits for a target that has stopped be admitted anew if another one works; return how many."""
        moved = 0
        for route in self.routes:
            elsewhere = [each for each in self.routes if each is route.fallback or each.fallback is route]
            if len(route.targets) == 1 and not elsewhere:
                continue
            for target in route.targets:
                if target.is_open():
                    moved += target.gate.move_stopped(partial(_patience_s, route, target, elsewhere))
        return moved


def _patience_s(route: Route, stopped: Target, elsewhere: Sequence[Route], lane: str) -> float:
    """Return how long the messages of a lane wait for a target that has stopped, seconds."""
    if any(each.works(lane) for each in route.targets if each is not stopped):
        return math.inf if stopped.weight is None else 0.0  # without weights they wait at all targets
    if any(each.works(lane) for other in elsewhere for each in other.targets):
        return route.fallback_after_s if route.fallback is not None else 0.0
    return math.inf


def _matches(text: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(text, pattern) for pattern in patterns)


def _metadata_text(request: RequestMessage, key: str) -> str | None:
    """Return a text of the metadata, or another value as JSON; `None` where it is absent or null."""
    value = metadata_value(request.metadata, key)
    if value is None or not value.startswith('"'):
        return value
    try:
        return msgspec.json.decode(value, type=str)
    except msgspec.DecodeError:  # half of a surrogate pair
        return value[1:-1]


def _by_weight(targets: Sequence[Target], message_id: str) -> Target:
    """Return the target of a message: each gets its share of the ids, and no message changes its own."""
    share = int.from_bytes(blake2b(message_id.encode(), digest_size=7).digest()) / 2**56
    left = share * sum(target.weight or 0.0 for target in targets)
    for target in targets:
        left -= target.weight or 0.0
        if left < 0.0:
            return target
    return targets[-1]


def build_routes(
    settings: Settings,
    backends: Mapping[str, Backend],
    clock: Clock,
    *,
    on_breaker_change: Callable[[str, BreakerChange], None] | None = None,
    foreign_headers: frozenset[str] = frozenset(),
    rng: random.Random | None = None,
) -> tuple[Route, ...]:
    """
    Return all routes, with the fallbacks among them.

    Args:
        settings: Free of conflicts.
        backends: The server of each target, by its name (`RouteSettings.targets`).
        clock: That of the running event loop.
        on_breaker_change: See `build_route`.
        foreign_headers: See `Target.foreign_headers`.
        rng: See `RouteGate`.
    """
    routes = {
        route.name: build_route(
            route,
            [backends[each.name] for each in route.targets()],
            clock,
            on_breaker_change=on_breaker_change,
            foreign_headers=foreign_headers,
            rng=rng,
        )
        for route in settings.all_routes()
    }
    for route in settings.all_routes():
        if route.fallback is not None:
            routes[route.name].fallback = routes[route.fallback]
    return tuple(routes.values())


def build_route(
    settings: RouteSettings,
    backends: Sequence[Backend],
    clock: Clock,
    *,
    on_breaker_change: Callable[[str, BreakerChange], None] | None = None,
    foreign_headers: frozenset[str] = frozenset(),
    rng: random.Random | None = None,
) -> Route:
    """
    Return a route without its fallback, each target with window and breaker behind a gate.

    Args:
        settings: Of the route.
        backends: One for each of its targets.
        clock: That of the running event loop.
        on_breaker_change: Called with a target's name when its breaker, or one of its models', opens or closes.
        foreign_headers: See `Target.foreign_headers`.
        rng: See `RouteGate`.
    """
    window, breaker = settings.window, settings.breaker
    probe = Backoff(base_s=breaker.probe_interval_s, max_s=breaker.max_probe_interval_s, jitter=PROBE_JITTER)
    names = {each.model for each in settings.targets()}
    is_renamed_by_target = len(names) > 1
    targets = []
    for number, (each, backend) in enumerate(zip(settings.targets(), backends, strict=True)):
        gate = RouteGate(
            lambda: AdaptiveWindow(window.initial, window.min, window.max, now=clock.now),
            CircuitConfig(failures=breaker.failures, probe=probe),
            clock,
            on_change=None if on_breaker_change is None else partial(on_breaker_change, each.name),
            rng=rng,
        )
        targets.append(
            Target(
                name=each.name,
                backend=backend,
                gate=gate,
                clock=clock,
                known_models=settings.match.models,
                foreign_headers=frozenset() if settings.is_sagemaker else foreign_headers,
                weight=settings.base_urls[number].weight if settings.base_urls else None,
                time_left_header=settings.header_rules.time_left_ms,
                rename=BodyRules({}, {"model": each.model}) if is_renamed_by_target and each.model else None,
            )
        )
    overrides = dict(settings.body.overrides)
    if not is_renamed_by_target and None not in names:
        overrides["model"] = names.pop()
    rules = BodyRules(settings.body.defaults, overrides)
    return Route(
        name=settings.name,
        targets=tuple(targets),
        clock=clock,
        match=settings.match,
        is_only_fallback=settings.only_fallback,
        fallback_after_s=settings.fallback_after_s,
        body_rules=rules or None,
        headers=settings.header_rules if settings.header_rules != HeaderRuleSettings() else None,
        prefix_bytes=settings.group_by_prefix_bytes,
    )


class RequestReader:
    """
    Reads requests.

    Args:
        rules: Paths and headers that may be asked for.
        check_uri: Raises ValueError for a `body_uri` that is not allowed; `None` where none is.
        shares_windows: Tenants have no windows of their own.
    """

    def __init__(
        self, rules: RequestSettings, check_uri: Callable[[str], None] | None = None, *, shares_windows: bool = False
    ) -> None:
        self._rules = rules
        self._shares_windows = shares_windows
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
            request = structs.replace(request, tenant=tenant[:MAX_TENANT_CHARS], shares_window=self._shares_windows)
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
        targets: Their gates are paused and resumed.
        on_change: Called with a reason and whether it holds now.
    """

    def __init__(self, targets: Iterable[Target], on_change: Callable[[str, bool], None]) -> None:
        self._gates = [target.gate for target in targets]
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
