"""Fixtures of the unit tests."""

from pathlib import Path

import pytest

from tests.support.fakeclock import FakeClock


@pytest.fixture
def worker_yaml(tmp_path: Path) -> Path:
    """Where a test writes its file."""
    return tmp_path / "worker.yaml"


@pytest.fixture
def clock() -> FakeClock:
    """A clock at 1000 s that stands still."""
    return FakeClock()
