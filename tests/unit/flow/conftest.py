import pytest

from tests.unit.flow.fakeclock import FakeClock


@pytest.fixture
def clock() -> FakeClock:
    """A clock at 1000 s that stands still."""
    return FakeClock()
