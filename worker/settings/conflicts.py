"""
Combinations of settings that cannot work together, though each value alone may stand.

Called once at start by `worker.settings.load`; every conflict is one sentence that begins with the key to change.
"""

from worker.settings.schema import BatchesSettings, RouteSettings, SageMakerSettings, Settings, TlsSettings


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
    if not route.base_url and not route.is_sagemaker:
        faults.append("base_url: is required")
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
    if window.max > settings.pubsub.max_in_flight:
        faults.append(f"window.max: {window.max} exceeds pubsub.max_in_flight ({settings.pubsub.max_in_flight})")
    if route.breaker.probe_interval_s > route.breaker.max_probe_interval_s:
        faults.append("breaker.probe_interval_s: must not exceed breaker.max_probe_interval_s")
    return faults


def _tls_conflicts(route: RouteSettings) -> list[str]:
    faults: list[str] = []
    if route.tls.key_file is not None and route.tls.cert_file is None:
        faults.append("tls.key_file: needs tls.cert_file")
    is_https = route.base_url.startswith("https:") or (route.is_sagemaker and not route.base_url)
    if route.tls != TlsSettings() and not is_https:
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
