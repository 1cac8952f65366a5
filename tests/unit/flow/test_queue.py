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

    def add(self, model: str | None = None, *, delay_s: float = 0.0, give_up_s: float | None = None, **order) -> Waiter:
        now = self.clock.now()
        waiter = Waiter(
            order=AdmissionOrder(**order),
            model=model,
            future=self.loop.create_future(),
            ready_at=now + delay_s,
            give_up_at=None if give_up_s is None else now + give_up_s,
        )
        self.queue.add(waiter, now)
        return waiter

    def pop(self) -> Waiter | None:
        self.queue.ripen(self.clock.now(), self.breaker)
        return self.queue.pop(self.breaker)

    def trip(self, model: str) -> None:
        token = self.breaker.enter(model)
        self.breaker.report(token, BreakerEffect.TRIP, error_class="not_ready", scope=BreakerScope.MODEL)

    def instant(self) -> float | None:
        return self.queue.next_instant(self.clock.now(), self.breaker)


@pytest.fixture
def line(clock, loop):
    return Line(clock, loop)


def test_no_deadline_comes_after_every_deadline(line):
    """A message that may wait for ever does."""
    without, with_one = line.add(), line.add(deadline=1e12)
    assert [line.pop(), line.pop(), line.pop()] == [with_one, without, None]


def test_strict_order_never_lets_the_low_one_go(clock, loop):
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
def test_nobody_waits_longer_than_its_elders_allow(priorities, aging_every):
    """With n older waiters, at most aging_every * (n + 1) admissions."""
    loop = asyncio.new_event_loop()
    line = Line(FakeClock(), loop, aging_every=aging_every)
    waiters = [line.add(priority=priority) for priority in priorities]
    popped = [line.pop() for _ in waiters]
    assert set(popped) == set(waiters)
    for elders, waiter in enumerate(waiters):
        assert popped.index(waiter) < aging_every * (elders + 1)
    loop.close()


def test_a_delayed_waiter_is_passed_over_until_it_is_ready(clock, line):
    """Others go first; its instant is announced."""
    delayed, other = line.add(delay_s=5.0, held=True), line.add()
    assert line.instant() == clock.now() + 5.0
    assert line.pop() is other
    assert line.pop() is None
    clock.advance(5.0)
    assert line.pop() is delayed
    assert line.instant() is None


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


def test_release_ends_delays_and_parking_of_one_model_or_all(line):
    """What is delayed elsewhere stays delayed."""
    line.trip("a")
    parked, delayed, other = line.add("a"), line.add("a", delay_s=9.0), line.add("b", delay_s=9.0)
    assert line.pop() is None
    line.breaker.poke("a")
    line.queue.release("a")
    assert [line.pop(), line.pop(), line.pop()] == [parked, delayed, None]
    line.queue.release(None)
    assert line.pop() is other


def test_the_impatient_leave_in_time(clock, line):
    """Only those whose patience is over; the next one is announced."""
    line.add(give_up_s=9.0)
    impatient = line.add(give_up_s=3.0, delay_s=60.0)
    assert line.instant() == clock.now() + 3.0
    clock.advance(3.0)
    assert list(line.queue.expired(clock.now())) == [impatient]
    assert len(line.queue) == 1
    assert line.instant() == clock.now() + 6.0


def test_discarding_is_idempotent_wherever_the_waiter_stands(line):
    """Ready, delayed, parked or gone: the counts stay right."""
    line.trip("a")
    waiters = [line.add(held=True), line.add(delay_s=5.0), line.add("a")]
    popped = line.pop()
    assert popped is waiters[0]
    assert line.pop() is None
    for waiter in [*waiters, *waiters]:
        line.queue.discard(waiter)
    assert (len(line.queue), line.queue.held) == (0, 0)
    assert line.pop() is None
    assert line.instant() is None


def test_draining_takes_everyone_out_once(line):
    """From every place."""
    line.trip("a")
    waiters = {line.add(), line.add(delay_s=5.0), line.add("a"), line.add("a", give_up_s=1.0)}
    assert line.pop() in waiters
    drained = list(line.queue.drain())
    assert len(drained) == 3
    assert set(drained) < waiters
    assert len(line.queue) == 0


def test_dead_entries_are_swept(line):
    """Waiters that leave do not stay in memory until their patience would have been over."""
    for _ in range(5000):
        line.queue.discard(line.add(give_up_s=1e6, delay_s=1e6))
    assert len(line.queue._patience._entries) < 200
    assert len(line.queue._delayed._entries) < 200
    for _ in range(5000):
        line.add(give_up_s=1e6)
        line.pop()
    assert len(line.queue._by_claim._entries) < 200
    assert len(line.queue._by_age._entries) < 200


def test_a_negative_share_is_refused():
    """0 turns ageing off; less than that means nothing."""
    with pytest.raises(ValueError, match="aging_every"):
        WaitQueue(aging_every=-1)
