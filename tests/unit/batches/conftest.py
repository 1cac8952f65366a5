"""Every test of the store runs on both databases."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.batches import opened_store, sqlite_url
from tests.support.postgresql import PostgreSQL, running_postgresql
from worker.batches.store import Store


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgreSQL]:
    """A server for the whole session."""
    with running_postgresql() as server:
        if server is None:
            pytest.skip("no binaries of a PostgreSQL server on this machine")
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A new, empty database."""
    if request.param == "sqlite":
        return sqlite_url(tmp_path)
    return str(request.getfixturevalue("postgresql").create_database())


class Time:
    """The database's clock, moved by the test."""

    def __init__(self) -> None:
        self.now = float(int(time.time()))  # ids hold the real time

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def time_() -> Time:
    """A clock that stands still."""
    return Time()


@pytest.fixture
def store(database_url: str, time_: Time) -> Iterator[Store]:
    """A store with its tables."""
    with opened_store(database_url, clock=time_) as opened:
        yield opened
