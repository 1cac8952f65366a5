"""Every variant of the manifests, rendered once; a control plane for the tests that ask for one."""

from collections.abc import Iterator

import pytest

from tests.deploy.control_plane import ControlPlane, missing
from tests.deploy.crds import SCHEMAS
from tests.deploy.manifests import VARIANTS, Variant, variant


@pytest.fixture(params=VARIANTS, name="variant")
def _variant(request: pytest.FixtureRequest) -> Variant:
    return variant(request.param)


@pytest.fixture(scope="session", name="plane")
def _plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """A control plane that knows the custom resources of the manifests."""
    if reason := missing():
        pytest.skip(reason)
    plane = ControlPlane(tmp_path_factory.mktemp("control-plane"))
    try:
        plane.start()
        plane.define(*sorted(SCHEMAS.rglob("*.yaml")))
        yield plane
    finally:
        plane.stop()
