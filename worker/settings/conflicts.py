"""
Combinations of settings that cannot work together, though each value alone may stand.

Called once at start by `worker.settings.load`; every conflict is one sentence that begins with the key to change.
"""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from worker.settings.schema import (
    NO_BACKEND,
    BatchesSettings,
    HeaderRuleSettings,
    MetricGateSettings,
    RouteMatch,
    RouteSettings,
    SageMakerSettings,
    Settings,
    TenantSettings,
    TlsSettings,
)


def find_conflicts(settings: Settings) -> list[str]:
    """Return every combination of settings that cannot work, one sentence each; empty when there is none."""
    faults: list[str] = []
    pubsub, drain = settings.pubsub, settings.drain
    if not pubsub.request_subscription and not pubsub.subscriptions:
        faults.append("pubsub.request_subscription: is required (WORKER_PUBSUB__REQUEST_SUBSCRIPTION)")
    faults += _subscription_conflicts(settings)
    if not pubsub.response_topic:
        faults.append("pubsub.response_topic: is required (WORKER_PUBSUB__RESPONSE_TOPIC)")
    if settings.backend is None and not settings.routes:
        faults.append("backend.base_url: is required (WORKER_BACKEND__BASE_URL), or at least one of routes")
    if (settings.policy.hold_max_s or 0) > pubsub.max_lease_duration_s:
        faults.append("policy.hold_max_s: must not exceed pubsub.max_lease_duration_s, the lease ends first")
    if settings.payloads.is_used and settings.payloads.max_bytes > pubsub.max_in_flight_bytes:
        faults.append("payloads.max_bytes: must not exceed pubsub.max_in_flight_bytes")
    limit = drain.termination_grace_period_s
    if limit is not None and drain.grace_s + drain.settle_s >= limit:
        faults.append(
            f"drain: grace_s + settle_s ({drain.grace_s + drain.settle_s:g} s) must be less than "
            f"the pod's termination grace period ({limit:g} s), or SIGKILL ends the drain"
        )
    if settings.request.tenant_attribute is not None and settings.request.tenant_metadata_key is not None:
        faults.append("request.tenant_metadata_key: the tenant is named by an attribute already (tenant_attribute)")
    faults += _tenant_conflicts(settings)
    if settings.dedupe.store == "redis" and settings.dedupe.redis_url is None:
        faults.append("dedupe.redis_url: is required with dedupe.store redis")
    faults += _batches_conflicts(settings.batches)
    names = [route.name for route in settings.all_routes()]
    faults += [f"routes: the name {name!r} is used twice" for name in _repeated(names)]
    for route in settings.all_routes():
        where = section_of(route, settings)
        faults += [f"{where}.{fault}" for fault in _route_conflicts(route, settings)]
    faults += _unreachable_routes(settings)
    faults += _fallback_conflicts(settings)
    return faults


def _batches_conflicts(batches: BatchesSettings) -> list[str]:
    faults = []
    has_key = batches.webhook_signing_key is not None or batches.webhook_signing_key_file is not None
    if batches.webhook_url is not None and not has_key:
        faults.append("batches.webhook_signing_key: is required with batches.webhook_url")
    if "database_url" in batches.model_fields_set and batches.database_url_file is not None:
        faults.append("batches.database_url: excludes batches.database_url_file")
    if batches.webhook_signing_key is not None and batches.webhook_signing_key_file is not None:
        faults.append("batches.webhook_signing_key: excludes batches.webhook_signing_key_file")
    return faults


def section_of(route: RouteSettings, settings: Settings) -> str:
    """Return what a fault of a route begins with: where the operator wrote it."""
    return "backend" if route.name == "default" and settings.backend is not None else f"routes[{route.name}]"


