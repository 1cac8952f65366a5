"""The queue in front of a gate: claims, ages, delays, parked models, and nothing left behind."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.fakeclock import FakeClock
from worker.flow.breaker import Breaker, BreakerEffect, BreakerScope
from worker.flow.queue import AdmissionOrder, Waiter, WaitQueue


@pytest.fixture
def loop():
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


class Line:
    """A queue with a clock and a breaker at hand."""

    def __init__(self, clock: FakeClock, loop: asyncio.AbstractEventLoop, *, aging_every: int = 0) -> None:
        self.clock = clock
        self.loop = loop
        self.queue = WaitQueue(aging_every=aging_every)
        self.breaker = Breaker(now=clock.now, jitter=lambda: 0.0)

    def add(self, model: str | None = None, *, is_delayed: bool = False, **order) -> Waiter:
        waiter = Waiter(AdmissionOrder(**order), model, self.loop.create_future())
        self.queue.add(waiter, is_delayed=is_delayed)
        return waiter

    def pop(self) -> Waiter | None:
        self.queue.unpark(self.breaker)
        return self.queue.pop(self.breaker)

    def trip(self, model: str) -> None:
        token = self.breaker.enter(model)
        self.breaker.report(token, BreakerEffect.TRIP, error_class="not_ready", scope=BreakerScope.MODEL)

    def instant(self) -> float | None:
        return self.queue.next_unpark_at(self.clock.now(), self.breaker)


@pytest.fixture
def line(clock, loop):
    return Line(clock, loop)


def test_no_deadline_comes_after_every_deadline(line):
    """A message without a deadline goes last among equals."""
    without, with_one = line.add(), line.add(deadline=1e12)
    assert [line.pop(), line.pop(), line.pop()] == [with_one, without, None]


def test_without_ageing_a_low_priority_is_starved(clock, loop):
    """With ageing off a stream of high priorities starves a low one; with it, it does not."""
    for aging_every, starved in ((0, True), (4, False)):
        line = Line(clock, loop, aging_every=aging_every)
        low = line.add(priority=-1)
        popped = []
        for _ in range(12):
            line.add(priority=1)
            popped.append(line.pop())
        assert (low not in popped) is starved


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=60), st.integers(1, 8))
def test_the_longest_wait_is_bounded_by_the_older_waiters(priorities, aging_every):
    """With n older waiters, at most aging_every * (n + 1) admissions."""
    loop = asyncio.new_event_loop()
    line = Line(FakeClock(), loop, aging_every=aging_every)
    waiters = [line.add(priority=priority) for priority in priorities]
    popped = [line.pop() for _ in waiters]
    assert set(popped) == set(waiters)
    for elders, waiter in enumerate(waiters):
        assert popped.index(waiter) < aging_every * (elders + 1)
    loop.close()


def test_a_delayed_waiter_is_skipped_until_it_is_made_ready(line):
    """Others go first; it may be made ready twice, and after it has left."""
    delayed, other = line.add(is_delayed=True, held=True), line.add()
    assert line.pop() is other
    assert line.pop() is None
    line.queue.make_ready(delayed)
    line.queue.make_ready(delayed)
    assert line.pop() is delayed
    line.queue.make_ready(delayed)
    assert line.pop() is None


def test_waiters_of_an_open_model_are_parked_and_the_first_probes(clock, line):
    """In their order; the others when the circuit is closed."""
    line.trip("a")
    second, first, other = line.add("a"), line.add("a", priority=1), line.add("b")
    assert [line.pop(), line.pop()] == [other, None]
    assert line.instant() == clock.now() + 1.0
    clock.advance(1.0)
    assert line.pop() is first
    probe = line.breaker.enter("a")
    assert line.pop() is None
    line.breaker.report(probe, BreakerEffect.SUCCESS)
    assert line.pop() is second


def test_release_ends_every_delay_and_every_parking(line):
    """All of them are ready then, in their order."""
    line.trip("a")
    parked, delayed, other = line.add("a"), line.add("a", is_delayed=True), line.add("b", is_delayed=True)
    assert line.pop() is None
    line.breaker.allow_probe()
    line.queue.release()
    assert [line.pop(), line.pop(), line.pop(), line.pop()] == [parked, delayed, other, None]
    assert len(line.queue) == 0


def test_discarding_is_idempotent_wherever_the_waiter_stands(line):
    """Ready, delayed, parked or gone: the counts stay right."""
    line.trip("a")
    waiters = [line.add(held=True), line.add(is_delayed=True), line.add("a")]
    popped = line.pop()
    assert popped is waiters[0]
    assert line.pop() is None
    for waiter in [*waiters, *waiters]:
        line.queue.discard(waiter)
    assert (len(line.queue), line.queue.held) == (0, 0)
    assert line.pop() is None
    assert line.instant() is None


def test_draining_removes_every_waiter_once(line):
    """Whether it is ready, delayed or parked."""
    line.trip("a")
    waiters = [line.add("a"), line.add(is_delayed=True), line.add(), line.add("a")]
    assert line.pop() is waiters[2]
    assert list(line.queue.drain()) == [waiters[0], waiters[1], waiters[3]]
    assert len(line.queue) == 0
    assert line.instant() is None


@pytest.mark.parametrize("aging_every", [0, 1])
def test_waiters_that_have_left_do_not_stay_in_memory(clock, loop, aging_every):
    """Whether they gave up or were admitted by age, and so left the heap without being its first."""
    line = Line(clock, loop, aging_every=aging_every)
    for _ in range(5000):
        line.queue.discard(line.add())
    for _ in range(5000):
        line.add()
        line.pop()
    assert len(line.queue) == 0
    assert len(line.queue._by_claim) < 200


def test_a_negative_share_is_refused():
    """0 turns ageing off; less than that means nothing."""
    with pytest.raises(ValueError, match="aging_every"):
        WaitQueue(aging_every=-1)
