"""Every overlay and every component renders to objects that an API server would take, and that fit each other."""

import re

import pytest
import yaml

from tests.deploy.crds import custom_faults, known_kinds
from tests.deploy.manifests import (
    COMPONENTS,
    KUSTOMIZE,
    OVERLAYS,
    STACKS,
    Variant,
    compose,
    containers,
    kustomize,
    pod_specs,
)
from tests.deploy.manifests import variant as rendered_variant
from worker.batches.lines import IDEMPOTENCY_KEY

VERSIONS = ("1.31.0", "1.34.0", "1.37.0")
"""The oldest that matters, one between, the newest there are schemas for."""
WITHOUT_SCHEMA = {"AutoscalingMetric": "with-hpa-gke"}
"""Kinds without a published definition, and the only variant each may occur in; deploy/README.md says so."""


def test_every_component_is_rendered_somewhere():
    """No component goes untried."""
    used = {name for stack in STACKS.values() for name in stack}
    for overlay in OVERLAYS:
        listed = yaml.safe_load((KUSTOMIZE / "overlays" / overlay / "kustomization.yaml").read_text())["components"]
        used |= {path.rpartition("/")[2] for path in listed}
    assert set(COMPONENTS) == used


@pytest.mark.parametrize("version", VERSIONS)
def test_core_objects_are_valid(variant: Variant, version: str):
    """Core objects pass Kubernetes' own schemas with unknown fields refused."""
    validator = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    for document in variant.documents:
        try:
            validator.validate(document, version, strict=True)
        except validator.SchemaNotFoundError:
            assert (document["apiVersion"], document["kind"]) in known_kinds() or document["kind"] in WITHOUT_SCHEMA


def test_custom_objects_are_valid(variant: Variant):
    """Custom objects pass their definitions with unknown fields refused, triggers KEDA's list of keys."""
    pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    for document in variant.documents:
        if document["kind"] in WITHOUT_SCHEMA:
            assert variant.name == WITHOUT_SCHEMA[document["kind"]]
        elif (document["apiVersion"], document["kind"]) in known_kinds():
            assert custom_faults(document) == []


def test_values_reach_every_place(variant: Variant):
    """No placeholder of the base is left, and the values themselves are not sent to a cluster."""
    assert "from-values" not in yaml.safe_dump_all(variant.documents)
    assert variant.of_kind("Values") == []


def test_everything_is_in_one_namespace(variant: Variant):
    """What has a namespace is in the overlay's."""
    spaces = {item["metadata"].get("namespace") for item in variant.documents if item["kind"] != "Namespace"}
    assert spaces == {"inference"}