def _route_conflicts(route: RouteSettings, settings: Settings) -> list[str]:
    faults: list[str] = []
    timeouts, window, drain = route.timeouts, route.window, settings.drain
    if not route.base_url and not route.base_urls and not route.is_sagemaker:
        faults.append("base_url: is required")
    faults += _target_conflicts(route)
    faults += _body_conflicts(route)
    if route.api_key is not None and route.api_key_file is not None:
        faults.append("api_key: excludes api_key_file")
    faults += _tls_conflicts(route)
    faults += _sagemaker_conflicts(route, route.sagemaker)
    faults += [
        f"timeouts.{name}: must not exceed timeouts.total_s ({timeouts.total_s:g} s)"
        for name in ("connect_s", "first_byte_s")
        if name in timeouts.model_fields_set
        and (getattr(timeouts, name) or 0) > timeouts.total_s  # a default gives way
    ]
    if timeouts.total_s > settings.pubsub.max_lease_duration_s:
        faults.append("timeouts.total_s: must not exceed pubsub.max_lease_duration_s")
    if drain.grace_s <= timeouts.total_s and not drain.cut_longer_requests:
        faults.append(
            f"timeouts.total_s: {timeouts.total_s:g} s is not less than drain.grace_s ({drain.grace_s:g} s), so a "
            "shutdown would cut requests; lower it, raise the grace, or accept it with drain.cut_longer_requests"
        )
    if route.continuation != "off" and route.stream == "never":
        faults.append("continuation: needs streams, and stream is never")
    if not window.min <= window.initial <= window.max:
        faults.append("window: needs min <= initial <= max")
    most = settings.pubsub.most_in_flight
    if "max" in window.model_fields_set and window.max > most:  # a default gives way
        of_all = " of all subscriptions" if settings.pubsub.subscriptions else ""
        faults.append(f"window.max: {window.max} exceeds pubsub.max_in_flight{of_all} ({most})")
    faults += [f"metric_gate.{fault}" for fault in _metric_gate_conflicts(route, route.metric_gate)]
    if route.breaker.probe_interval_s > route.breaker.max_probe_interval_s:
        faults.append("breaker.probe_interval_s: must not exceed breaker.max_probe_interval_s")
    return faults


def _metric_gate_conflicts(route: RouteSettings, gate: MetricGateSettings) -> list[str]:
    if not gate.is_used:
        return [] if gate == MetricGateSettings() else ["type: is required; it says where the numbers come from"]
    faults = _metric_source_conflicts(route, gate)
    if gate.stale_after_s < gate.interval_s + gate.timeout_s:
        faults.append("stale_after_s: must be at least interval_s + timeout_s, or one late reading makes it stale")
    if not gate.all_signals:
        faults.append("signals: at least one is required")
    is_query = gate.type == "prometheus"
    for number, signal in enumerate(gate.all_signals):
        where = f"signals.{number}"
        if is_query != bool(signal.query) or is_query == bool(signal.metric):
            faults.append(f"{where}: needs {'query' if is_query else 'metric'} alone with type {gate.type}")
        if is_query and signal.labels:
            faults.append(f"{where}.labels: belong into the query")
        if signal.whole_at == signal.closed_at:
            faults.append(f"{where}.closed_at: must differ from whole_at")
    names = [name for name, _ in gate.named_signals()]
    return [*faults, *(f"signals: the name {name!r} is used twice" for name in _repeated(names))]


def _metric_source_conflicts(route: RouteSettings, gate: MetricGateSettings) -> list[str]:
    faults: list[str] = []
    if not gate.url:
        if gate.type == "prometheus":
            faults.append("url: is required, of Prometheus")
        elif route.is_sagemaker:
            faults.append("url: is required, since an endpoint of SageMaker has no page of metrics")
        defaults = MetricGateSettings()
        faults += [
            f"{name}: needs url; a server's own page is read with the credentials of the route"
            for name in ("api_key", "api_key_file", "headers", "tls", "proxy")
            if getattr(gate, name) != getattr(defaults, name)
        ]
        return faults
    if gate.api_key is not None and gate.api_key_file is not None:
        faults.append("api_key: excludes api_key_file")
    if gate.tls.key_file is not None and gate.tls.cert_file is None:
        faults.append("tls.key_file: needs tls.cert_file")
    if gate.tls != TlsSettings() and not gate.url.startswith("https:"):
        faults.append("tls: needs a url that begins with https")
    return faults


def _tls_conflicts(route: RouteSettings) -> list[str]:
    faults: list[str] = []
    if route.tls.key_file is not None and route.tls.cert_file is None:
        faults.append("tls.key_file: needs tls.cert_file")
    is_https = any(each.base_url.startswith("https:") for each in route.targets())
    if route.tls != TlsSettings() and not is_https and not (route.is_sagemaker and not route.base_url):
        faults.append("tls: needs a base_url that begins with https")
    return faults


