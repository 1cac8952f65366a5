"""
A real control plane takes what Kustomize and Helm make, makes pods of it under Pod Security `restricted`, and scales them.

Only with CONTROL_PLANE_TESTS=1: the first run builds Kubernetes of its Go modules.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from benchmarks.scaling_model import Autoscaler, Scaler
from tests.deploy.control_plane import BUILD_LIMIT_S, ControlPlane, Kubelet, Object, conditions
from tests.deploy.external_metrics import ExternalMetrics
from tests.deploy.helm_chart import BARE, EMULATOR, merged, of_stack, rendered
from tests.deploy.installation import SPACE, Installation, installed
from tests.deploy.manifests import STACKS, VARIANTS, Variant, pod_specs, variant
from tests.support.waiting import until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * BUILD_LIMIT_S)]

AUTOSCALER = f"/apis/autoscaling/v2/namespaces/{SPACE}/horizontalpodautoscalers/inference-worker"


def check_accepted(plane: ControlPlane, given: Variant) -> None:
    """Apply; pods are admitted as written; a second apply would change nothing."""
    with installed(plane, given) as installation:
        written = {spec["containers"][0]["name"]: spec for _, spec in pod_specs(given.documents)}
        seen = set()
        for pod in installation.pods():
            (container,) = pod["spec"]["containers"]
            spec = written[container["name"]]
            seen.add(container["name"])
            volumes = [item["name"] for item in spec.get("volumes", ())]
            assert [item["name"] for item in pod["spec"].get("volumes", ())] == volumes, "no token was added"
            assert pod["spec"]["securityContext"] == spec["securityContext"]
            assert container["securityContext"] == spec["containers"][0]["securityContext"]
        assert seen == written.keys()
        assert installation.difference(given.documents) == ""


@pytest.mark.parametrize("name", VARIANTS)
def test_each_variant_is_accepted(plane: ControlPlane, name: str) -> None:
    """Every overlay and component: no unknown field, no warning, every pod admitted; a second apply would change nothing."""
    check_accepted(plane, variant(name))


@pytest.mark.parametrize("name", ["defaults", "emulator", *STACKS])
def test_each_form_of_the_chart_is_accepted(plane: ControlPlane, name: str) -> None:
    """What Helm renders, the same way."""
    values = of_stack(name) if name in STACKS else {"defaults": {}, "emulator": merged(BARE, EMULATOR)}[name]
    check_accepted(plane, rendered(values))


def changed(name: str, kind: str, path: tuple[Any, ...], value: Any = None) -> tuple[Object, ...]:
    """Return the documents of a variant with another value at a path of the first object of a kind; `None` removes it."""
    documents = copy.deepcopy(variant(name).documents)
    place: Any = next(document for document in documents if document["kind"] == kind)
    for key in path[:-1]:
        place = place[key]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return documents


@pytest.mark.parametrize(
    ("where", "path", "value", "words"),
    [
        ("gke/Deployment", ("spec", "template", "spec", "grace"), 1, 'unknown field "spec.template.spec.grace"'),
        ("gke/ScaledObject", ("spec", "cooldownPeriods"), 300, 'unknown field "spec.cooldownPeriods"'),
        ("gke/ScaledObject", ("spec", "fallback", "behavior"), "statik", 'Unsupported value: "statik"'),
        ("gke/PodMonitoring", ("spec", "endpoints", 0, "intervall"), "15s", 'unknown field "spec.endpoints[0].interv'),
        ("gke/PodDisruptionBudget", ("spec", "minAvailable"), 1, "minAvailable and maxUnavailable cannot be both set"),
        (
            "with-hpa/HorizontalPodAutoscaler",
            ("spec", "maxReplicas"),
            0,
            "must be greater than or equal to `minReplicas`",
        ),
        ("with-podmonitor/PodMonitor", ("spec", "podMetricsEndpoints", 0, "interval"), "15 s", "should match"),
    ],
)
def test_a_mistake_is_refused(plane: ControlPlane, where: str, path: tuple[Any, ...], value: Any, words: str) -> None:
    """The checks above can fail: the API server names a misspelt field and a value that does not exist."""
    documents = tuple(item for item in changed(*where.split("/"), path, value) if item["kind"] != "Namespace")
    with plane.namespace(SPACE):
        code, text = Installation(plane).apply(documents)
    assert code != 0
    assert words in text


@pytest.mark.parametrize("field", ["runAsNonRoot", "seccompProfile"])
def test_a_pod_that_may_do_more_is_refused(plane: ControlPlane, field: str) -> None:
    """Pod Security is at work: without one restriction kubectl warns, no pod is admitted, and the tests above would fail."""
    documents = changed("gke", "Deployment", ("spec", "template", "spec", "securityContext", field))
    installation = Installation(plane)
    with plane.namespace(SPACE, create=False):
        code, text = installation.apply(documents)
        assert code != 0, "a warning counts"
        assert 'would violate PodSecurity "restricted:latest"' in text
        with pytest.raises(AssertionError, match='violates PodSecurity "restricted:latest"'):
            installation.pods()
        assert installation.workers() == []


def test_a_pod_needs_its_service_account(plane: ControlPlane) -> None:
    """Admission looks for the account that the Deployment names."""
    documents = tuple(item for item in variant("gke").documents if item["kind"] != "ServiceAccount")
    expected = pytest.raises(AssertionError, match='serviceaccount "inference-worker" not found')
    with installed(plane, Variant("gke", documents)) as installation, expected:
        installation.pods()


@contextmanager
def running(plane: ControlPlane, replicas: int) -> Iterator[Installation]:
    """The overlay for GKE with so many available workers; nothing but the test scales it."""
    with Kubelet(plane), installed(plane, variant("gke")) as installation:
        installation.scale(replicas)
        yield installation


def test_an_apply_leaves_the_number_to_the_autoscaler(plane: ControlPlane) -> None:
    """The manifests are applied again, with a change: the number of pods stays."""
    with running(plane, 3) as installation:
        documents = changed("gke", "Deployment", ("spec", "revisionHistoryLimit"), 4)
        assert "+  revisionHistoryLimit: 4" in installation.difference(documents)
        code, text = installation.apply(documents)
        assert code == 0, text
        assert "deployment.apps/inference-worker configured" in text
        assert installation.replicas == 3


def test_a_rollout_never_has_fewer_workers(plane: ControlPlane) -> None:
    """A change reaches every worker; as many as before are available all the time, and a quarter more exist."""
    with running(plane, 4) as installation:
        before = {pod["metadata"]["name"] for pod in installation.workers()}
        template = ("spec", "template", "metadata", "annotations")
        code, text = installation.apply(changed("gke", "Deployment", template, {"changed": "yes"}))
        assert code == 0, text
        least, most = [], []

        def is_over() -> bool:
            deployment = installation.deployment()
            status = deployment["status"]
            least.append(status.get("availableReplicas", 0))
            most.append(status["replicas"])
            is_seen = status["observedGeneration"] == deployment["metadata"]["generation"]
            return is_seen and status.get("updatedReplicas") == status["replicas"] == least[-1] == 4

        until(is_over, 180, "the rollout is over")
        assert not before & {pod["metadata"]["name"] for pod in installation.workers()}
        assert min(least) == 4
        assert max(most) == 5


def test_evictions_keep_to_the_budget(plane: ControlPlane) -> None:
    """A quarter of four workers may go at a time, no more until another one is ready; a lone worker may go."""
    with running(plane, 4) as installation:
        until(lambda: installation.evictable == 1, what="the budget counts the workers")
        first, second, *_ = installation.workers()
        assert installation.evict(first) == 201
        assert installation.evict(second) == 429
        until(lambda: installation.available == 4 and installation.evictable == 1, 60, "another worker has come")
        assert installation.evict(second) == 201
        installation.scale(1)
        until(lambda: installation.evictable == 1, what="the budget counts the one")
        (only,) = installation.workers()
        assert installation.evict(only) == 201


def test_nodes_can_be_drained(plane: ControlPlane) -> None:
    """`kubectl drain`, as before a node upgrade: it empties the node, and new workers come on the other one."""
    with running(plane, 4) as installation:
        code, text = plane.kubectl("drain", "node-1", "--delete-emptydir-data", "--timeout=120s")
        assert code == 0, text
        until(lambda: installation.available == 4, 60, "all workers are available again")
        assert {pod["spec"]["nodeName"] for pod in installation.workers()} == {"node-2"}


def modelled(before: float, value: float, current: int, last: int) -> list[tuple[float, int]]:
    """
    Return the steps from the current number to the last one by the model of docs/scaling.md, as `(seconds, number)`.

    The metric changes at second 0; the model's autoscaler looks every 15 s and last saw the value from before.
    """
    scaler = Scaler(load_target=None, maximum=8)
    autoscaler = Autoscaler(scaler)
    assert autoscaler.replicas(-scaler.sync_s, current, {scaler.target: before}) == current
    found, now = [(0.0, current)], 0.0
    while current != last:
        number = autoscaler.replicas(now, current, {scaler.target: value})
        if number != current:
            found.append((now, number))
        current, now = number, now + scaler.sync_s
    return found


def test_the_autoscaler_moves_the_workers_like_its_model(plane: ControlPlane) -> None:
    """
    A backlog of eight pods' worth comes and goes; a lost metric removes nothing.

    The numbers are those of the model behind docs/scaling.md, at times that differ by two periods of the autoscaler at most.
    """

    def is_active() -> bool:
        return conditions(plane.find(AUTOSCALER) or {}).get("ScalingActive", {}).get("status") == "True"

    with Kubelet(plane), ExternalMetrics(plane) as metrics:
        metrics.value = 0
        with installed(plane, variant("with-hpa")) as installation:
            until(is_active, 120, "the autoscaler reads its metric")
            metric = "pubsub.googleapis.com|subscription|num_undelivered_messages"
            selector = "resource.labels.subscription_id=inference-requests-worker"
            assert metrics.asked == {(SPACE, metric, selector)}

            metrics.value = full = 8 * 128
            _compare(installation.steps(8, 180), modelled(0, full, 1, 8))

            metrics.value = None
            until(lambda: not is_active(), 60, "the autoscaler knows that the metric is lost")
            metrics.value = full
            until(is_active, 60, "the metric is back")
            assert installation.replicas == 8

            metrics.value = 0
            _compare(installation.steps(4, 700), modelled(full, 0, 8, 4))


def _compare(real: list[tuple[float, int]], model: list[tuple[float, int]]) -> None:
    print("control plane:", [(round(at), number) for at, number in real], "model:", model)
    assert [number for _, number in real] == [number for _, number in model]
    for (at, _), (expected, _) in zip(real[1:], model[1:], strict=True):
        assert expected - 1 <= at <= expected + 2 * Scaler().sync_s
