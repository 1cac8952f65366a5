"""
Combinations of settings that cannot work together, though each value alone may stand.

Called once at start by `worker.settings.load`; every conflict is one sentence that begins with the key to change.
"""

from worker.settings.schema import BatchesSettings, RouteSettings, Settings, TlsSettings


def find_conflicts(settings: Settings) -> list[str]:
    """Return every combination of settings that cannot work, one sentence each; empty when there is none."""
    faults: list[str] = []
    pubsub, drain = settings.pubsub, settings.drain
    if not pubsub.request_subscription:
        faults.append("pubsub.request_subscription: is required (WORKER_PUBSUB__REQUEST_SUBSCRIPTION)")
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
    if settings.dedupe.store == "redis" and settings.dedupe.redis_url is None:
        faults.append("dedupe.redis_url: is required with dedupe.store redis")
    faults += _batches_conflicts(settings.batches)
    names = [route.name for route in settings.all_routes()]
    faults += [f"routes: the name {name!r} is used twice" for name in sorted({n for n in names if names.count(n) > 1})]
    for route in settings.all_routes():
        where = section_of(route, settings)
        faults += [f"{where}.{fault}" for fault in _route_conflicts(route, settings)]
    return faults


def _batches_conflicts(batches: BatchesSettings) -> list[str]:
    if batches.webhook_url is not None and batches.webhook_signing_key is None:
        return ["batches.webhook_signing_key: is required with batches.webhook_url"]
    return []


def section_of(route: RouteSettings, settings: Settings) -> str:
    """Return what a fault of a route begins with: where the operator wrote it."""
    return "backend" if route.name == "default" and settings.backend is not None else f"routes[{route.name}]"


def _route_conflicts(route: RouteSettings, settings: Settings) -> list[str]:
    faults: list[str] = []
    timeouts, window, drain = route.timeouts, route.window, settings.drain
    if not route.base_url:
        faults.append("base_url: is required")
    if route.api_key is not None and route.api_key_file is not None:
        faults.append("api_key: excludes api_key_file")
    faults += _tls_conflicts(route)
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
    if window.max > settings.pubsub.max_in_flight:
        faults.append(f"window.max: {window.max} exceeds pubsub.max_in_flight ({settings.pubsub.max_in_flight})")
    if route.breaker.probe_interval_s > route.breaker.max_probe_interval_s:
        faults.append("breaker.probe_interval_s: must not exceed breaker.max_probe_interval_s")
    return faults


def _tls_conflicts(route: RouteSettings) -> list[str]:
    faults: list[str] = []
    if route.tls.key_file is not None and route.tls.cert_file is None:
        faults.append("tls.key_file: needs tls.cert_file")
    if route.tls != TlsSettings() and not route.base_url.startswith("https:"):
        faults.append("tls: needs a base_url that begins with https")
    return faults
