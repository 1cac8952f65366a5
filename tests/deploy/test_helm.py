"""The Helm chart: with the same values it makes the objects that Kustomize makes, and refuses values that mean nothing."""

import re
from typing import Any

import pytest
import yaml

from tests.deploy import manifests
from tests.deploy.helm_chart import BARE, CHART, EMULATOR, OF_COMPONENT, helm, merged, of_stack, rendered
from tests.deploy.manifests import KUSTOMIZE, STACKS, Variant, kustomize

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1000)]

IMAGES = yaml.safe_load((KUSTOMIZE / "overlays" / "gke" / "kustomization.yaml").read_text())["images"][0]


def comparable(variant: Variant, *, without: tuple[str, ...] = ("Namespace",)) -> dict[tuple[str, str], Any]:
    """
    Return objects by kind and name, without what the two tools do in ways of their own.

    Kustomize writes the namespace into each object, Helm gives it to the API server.  A change of the configuration is a
    rollout by the hash in the ConfigMap's name there and by a checksum in the pod template here.
    """
    text = re.sub(
        r"\b(inference-worker(?:-batches)?)-[a-z0-9]{10}$",
        r"\1",
        yaml.safe_dump_all(variant.documents),
        flags=re.MULTILINE,
    )
    found = {}
    for document in yaml.safe_load_all(text):
        document["metadata"].pop("namespace", None)
        template = document.get("spec", {}).get("template", {}).get("metadata", {})
        if template.get("annotations", {}).pop("checksum/config", None):
            template.pop("annotations")
        for container in containers_of(document):
            container["env"].sort(key=lambda item: item["name"])
            container["volumeMounts"].sort(key=lambda item: item["name"])
            document["spec"]["template"]["spec"]["volumes"].sort(key=lambda item: item["name"])
        for name, text in document.get("data", {}).items():
            document["data"][name] = yaml.safe_load(text)
        if document["kind"] not in without:
            found[document["kind"], document["metadata"]["name"]] = document
    return found


def containers_of(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the containers of what makes pods, those that run first included."""
    pod = document.get("spec", {}).get("template", {}).get("spec", {})
    return [*pod.get("initContainers", ()), *pod.get("containers", ())]


def test_every_component_has_a_switch() -> None:
    """What can be added to the one can be added to the other."""
    assert set(OF_COMPONENT) == set(manifests.COMPONENTS)


@pytest.mark.parametrize("name", STACKS)
def test_each_stack_is_what_kustomize_makes(name: str) -> None:
    """The base with these components, and the chart with their switches: the same objects."""
    ours = rendered(of_stack(name))
    theirs = manifests.variant(name)
    expected = comparable(theirs)
    for document in expected.values():  # a stack of the tests has no image of its own
        for container in containers_of(document):
            assert container["image"] == "inference-worker"
            container["image"] = "inference-worker:dev"
    without = ("ClusterRules", "GlobalRules")  # Kustomize has them apart
    assert comparable(ours, without=without) == expected


def test_the_defaults_are_the_overlay_for_gke() -> None:
    """The same components, names and sizes; the image by digest where one is given."""
    values = {"image": {"repository": IMAGES["newName"], "digest": IMAGES["digest"]}}
    assert comparable(rendered(values)) == comparable(manifests.variant("gke"))
    ours = yaml.safe_load((CHART / "values.yaml").read_text())
    assert ours["image"]["repository"] == IMAGES["newName"]


def test_it_runs_against_the_emulator() -> None:
    """With the values of overlays/emulator."""
    assert comparable(rendered(merged(BARE, EMULATOR))) == comparable(manifests.variant("emulator"))


def test_alerts_of_the_whole_cluster_are_there_too() -> None:
    """With Google's managed Prometheus: what `cluster-alerts` has, with absolute links."""
    ours = rendered(merged(BARE, OF_COMPONENT["alerts-gmp"]))
    wider = comparable(manifests.parse(kustomize(KUSTOMIZE / "cluster-alerts")))
    assert wider.items() <= comparable(ours).items()
    links = re.findall(r"runbook_url: (\S+)", yaml.safe_dump_all(ours.documents))
    assert len(links) > 10
    assert all(link.startswith("https://") for link in links)


def test_two_releases_do_not_meet() -> None:
    """In one namespace: no name in common, and neither selects the pods of the other."""
    values = merged(OF_COMPONENT["alerts-gmp"], OF_COMPONENT["batches"])
    first, second = (comparable(rendered(values, release=name)) for name in ("one", "two"))
    assert len(first) == len(second) > 5
    assert not first.keys() & second.keys()
    for name, objects in (("one", first), ("two", second)):
        text = yaml.safe_dump(list(objects.values()))
        assert set(re.findall(r"app\.kubernetes\.io/name: (\S+)", text)) == {name}, "labels and selectors"
        assert all(each["metadata"]["name"].startswith(name) for each in objects.values())


def test_settings_of_batches_are_merged_and_a_change_is_a_rollout() -> None:
    """`batches.config` wins key by key over the file of the chart, and touches the workers' pods not at all."""
    plain, changed = (
        rendered(merged(BARE, {"batches": {"enabled": True, "config": config}}))
        for config in ({}, {"batches": {"max_lines": 10}})
    )
    assert changed.batches.settings().batches.max_lines == 10
    assert changed.batches.settings().pubsub == plain.batches.settings().pubsub
    templates = [
        [part.deployment["spec"]["template"] for part in (variant, variant.batches)] for variant in (plain, changed)
    ]
    assert templates[0][0] == templates[1][0]
    assert templates[0][1]["metadata"]["annotations"] != templates[1][1]["metadata"]["annotations"]


def test_settings_are_merged_and_a_change_is_a_rollout() -> None:
    """`config` wins key by key over the file of the chart; the pod template follows the content."""
    plain, changed = rendered(BARE), rendered(merged(BARE, {"config": {"log": {"answer_ratio": 0.01}}}))
    assert changed.settings().log.answer_ratio == 0.01
    assert changed.settings().log.format == "json"
    assert changed.settings().backend == plain.settings().backend
    sums = [
        variant.deployment["spec"]["template"]["metadata"]["annotations"]["checksum/config"]
        for variant in (plain, changed)
    ]
    assert sums[0] != sums[1]


@pytest.mark.parametrize(("replicas", "expected"), [(3, 3), (0, 0), (None, None)])
def test_without_an_autoscaler_a_number_may_be_given(replicas: int | None, expected: int | None) -> None:
    """And is left alone where none is."""
    spec = rendered(merged(BARE, {"scaling": {"replicas": replicas}})).deployment["spec"]
    assert spec.get("replicas") == expected


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"scaling": {"by": "cron"}}, "scaling"),
        ({"scalling": {}}, "scalling"),
        ({"backend": {"baseUrl": "vllm:8000"}}, "baseUrl"),
        ({"image": {"digest": "latest"}}, "digest"),
        ({"batches": {"files": "/var/files"}}, "files"),
        ({"batches": {"enabled": "yes"}}, "enabled"),
        ({"alerts": {"for": "gmp"}}, "alerts.runbook: where docs/operations.md can be read is required"),
        ({"alerts": {"for": "gmp", "runbook": "docs/operations.md"}}, "runbook"),
    ],
)
def test_values_that_mean_nothing_are_refused(values: dict[str, Any], words: str) -> None:
    """Before anything reaches a cluster."""
    code, text = helm(values)
    assert code == 1
    assert words in text


def test_the_chart_has_the_version_of_the_program() -> None:
    """Its default image is the one of this version."""
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert f'version = "{chart["appVersion"]}"' in (manifests.ROOT / "pyproject.toml").read_text()
