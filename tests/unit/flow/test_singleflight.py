"""One piece of work for each key at a time, whoever is cancelled."""

import asyncio

import pytest

from tests.unit.flow.fakeclock import settle
from worker.flow.singleflight import SingleFlight


class Work:
    """Work that ends when told to, and counts how often it was begun."""

    def __init__(self) -> None:
        self.begun = 0
        self.cancelled = 0
        self.outcome: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.stubborn = False

    async def __call__(self) -> str:
        self.begun += 1
        try:
            return await asyncio.shield(self.outcome)
        except asyncio.CancelledError:
            self.cancelled += 1
            if self.stubborn:
                return await self.outcome
            raise


def calling(flights: SingleFlight[str, str], work: Work, key: str = "k") -> "asyncio.Task[tuple[str, bool]]":
    return asyncio.ensure_future(flights.run(key, work))


async def test_the_second_caller_gets_the_firsts_outcome():
    """One piece of work, two outcomes, and only one says it did the work."""
    flights, work = SingleFlight[str, str](), Work()
    callers = [calling(flights, work) for _ in range(3)]
    await settle()
    assert "k" in flights
    work.outcome.set_result("answer")
    assert await asyncio.gather(*callers) == [("answer", False), ("answer", True), ("answer", True)]
    assert (work.begun, len(flights)) == (1, 0)


async def test_keys_do_not_wait_for_each_other():
    """Different messages run side by side."""
    flights, one, two = SingleFlight[str, str](), Work(), Work()
    callers = [calling(flights, one, "1"), calling(flights, two, "2")]
    await settle()
    assert len(flights) == 2
    two.outcome.set_result("second")
    assert await callers[1] == ("second", False)
    one.outcome.set_result("first")
    assert await callers[0] == ("first", False)


async def test_after_the_end_the_next_caller_starts_anew():
    """Outcomes are not remembered: that is the dedupe store's."""
    flights = SingleFlight[str, str]()
    for _ in range(2):
        work = Work()
        work.outcome.set_result("answer")
        assert await flights.run("k", work) == ("answer", False)
        assert work.begun == 1


async def test_a_failure_reaches_every_caller():
    """The very same exception."""
    flights, work = SingleFlight[str, str](), Work()
    callers = [calling(flights, work) for _ in range(2)]
    await settle()
    error = LookupError("boom")
    work.outcome.set_exception(error)
    assert await asyncio.gather(*callers, return_exceptions=True) == [error, error]


async def test_a_cancelled_leader_only_leaves():
    """The work goes on for the one that joined."""
    flights, work = SingleFlight[str, str](), Work()
    leader, joined = calling(flights, work), calling(flights, work)
    await settle()
    leader.cancel()
    await settle()
    assert leader.cancelled()
    work.outcome.set_result("answer")
    assert await joined == ("answer", True)
    assert (work.begun, work.cancelled) == (1, 0)


async def test_a_cancelled_joiner_only_leaves():
    """The leader's work is untouched."""
    flights, work = SingleFlight[str, str](), Work()
    leader, joined = calling(flights, work), calling(flights, work)
    await settle()
    joined.cancel()
    work.outcome.set_result("answer")
    assert await leader == ("answer", False)
    assert joined.cancelled()


async def test_the_last_caller_takes_the_work_with_it():
    """Nothing runs on unobserved, and the caller waits for its end."""
    flights, work = SingleFlight[str, str](), Work()
    callers = [calling(flights, work) for _ in range(2)]
    await settle()
    for caller in callers:
        caller.cancel()
    await asyncio.wait(callers)
    assert work.cancelled == 1
    assert len(flights) == 0


async def test_a_caller_that_comes_during_the_cancelling_starts_anew_after_it():
    """Two pieces of work for a key never overlap."""
    flights, first, second = SingleFlight[str, str](), Work(), Work()
    leaving = calling(flights, first)
    await settle()
    leaving.cancel()
    await asyncio.sleep(0)
    coming = calling(flights, second)
    second.outcome.set_result("again")
    assert await coming == ("again", False)
    assert (first.cancelled, second.begun) == (1, 1)


async def test_work_that_finishes_although_cancelled_is_not_wasted():
    """An answer that exists is handed to whoever comes for it."""
    flights, first, second = SingleFlight[str, str](), Work(), Work()
    first.stubborn = True
    leaving = calling(flights, first)
    await settle()
    leaving.cancel()
    await settle()
    coming = calling(flights, second)
    await settle()
    first.outcome.set_result("salvaged")
    assert await coming == ("salvaged", True)
    assert second.begun == 0
    await asyncio.wait([leaving])


async def test_a_failure_nobody_waits_for_is_no_noise():
    """Every caller left, the work ended with an error: that is not an unretrieved exception."""
    flights, work = SingleFlight[str, str](), Work()
    work.stubborn = True
    leaving = calling(flights, work)
    await settle()
    leaving.cancel()
    await settle()
    work.outcome.set_exception(LookupError("boom"))
    with pytest.raises(asyncio.CancelledError):
        await leaving
    assert len(flights) == 0