def _sagemaker_conflicts(route: RouteSettings, sagemaker: SageMakerSettings) -> list[str]:
    if not route.is_sagemaker:
        return [] if sagemaker == SageMakerSettings() else ["sagemaker.endpoint: is required for SageMaker"]
    faults = [
        f"{name}: has no meaning for SageMaker{why}"
        for name, is_set, why in (
            ("api_key", route.api_key is not None, ", which takes AWS's credentials"),
            ("api_key_file", route.api_key_file is not None, ", which takes AWS's credentials"),
            ("headers", bool(route.headers), ": they do not reach the container; custom_attributes does"),
            ("base_urls", bool(route.base_urls), ""),
            ("header_rules", route.header_rules != HeaderRuleSettings(), ": headers do not reach the container"),
            ("breaker.health_path", route.breaker.health_path is not None, ": an endpoint has none"),
        )
        if is_set
    ]
    if sagemaker.variants and sagemaker.target_variant:
        faults.append("sagemaker.variants: excludes sagemaker.target_variant")
    faults += [
        f"sagemaker.response_stream: SageMaker streams no answer to a request with {name}"
        for name in ("target_model", "enable_explanations")
        if getattr(sagemaker, name) and sagemaker.response_stream
    ]
    return faults


def _subscription_conflicts(settings: Settings) -> list[str]:
    pubsub = settings.pubsub
    if not pubsub.subscriptions:
        return []
    faults = ["pubsub.subscriptions: excludes pubsub.request_subscription"] if pubsub.request_subscription else []
    names = [each.name.rpartition("/")[2] for each in pubsub.subscriptions]
    faults += [f"pubsub.subscriptions: the name {name!r} stands twice" for name in _repeated(names)]
    least = min(source.max_in_flight_bytes for source in pubsub.sources())
    if settings.payloads.is_used and settings.payloads.max_bytes > least:
        faults.append(
            f"payloads.max_bytes: must not exceed a subscription's part of pubsub.max_in_flight_bytes ({least})"
        )
    return faults


def _tenant_conflicts(settings: Settings) -> list[str]:
    tenants, request = settings.tenants, settings.request
    faults: list[str] = []
    has_key = request.tenant_attribute is not None or request.tenant_metadata_key is not None
    if not has_key and tenants != TenantSettings():
        faults.append("tenants: needs request.tenant_attribute or request.tenant_metadata_key, which names the tenant")
    if tenants.weights and tenants.windows != "shared":
        faults.append("tenants.weights: need tenants.windows shared")
    names = [each.tenant for each in tenants.limits]
    faults += [f"tenants.limits: the tenant {name!r} stands twice" for name in _repeated(names)]
    if tenants.store == "redis" and tenants.redis_url is None:
        faults.append("tenants.redis_url: is required with tenants.store redis")
    for route in settings.all_routes():
        if route.header_rules.tenant is not None and not has_key:
            faults.append(f"{section_of(route, settings)}.header_rules.tenant: nothing names the tenant of a request")
    patterns = [price.model for price in settings.prices]
    for number, pattern in enumerate(patterns):
        first = next((each for each in patterns[:number] if _pattern_covers(each, pattern)), None)
        if first is not None:
            faults.append(f"prices: {pattern!r} can never be used, {first!r} takes all its models before it")
    return faults


def _target_conflicts(route: RouteSettings) -> list[str]:
    """Return what is wrong with the servers of a route."""
    faults: list[str] = []
    if route.base_url and route.base_urls:
        faults.append("base_urls: excludes base_url")
    targets = route.targets()
    names = [target.name.rpartition("/")[2] for target in targets]
    faults += [f"base_urls: the name {name!r} is used twice" for name in _repeated(names)]
    servers = [f"{target.base_url} (model {target.model})" if target.model else target.base_url for target in targets]
    faults += [f"base_urls: {server} stands twice" for server in _repeated(servers)]
    weighted = sum(target.weight is not None for target in route.base_urls)
    if 0 < weighted < len(route.base_urls):
        faults.append("base_urls: a weight for every server or for none")
    return faults


