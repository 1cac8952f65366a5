"""Fixtures of the unit tests."""

from pathlib import Path

import pytest


@pytest.fixture
def worker_yaml(tmp_path: Path) -> Path:
    """Where a test writes its file."""
    return tmp_path / "worker.yaml"
