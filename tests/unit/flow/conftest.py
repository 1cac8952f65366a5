import pytest

from tests.unit.flow.driving import Driver
from tests.unit.flow.fakeclock import FakeClock


@pytest.fixture
def clock() -> FakeClock:
    """A clock at 1000 s that stands still."""
    return FakeClock()


@pytest.fixture
def driver(clock: FakeClock) -> Driver:
    """A window from 8 to at most 64, under load."""
    return Driver(clock)
