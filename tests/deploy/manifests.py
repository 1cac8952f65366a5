"""
What is rendered and looked at: every overlay, and every component on the base, so that no combination goes untried.

A `Variant` is one rendering; it answers the questions that several tests ask (the worker's container, its settings).
"""

import functools
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from tests.deploy.tools import DEPLOY, ROOT, call, need_tool
from worker.settings.load import load_settings
from worker.settings.schema import Settings

KUSTOMIZE = DEPLOY / "kustomize"
OVERLAYS = sorted(path.parent.name for path in (KUSTOMIZE / "overlays").glob("*/kustomization.yaml"))
COMPONENTS = sorted(path.parent.name for path in (KUSTOMIZE / "components").glob("*/kustomization.yaml"))
STACKS: dict[str, tuple[str, ...]] = {
    "with-keda-zero": ("keda", "keda-zero", "gmp", "values"),
    "with-hpa": ("hpa", "values"),
    "with-hpa-gke": ("hpa-gke", "values"),
    "with-podmonitor": ("keda", "podmonitor", "values"),
    "with-spot": ("keda", "gmp", "networkpolicy", "spot", "values"),
    "with-api-key": ("api-key", "values"),
    "with-alerts-gmp": ("alerts-gmp", "values"),
    "with-alerts-operator": ("alerts-prometheus-operator", "values"),
    "with-sagemaker": ("sagemaker", "values"),
    "with-batches": ("gmp", "networkpolicy", "batches", "api-key", "values"),
}
"""Components on the base with the values of overlays/gke; together with the overlays every component occurs."""
VARIANTS = (*OVERLAYS, *STACKS)


def kustomize(folder: Path) -> str:
    """Return the rendered YAML of a folder, or skip where there is no kubectl."""
    done = call(need_tool("kubectl"), "kustomize", folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


@functools.cache
def rendered(name: str) -> str:
    """Return the YAML of a variant."""
    if name in OVERLAYS:
        return kustomize(KUSTOMIZE / "overlays" / name)
    with tempfile.TemporaryDirectory() as folder:
        return kustomize(compose(Path(folder), STACKS[name]))


def compose(folder: Path, components: tuple[str, ...], base: Path = KUSTOMIZE / "base") -> Path:
    """Write an overlay of the base with these components and the values of overlays/gke; return its folder."""
    folder = folder.resolve()
    (folder / "values.yaml").write_text((KUSTOMIZE / "overlays" / "gke" / "values.yaml").read_text())
    content = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": "inference",
        "resources": [os.path.relpath(base, folder), "values.yaml"],
        "components": [os.path.relpath(KUSTOMIZE / "components" / name, folder) for name in components],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(content))
    return folder


@dataclass(frozen=True)
class Variant:
    """One rendering."""

    name: str
    documents: tuple[dict[str, Any], ...]
    of: str = "inference-worker"
    """Name of the Deployment that the questions are about."""

    def of_kind(self, *kinds: str) -> list[dict[str, Any]]:
        return [document for document in self.documents if document["kind"] in kinds]

    @property
    def batches(self) -> "Variant":
        """The same, asked about the pods of the Batches API."""
        return replace(self, of="inference-worker-batches")

    @property
    def has_batches(self) -> bool:
        """Whether it has those."""
        return any(item["metadata"]["name"] == self.batches.of for item in self.of_kind("Deployment"))

    @property
    def deployment(self) -> dict[str, Any]:
        """The worker's, unless it is asked about others."""
        (found,) = [item for item in self.of_kind("Deployment") if item["metadata"]["name"] == self.of]
        return found

    @property
    def pod(self) -> dict[str, Any]:
        """The pod specification."""
        return dict(self.deployment["spec"]["template"]["spec"])

    @property
    def labels(self) -> dict[str, str]:
        """The labels of the pods."""
        return dict(self.deployment["spec"]["template"]["metadata"]["labels"])

    @property
    def container(self) -> dict[str, Any]:
        (found,) = self.pod["containers"]
        return dict(found)

    @property
    def environ(self) -> dict[str, str]:
        return {item["name"]: item["value"] for item in self.container["env"]}

    @property
    def config(self) -> str:
        """The text of the one file in the ConfigMap that the pod mounts."""
        (volume,) = [item for item in self.pod["volumes"] if "configMap" in item]
        (found,) = [
            item for item in self.of_kind("ConfigMap") if item["metadata"]["name"] == volume["configMap"]["name"]
        ]
        (text,) = found["data"].values()
        return str(text)

    def settings(self) -> Settings:
        """
        What the program makes of it: the mounted file under the pod's environment.

        Raises:
            SettingsError: The program would refuse to start.
        """
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
            file.write(self.config)
            file.flush()
            environ = {k: v for k, v in self.environ.items() if k != "WORKER_CONFIG"}
            # `batches serve` pulls no requests and answers none, so it does without these.
            unused = {"pubsub.request_subscription": "unused", "pubsub.response_topic": "unused"}
            return load_settings(file.name, environ=environ, flags=unused if self.of == self.batches.of else {})


def variant(name: str) -> Variant:
    """Render one, once in a run."""
    return parse(rendered(name), name)


def parse(text: str, name: str = "") -> Variant:
    """Return what was rendered elsewhere."""
    return Variant(name, tuple(filter(None, yaml.safe_load_all(text))))


def pod_specs(documents: tuple[dict[str, Any], ...]) -> list[tuple[str, dict[str, Any]]]:
    """Return the pod specification of everything that makes pods, with a name for messages."""
    return [
        (f"{item['kind']}/{item['metadata']['name']}", item["spec"]["template"]["spec"])
        for item in documents
        if "template" in item.get("spec", {})
    ]


def containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    """Return every container of a pod, those that run first included."""
    return [*pod.get("initContainers", ()), *pod["containers"]]


__all__ = [
    "COMPONENTS",
    "KUSTOMIZE",
    "OVERLAYS",
    "ROOT",
    "STACKS",
    "VARIANTS",
    "Variant",
    "compose",
    "containers",
    "kustomize",
    "parse",
    "pod_specs",
    "variant",
]
