import pytest

from tests.support.fakeclock import FakeClock
from tests.support.flow import Driver


@pytest.fixture
def driver(clock: FakeClock) -> Driver:
    """A window from 8 to at most 64, under load."""
    return Driver(clock)
