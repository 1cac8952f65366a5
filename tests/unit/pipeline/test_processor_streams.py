"""What streams tell the gate while they run, and what they must not."""

import asyncio

import pytest

from tests.support.fakes import FakeBackend
from tests.support.pipeline import Pipeline, message
from tests.support.streams import broken
from tests.support.virtual_time import virtual_time


@pytest.mark.parametrize("apart_s", [0.0, 0.3, 1.0, 1.7])
def test_streams_that_all_break_after_their_first_token_open_the_breaker(apart_s: float) -> None:
    """A good beginning is no success: failures stay failures in a row, however beginnings and ends interleave."""

    @virtual_time
    async def run() -> None:
        pipeline = Pipeline(FakeBackend(then=broken(first_token_s=1.0, seconds=2.0)), window=8)
        handling = []
        for _ in range(16):
            handling.append(pipeline.start(message(attempt=1)))
            await asyncio.sleep(apart_s)
        await asyncio.sleep(3.1)  # the second eight began with the row, so that it is in doubt until they end as well
        assert pipeline.count("breaker_trips_total", "fake", "stream_broken") >= 1
        for each in handling:
            each.cancel()
        await asyncio.gather(*handling, return_exceptions=True)

    run()
