"""Numbers that stand in several files and must agree: times, sizes, and what scaling is decided by."""

import re
from typing import Any

import pytest

from tests.deploy import manifests
from tests.deploy.manifests import VARIANTS, Variant
from worker.batches.serve import API_GRACE_S, COLLECTOR_GRACE_S, SETTLE_S
from worker.service import FIRST_PULL_S
from worker.telemetry.metrics import catalogue

PROCESS_BYTES = 120_000_000
"""What a worker takes before any payload; the bound is one of the program's promises."""
PART_BYTES = 8 << 20
"""Of an object in a bucket that is read or written piece by piece (`worker.payloads.objects`)."""
METRIC_LAG_S = 240
"""Cloud Monitoring shows the backlog two to four minutes late."""
PARTS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30}


def test_the_program_accepts_every_variant(variant: Variant):
    """The mounted worker.yaml under the pod's environment is a configuration the program starts with."""
    settings = variant.settings()
    assert settings.pubsub.project_id
    assert settings.pubsub.request_subscription == "inference-requests-worker"
    assert settings.pubsub.response_topic == "inference-responses"


def test_the_program_knows_its_grace_period(variant: Variant):
    """The variable that the program checks its drain against is the pod's own grace period."""
    grace = variant.pod["terminationGracePeriodSeconds"]
    assert variant.environ["WORKER_DRAIN__TERMINATION_GRACE_PERIOD_S"] == str(grace)
    assert variant.settings().drain.termination_grace_period_s == grace


def test_the_time_budget_holds(variant: Variant):
    """Request < drain < drain and settling < grace period; Spot gives up the first, and says so."""
    settings, grace = variant.settings(), variant.pod["terminationGracePeriodSeconds"]
    drain = settings.drain
    assert drain.grace_s < drain.grace_s + drain.settle_s < grace
    longest = max(route.timeouts.total_s for route in settings.all_routes())
    if variant.name == "with-spot":
        assert (grace, drain.grace_s, drain.settle_s) == (15, 8, 5)
        assert drain.cut_longer_requests is True
    else:
        assert longest < drain.grace_s
        assert drain.cut_longer_requests is False
        assert grace == 600, "GKE's node scale-down waits ten minutes at most"


def test_the_batches_api_ends_within_its_grace_period():
    """What it finishes after SIGTERM, and the time that the Service needs to notice, fit into it."""
    part = manifests.variant("with-batches").batches
    grace = part.pod["terminationGracePeriodSeconds"]
    waits = part.container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert waits + max(API_GRACE_S, COLLECTOR_GRACE_S + SETTLE_S) < grace


def test_the_batches_api_has_memory_for_its_answers():
    """Leased twice over, beside the process and eight parts of uploads or files."""
    part = manifests.variant("with-batches").batches
    resources = part.container["resources"]
    assert resources["requests"]["memory"] == resources["limits"]["memory"]
    needed = PROCESS_BYTES + 2 * part.settings().pubsub.max_in_flight_bytes + 8 * PART_BYTES
    assert needed <= _bytes(resources["limits"]["memory"])


def test_a_rollout_outlives_the_drain(variant: Variant):
    """Draining pods do not make a rollout count as stuck, nor does it take capacity away."""
    spec = variant.deployment["spec"]
    assert spec["progressDeadlineSeconds"] > variant.pod["terminationGracePeriodSeconds"]
    assert spec["strategy"]["rollingUpdate"] == {"maxSurge": "25%", "maxUnavailable": 0}


def test_a_pod_that_is_turned_away_replaces_none(variant: Variant):
    """A new pod counts only after its first pull has lasted, and after one more look of the readiness probe."""
    wait_s = variant.deployment["spec"]["minReadySeconds"]
    assert wait_s > FIRST_PULL_S + variant.container["readinessProbe"]["periodSeconds"]