def test_namespaces_are_restricted(variant: Variant):
    """A namespace made here enforces the strictest Pod Security Standard."""
    for space in variant.of_kind("Namespace"):
        assert space["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


def test_pods_meet_the_restricted_standard(variant: Variant):
    """
    Every pod meets it, and has a read-only root.

    Source: https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted
    """
    for name, pod in pod_specs(variant.documents):
        context = pod["securityContext"]
        assert context["runAsNonRoot"] is True, name
        assert (context["runAsUser"], context["runAsGroup"]) == (65532, 65532), name
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys(), name
        assert pod["automountServiceAccountToken"] is False, name
        assert {kind for volume in pod.get("volumes", ()) for kind in volume} <= {
            "name",
            "configMap",
            "emptyDir",
            "projected",
            "secret",
        }
        for container in containers(pod):
            inner = container["securityContext"]
            assert inner["allowPrivilegeEscalation"] is False, name
            assert inner["readOnlyRootFilesystem"] is True, name
            assert inner["capabilities"] == {"drop": ["ALL"]}, name
            assert all("hostPort" not in port for port in container.get("ports", ())), name


def test_no_shell_is_needed(variant: Variant):
    """
    Neither probes nor hooks run a command: the image has no shell.

    Only what a Service sends traffic to waits before it ends; for the others a preStop would only delay SIGTERM.
    """
    for name, pod in pod_specs(variant.documents):
        for container in containers(pod):
            waits = name == "Deployment/inference-worker-batches" and container["name"] == "batches"
            assert container.get("lifecycle") == ({"preStop": {"sleep": {"seconds": 5}}} if waits else None)
            assert "command" not in container
            assert all("exec" not in container.get(f"{kind}Probe", {}) for kind in ("startup", "readiness", "liveness"))


def test_the_last_words_are_kept(variant: Variant):
    """What a container that gives up says last is what `kubectl describe pod` shows."""
    for name, spec in pod_specs(variant.documents):
        for container in containers(spec):
            assert container["terminationMessagePolicy"] == "FallbackToLogsOnError", name


def test_selectors_find_the_pods_they_are_for(variant: Variant):
    """Budget, policy, spread and Service select the pods of one component, the one they are named like."""
    parts = [variant, *([variant.batches] if variant.has_batches else [])]
    for part in parts:
        named = [
            item
            for item in variant.of_kind("PodDisruptionBudget", "NetworkPolicy", "Service", "Deployment")
            if item["metadata"]["name"] == part.of
        ]
        assert len(named) >= 2
        selectors = [
            item["spec"]["selector"] for item in named if item["kind"] in {"PodDisruptionBudget", "Deployment"}
        ]
        selectors += [item["spec"]["podSelector"] for item in named if item["kind"] == "NetworkPolicy"]
        selectors += [{"matchLabels": item["spec"]["selector"]} for item in named if item["kind"] == "Service"]
        selectors += [item["labelSelector"] for item in part.pod["topologySpreadConstraints"]]
        for selector in selectors:
            assert [selector["matchLabels"].items() <= other.labels.items() for other in parts] == [
                other is part for other in parts
            ]


def test_scrapers_select_every_pod_with_metrics(variant: Variant):
    """The workers, and those of the Batches API."""
    for scraper in variant.of_kind("PodMonitoring", "PodMonitor"):
        wanted = scraper["spec"]["selector"]["matchLabels"].items()
        assert wanted <= variant.labels.items()
        assert not variant.has_batches or wanted <= variant.batches.labels.items()


def test_ports_fit(variant: Variant):
    """Probes and scrapers ask the port that the program listens on."""
    settings = variant.settings()
    assert variant.container["ports"] == [{"name": "http", "containerPort": settings.http.port}]
    assert settings.http.host == "0.0.0.0"
    _probes_fit(variant)
    for scraper in variant.of_kind("PodMonitoring"):
        assert [(item["port"], item["path"]) for item in scraper["spec"]["endpoints"]] == [("http", "/metrics")]
    for scraper in variant.of_kind("PodMonitor"):
        assert [(item["port"], item["path"]) for item in scraper["spec"]["podMetricsEndpoints"]] == [
            ("http", "/metrics")
        ]
    for policy in variant.of_kind("NetworkPolicy"):
        assert policy["spec"]["ingress"][-1]["ports"] == [{"protocol": "TCP", "port": "http"}]


def _probes_fit(variant: Variant) -> None:
    for kind, path in (("startup", "/startupz"), ("readiness", "/readyz"), ("liveness", "/livez")):
        assert variant.container[f"{kind}Probe"]["httpGet"] == {"path": path, "port": "http"}


def test_clients_reach_the_batches_api():
    """Through the Service and the policy to the port that the program listens on."""
    part = rendered_variant("with-batches").batches
    settings = part.settings()
    assert part.container["ports"] == [
        {"name": "api", "containerPort": settings.batches.port},
        {"name": "http", "containerPort": settings.http.port},
    ]
    assert settings.batches.host == settings.http.host == "0.0.0.0"
    _probes_fit(part)
    (service,) = part.of_kind("Service")
    assert [(port["port"], port["targetPort"]) for port in service["spec"]["ports"]] == [(80, "api")]
    (policy,) = [item for item in part.of_kind("NetworkPolicy") if item["metadata"]["name"] == part.of]
    assert policy["spec"]["ingress"][0] == {"ports": [{"protocol": "TCP", "port": "api"}]}


def test_the_batches_api_has_what_it_needs():
    """Names of the values, keys on, the address of the database from the Secret, files where every pod sees them."""
    part = rendered_variant("with-batches").batches
    values = yaml.safe_load((KUSTOMIZE / "overlays" / "gke" / "values.yaml").read_text())["spec"]
    batches = part.settings().batches
    assert batches.request_topic == values["batches"]["requestTopic"]
    assert batches.response_subscription == values["batches"]["responseSubscription"]
    assert batches.dead_letter_subscription == values["batches"]["deadLetterSubscription"]
    assert batches.files == values["batches"]["files"]
    assert batches.auth == "keys"
    (volume,) = [item for item in part.pod["volumes"] if item["name"] == "secret"]
    (migrating,) = part.pod["initContainers"]
    for container in (migrating, part.container):
        environ = {item["name"]: item["value"] for item in container["env"]}
        (mount,) = [item for item in container["volumeMounts"] if item["name"] == volume["name"]]
        assert environ["WORKER_BATCHES__DATABASE_URL_FILE"] == f"{mount['mountPath']}/database-url"
        assert environ["WORKER_CONFIG"] == part.environ["WORKER_CONFIG"]
    assert migrating["args"] == ["batches", "migrate"]
    backend = part.settings().backend
    assert backend is not None
    workers = rendered_variant("with-batches").settings()
    assert workers.dedupe.metadata_key == IDEMPOTENCY_KEY
    (key,) = [item for item in part.container["volumeMounts"] if item["name"] == "backend-key"]
    assert backend.api_key_file == f"{key['mountPath']}/api-key"


def test_the_network_policy_lets_the_backend_through(variant: Variant):
    """The model server named in the values is the one the policy opens."""
    for policy in variant.of_kind("NetworkPolicy"):
        to_backend = policy["spec"]["egress"][0]
        space = to_backend["to"][0]["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"]
        assert f".{space}.svc" in variant.environ["WORKER_BACKEND__BASE_URL"]
        assert variant.environ["WORKER_BACKEND__BASE_URL"].endswith(f":{to_backend['ports'][0]['port']}")


def test_one_autoscaler_owns_the_number(variant: Variant):
    """At most one autoscaler aims at the Deployment, which then says no number itself."""
    scalers = variant.of_kind("ScaledObject", "HorizontalPodAutoscaler")
    assert len(scalers) <= 1
    for scaler in scalers:
        assert scaler["spec"]["scaleTargetRef"]["name"] == variant.deployment["metadata"]["name"]
        assert "replicas" not in variant.deployment["spec"]


def test_a_lone_pod_can_be_evicted(variant: Variant):
    """The budget lets a node be drained even when it has the only worker."""
    budgets = variant.of_kind("PodDisruptionBudget")
    assert budgets
    for budget in budgets:
        assert budget["spec"]["maxUnavailable"] == "25%"
        assert "minAvailable" not in budget["spec"]
        assert budget["spec"]["unhealthyPodEvictionPolicy"] == "AlwaysAllow"


def test_a_change_of_configuration_is_a_rollout(tmp_path):
    """The ConfigMap's name follows its content, and the pod template follows the name."""
    base = tmp_path / "base"
    base.mkdir()
    for path in (KUSTOMIZE / "base").iterdir():
        (base / path.name).write_text(path.read_text())
    overlay = tmp_path / "overlay"
    overlay.mkdir()
    compose(overlay, ("values",), base)
    names = []
    for text in ("", "\n# changed\n"):
        (base / "worker.yaml").write_text((base / "worker.yaml").read_text() + text)
        names.append(re.findall(r"name: (inference-worker-[a-z0-9]{10})$", kustomize(overlay), re.MULTILINE))
    assert len(names[0]) == len(names[1]) == 2, "the ConfigMap and the volume"
    assert len({*names[0]}) == len({*names[1]}) == 1
    assert names[0] != names[1]


def test_the_key_comes_by_file(variant: Variant):
    """No variable holds a key; with the component the program reads the mounted Secret."""
    assert not [name for name in variant.environ if name.endswith("API_KEY")]
    if variant.name == "with-api-key":
        (mount,) = [item for item in variant.container["volumeMounts"] if item["name"] == "backend-key"]
        backend = variant.settings().backend
        assert backend is not None
        assert backend.api_key_file == f"{mount['mountPath']}/api-key"