def _body_conflicts(route: RouteSettings) -> list[str]:
    defaults, overrides = route.body.defaults, route.body.overrides
    faults = [f"body.defaults: {key!r} is overridden anyway" for key in defaults if key in overrides]
    if "model" in overrides:
        faults.append("body.overrides: the model is replaced by the key model of the route")
    elif "model" in defaults and any(target.model for target in route.targets()):
        faults.append("body.defaults: the model is replaced anyway")
    rules = route.header_rules
    both = sorted(rules.from_attributes.keys() & rules.from_metadata.keys())
    faults += [f"header_rules.from_metadata: {name!r} comes from an attribute already" for name in both]
    return faults


def _unreachable_routes(settings: Settings) -> list[str]:
    """Return the routes that no request can reach: what they take, another one has taken before."""
    faults: list[str] = []
    before: list[RouteSettings] = []
    for route in settings.all_routes():
        where = section_of(route, settings)
        if route.only_fallback:
            if route.match != RouteMatch():
                faults.append(f"{where}.match: a route that is only a fallback takes no requests of its own")
            continue
        if route.base_url == NO_BACKEND or not (route.base_url or route.base_urls or route.is_sagemaker):
            continue
        first = next((each for each in before if _covers(each.match, route.match)), None)
        if first is not None and first.name != route.name:  # one name twice has a fault of its own
            faults.append(f"{where}: can never be used, {section_of(first, settings)} takes all its requests before it")
        paths = route.match.paths
        allowed = settings.request.allowed_paths
        if paths and all(_is_literal(path) and not _matches_any(path, allowed) for path in paths):
            faults.append(f"{where}.match.paths: can never be used, request.allowed_paths has none of them")
        before.append(route)
    return faults


def _fallback_conflicts(settings: Settings) -> list[str]:
    """Return fallbacks that lead nowhere or in a circle, and routes that wait for a fallback that no route names."""
    faults: list[str] = []
    routes = {route.name: route for route in settings.all_routes()}
    for route in routes.values():
        where = section_of(route, settings)
        if route.fallback is not None and route.fallback not in routes:
            faults.append(f"{where}.fallback: there is no route {route.fallback!r}")
        seen, step = [route.name], route.fallback
        while step in routes and step not in seen:
            seen.append(step)
            step = routes[step].fallback
        if step == route.name:
            faults.append(f"{where}.fallback: goes in a circle: {' -> '.join([*seen, step])}")
        if route.only_fallback and not any(each.fallback == route.name for each in routes.values()):
            faults.append(f"{where}.only_fallback: no route names it as its fallback")
    if routes and all(route.only_fallback for route in routes.values()):
        faults.append("routes: every one is only a fallback, none takes a request")
    return faults


def _covers(first: RouteMatch, second: RouteMatch) -> bool:
    """Whether the first certainly takes all that the second takes."""
    return (
        _all_cover(first.models, second.models)
        and _all_cover(first.paths, second.paths)
        and _keys_cover(first.metadata, second.metadata)
        and _keys_cover(first.attributes, second.attributes)
    )


def _keys_cover(first: Mapping[str, Sequence[str]], second: Mapping[str, Sequence[str]]) -> bool:
    return all(key in second and _all_cover(patterns, second[key]) for key, patterns in first.items())


def _all_cover(first: Sequence[str], second: Sequence[str]) -> bool:
    """Whether all that one of the second patterns matches is matched by one of the first; none match everything."""
    if not first or "*" in first:
        return True
    return bool(second) and all(any(_pattern_covers(one, other) for one in first) for other in second)


def _pattern_covers(one: str, other: str) -> bool:
    # A pattern whose only sign is * matches whatever a * of the other stands for, when it matches the * itself.
    return one == other or ("?" not in one and "[" not in one and fnmatchcase(other, one))


def _is_literal(pattern: str) -> bool:
    return not any(char in pattern for char in "*?[")


def _matches_any(text: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(text.partition("?")[0], pattern) for pattern in patterns)


def _repeated(names: Sequence[str]) -> list[str]:
    return sorted({name for name in names if names.count(name) > 1})
