"""Every variant of the manifests, rendered once."""

import pytest

from tests.deploy.manifests import VARIANTS, Variant, variant


@pytest.fixture(params=VARIANTS, name="variant")
def _variant(request: pytest.FixtureRequest) -> Variant:
    return variant(request.param)
