"""The limits of tenants in a real Redis server, which is needed on this machine as `redis-server`."""

import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from worker.pipeline.tenants import RedisLimits, build_limits
from worker.settings.schema import TenantSettings
from worker.telemetry.metrics import Metrics

REDIS = shutil.which("redis-server")
pytestmark = pytest.mark.skipif(REDIS is None, reason="redis-server is not installed")
COST = {"requests": 1.0}


class Server:
    """A Redis server on a free port, which can be stopped and started again."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._folder = folder
        self.settings = TenantSettings(
            requests_per_minute=60, store="redis", redis_url=SecretStr(f"redis://127.0.0.1:{self.port}/0")
        )
        self.start()

    def start(self) -> None:
        assert REDIS is not None
        command = [REDIS, "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--dir", str(self._folder)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
            except OSError:
                continue
            return

    def stop(self) -> None:
        self._process.kill()
        self._process.wait(10)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path)
    yield made
    made.stop()


def limits(server: Server, metrics: Metrics | None = None, **more: Any) -> RedisLimits:
    return RedisLimits(server.settings, metrics or Metrics(), **more)


async def test_workers_share_a_limit(server: Server) -> None:
    """Eleven at once of all workers together, then each waits a second longer than the one before."""
    one, other = limits(server), limits(server)
    waits = [await (one if number % 2 else other).reserve("a", COST) for number in range(14)]
    assert waits[:11] == [0.0] * 11
    assert waits[11:] == pytest.approx([1.0, 2.0, 3.0], abs=0.5)
    assert await one.reserve("b", COST) == 0.0
    for each in (one, other):
        await each.aclose()


async def test_what_is_given_back_is_there_again(server: Server) -> None:
    """As in one process; what nobody owes any more is gone from Redis."""
    store = limits(server)
    assert await store.reserve("a", {"tokens": 100.0}) == 0.0
    await store.reserve("a", {"tokens": -99.0})
    assert await store.reserve("a", {"tokens": 1.0}) == 0.0
    await store.reserve("a", {"tokens": -50.0})
    while await store._redis.keys("*"):
        continue
    await store.aclose()


async def test_a_redis_that_is_away_keeps_nobody_waiting(server: Server) -> None:
    """The process's own limits apply, which is counted, and Redis is asked again after a while."""
    now, metrics = [0.0], Metrics()
    store = limits(server, metrics, clock=lambda: now[0])
    assert await store.reserve("a", COST) == 0.0
    server.stop()
    assert await store.reserve("a", COST) == 0.0
    assert await store.reserve("a", COST) == 0.0
    assert metrics.limit_store_skipped_total.value == 2
    server.start()
    now[0] = 20.0
    assert await store.reserve("a", COST) == 0.0
    assert metrics.limit_store_skipped_total.value == 2
    await store.aclose()


def test_without_limits_there_is_no_store() -> None:
    """And none of Redis is imported."""
    assert build_limits(TenantSettings(store="redis", redis_url=SecretStr("redis://h")), Metrics()) is None