def test_probes_have_their_time(variant: Variant):
    """Start-up has two minutes, a stuck loop one, and a stuck process no drain."""
    startup, liveness = variant.container["startupProbe"], variant.container["livenessProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] == 120
    assert liveness["periodSeconds"] * liveness["failureThreshold"] == 60
    assert liveness["terminationGracePeriodSeconds"] == 30


def test_memory_holds_what_is_in_flight(variant: Variant):
    """The limit covers the process and twice the bytes it may lease; the request equals it."""
    resources = variant.container["resources"]
    assert resources["requests"]["memory"] == resources["limits"]["memory"]
    assert "cpu" not in resources["limits"]
    pubsub = variant.settings().pubsub
    assert PROCESS_BYTES + 2 * pubsub.max_in_flight_bytes <= _bytes(resources["limits"]["memory"])


def test_a_pod_takes_what_it_can_run(variant: Variant):
    """It leases the requests it may run and a few more, so that the first pods do not hoard the queue."""
    settings = variant.settings()
    assert settings.backend is not None
    window = settings.backend.window
    assert window.initial <= window.max <= settings.pubsub.max_in_flight <= 1.5 * window.max


KEDA = ("gke", "with-keda-zero", "with-podmonitor", "with-spot")
HPA = ("with-hpa", "with-hpa-gke")


@pytest.fixture(params=KEDA)
def scaled(request: pytest.FixtureRequest) -> Variant:
    """A variant that KEDA scales."""
    return manifests.variant(request.param)


def _spec(variant: Variant) -> dict[str, Any]:
    (found,) = variant.of_kind("ScaledObject")
    return dict(found["spec"])


def test_who_scales_what(variant: Variant):
    """The lists above name every variant with an autoscaler."""
    assert bool(variant.of_kind("ScaledObject")) == (variant.name in KEDA)
    assert bool(variant.of_kind("HorizontalPodAutoscaler")) == (variant.name in HPA)


def test_targets_follow_the_formula(scaled: Variant):
    """The backlog's target is a multiple of what a pod runs at once, the load's is four fifths of it."""
    backlog, load = _spec(scaled)["triggers"]
    settings = scaled.settings()
    assert settings.backend is not None
    at_once = settings.backend.window.max
    assert int(backlog["metadata"]["threshold"]) >= at_once, "a lower target buys pods that cannot be filled"
    assert int(load["metadata"]["threshold"]) == round(0.8 * at_once)


def test_lost_metrics_remove_no_pod(scaled: Variant):
    """A metric that cannot be read is not an empty queue: it holds the number and never means zero."""
    spec = _spec(scaled)
    assert spec["fallback"] == {"failureThreshold": 4, "replicas": 1, "behavior": "currentReplicasIfHigher"}
    backlog, load = spec["triggers"]
    assert backlog["metadata"]["ignoreNullValues"] == "false"
    assert load["metadata"]["ignoreNullValues"] == "true", "no pod reports: nothing is in flight"
    assert {trigger["metricType"] for trigger in spec["triggers"]} == {"AverageValue"}


def test_zero_is_a_choice(scaled: Variant):
    """Only the component made for it goes down to no pod."""
    assert _spec(scaled)["minReplicaCount"] == (0 if scaled.name == "with-keda-zero" else 1)


def test_triggers_ask_for_what_exists(scaled: Variant):
    """The subscription is the worker's, the project its project, the gauge one the worker has."""
    backlog, load = _spec(scaled)["triggers"]
    environ = scaled.environ
    for trigger in (backlog, load):
        assert f"/projects/{environ['WORKER_PUBSUB__PROJECT_ID']}/" in trigger["metadata"]["serverAddress"]
        assert trigger["metadata"]["query"].startswith("sum("), "more than one series is an error"
    assert f'subscription_id="{environ["WORKER_PUBSUB__REQUEST_SUBSCRIPTION"]}"' in backlog["metadata"]["query"]
    gauges = {name for name, kind, labels, _ in catalogue() if kind == "gauge" and not labels}
    assert set(re.findall(r"inference_worker_\w+", load["metadata"]["query"])) <= gauges
    assert "inference_worker_" in load["metadata"]["query"]


@pytest.mark.parametrize("name", [*KEDA, *HPA])
def test_scaling_is_slower_down_than_the_metric_is_late(name: str):
    """Up at once, down only after longer than the metric's lag, a quarter at a time."""
    variant = manifests.variant(name)
    if name in KEDA:
        behavior = _spec(variant)["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    else:
        behavior = variant.of_kind("HorizontalPodAutoscaler")[0]["spec"]["behavior"]
    assert behavior["scaleUp"]["stabilizationWindowSeconds"] == 0
    assert behavior["scaleDown"]["stabilizationWindowSeconds"] > METRIC_LAG_S
    assert behavior["scaleDown"]["policies"] == [{"type": "Percent", "value": 25, "periodSeconds": 120}]


@pytest.mark.parametrize("name", HPA)
def test_the_hpa_has_the_same_target(name: str):
    """Without KEDA the metric and its target are the same."""
    variant = manifests.variant(name)
    (scaler,) = variant.of_kind("HorizontalPodAutoscaler")
    (metric,) = scaler["spec"]["metrics"]
    assert metric["external"]["target"] == {"type": "AverageValue", "averageValue": "128"}
    if name == "with-hpa":
        selector = metric["external"]["metric"]["selector"]["matchLabels"]
        assert selector == {"resource.labels.subscription_id": variant.environ["WORKER_PUBSUB__REQUEST_SUBSCRIPTION"]}


def test_overlays_differ_in_what_they_are_for():
    """There is a real one, one against the emulator and one for a cluster on this machine."""
    assert {"gke", "emulator", "local"} <= set(VARIANTS)


def _bytes(quantity: str) -> int:
    return int(quantity[:-2]) * PARTS[quantity[-2:]]
