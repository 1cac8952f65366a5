"""examples/gke: a model server for docs/how-to/gke.md that fits the manifests of the worker."""

import pytest
import yaml

from tests.deploy.manifests import KUSTOMIZE
from tests.deploy.tools import ROOT

DOCUMENTS = list(yaml.safe_load_all((ROOT / "examples" / "gke" / "vllm.yaml").read_text("utf-8")))


@pytest.mark.parametrize("version", ["1.31", "1.34"])
def test_the_objects_are_valid(version: str):
    """They pass Kubernetes' own schemas with unknown fields refused."""
    validator = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    for document in DOCUMENTS:
        validator.validate(document, version, strict=True)


def test_the_worker_of_the_overlay_reaches_it():
    """The address in values.yaml is the Service's, in the namespace that the page creates, and the Service finds the pod."""
    deployment, service = DOCUMENTS
    values = yaml.safe_load((KUSTOMIZE / "overlays" / "gke" / "values.yaml").read_text())["spec"]["backend"]
    (port,) = service["spec"]["ports"]
    namespace = values["namespace"]
    assert values["baseUrl"] == f"http://{service['metadata']['name']}.{namespace}.svc.cluster.local:{port['port']}"
    assert f"create namespace {namespace}" in (ROOT / "docs" / "how-to" / "gke.md").read_text("utf-8")
    pod = deployment["spec"]["template"]
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    assert port["targetPort"] in {each["name"] for each in pod["spec"]["containers"][0]["ports"]}


def test_the_page_asks_for_the_model_that_is_served():
    """A request of the page names the model of the manifest."""
    (container,) = DOCUMENTS[0]["spec"]["template"]["spec"]["containers"]
    model = container["args"][container["args"].index("--model") + 1]
    assert f'"model": "{model}"' in (ROOT / "docs" / "how-to" / "gke.md").read_text("utf-8")
