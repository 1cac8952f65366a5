"""The queue of a lane: claims, ages, delays, probes, and nothing left behind."""

import asyncio
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.flow.queue import ALONE, MAX_SHARES, AdmissionOrder, Share, Waiter, WaiterState, WaitQueue


@pytest.fixture
def loop():
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


class Line:
    """A queue with an event loop at hand."""

    def __init__(self, loop: asyncio.AbstractEventLoop, *, aging_every: int = 0) -> None:
        self.loop = loop
        self.queue = WaitQueue(aging_every=aging_every, rng=random.Random(1))

    def add(
        self, key: str | None = None, *, rank: int = 0, is_delayed: bool = False, since: float = 0.0, **order
    ) -> Waiter:
        waiter = Waiter(AdmissionOrder(**order), self.loop.create_future(), key=key, rank=rank, since=since)
        self.queue.add(waiter, is_delayed=is_delayed)
        return waiter

    def pop(self, now: float = 0.0) -> Waiter | None:
        return self.queue.pop(lambda: now)


@pytest.fixture
def line(loop):
    return Line(loop)


def test_no_deadline_comes_after_every_deadline(line):
    """A message without a deadline goes last among equals."""
    without, with_one = line.add(), line.add(deadline=1e12)
    assert [line.pop(), line.pop(), line.pop()] == [with_one, without, None]


def test_without_ageing_a_low_priority_is_starved(loop):
    """With ageing off a stream of high priorities starves a low one; with it, it does not."""
    for aging_every, starved in ((0, True), (4, False)):
        line = Line(loop, aging_every=aging_every)
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
    line = Line(loop, aging_every=aging_every)
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


def test_a_message_that_failed_stands_behind_those_that_did_not(line):
    """One step for each failure, whatever its priority and age; it is still the next one where no other waits."""
    twice = line.add(rank=2, priority=9, publish_time=1.0)
    once = line.add(rank=1, publish_time=2.0)
    fresh = line.add(publish_time=3.0)
    assert [line.pop(), line.pop(), line.pop()] == [fresh, once, twice]


def test_a_message_that_failed_is_not_starved(loop):
    """However many fresh ones come, one admission in so many is its own."""
    line = Line(loop, aging_every=4)
    failed = line.add(rank=30)
    popped = []
    for _ in range(8):
        line.add()
        popped.append(line.pop())
    assert failed in popped


def test_a_probe_is_another_message_than_the_one_that_failed_last(line):
    """A fresh one where there is one, else one with fewer failures, and the same one only where no other is ready."""
    last, worse = line.add("last", rank=1), line.add("worse", rank=2)
    fresh, delayed = line.add("fresh"), line.add("delayed", is_delayed=True)
    assert [line.queue.pop_probe("last", newest=False) for _ in range(4)] == [fresh, worse, last, None]
    assert delayed.state is WaiterState.DELAYED


def test_probes_are_chosen_at_random_among_fresh_messages(loop):
    """A block of messages that fail, first in the queue, does not supply every probe."""
    places = []
    for seed in range(40):
        line = Line(loop)
        line.queue._rng.seed(seed)
        waiters = [line.add(str(index)) for index in range(10)]
        places.append(waiters.index(line.queue.pop_probe(None, newest=False)))
    assert len(set(places)) > 5


def test_the_newest_fresh_message_is_the_least_like_those_that_failed(line):
    """What came together often fails together."""
    line.add("old")
    newest = line.add("new")
    line.add("newer, but it failed", rank=1)
    assert line.queue.pop_probe(None, newest=True) is newest


def test_release_ends_every_delay(line):
    """All of them are ready then; those that failed stand behind the others still."""
    failed, delayed = line.add(rank=3, publish_time=1.0), line.add(is_delayed=True, publish_time=2.0)
    fresh = line.add(publish_time=3.0)
    line.queue.release()
    assert [line.pop(), line.pop(), line.pop(), line.pop()] == [delayed, fresh, failed, None]
    assert len(line.queue) == 0


def test_forgiving_ends_every_step_back(line):
    """Ready ones stand in the order of their claims alone; delayed ones wait on."""
    failed, delayed = line.add(rank=3, publish_time=1.0), line.add(rank=2, is_delayed=True, publish_time=2.0)
    fresh = line.add(publish_time=3.0)
    line.queue.forgive()
    assert [line.pop(), line.pop(), line.pop()] == [failed, fresh, None]
    assert (delayed.rank, delayed.state) == (0, WaiterState.DELAYED)


def test_discarding_is_idempotent_wherever_the_waiter_stands(line):
    """Ready, delayed or gone: the counts stay right."""
    waiters = [line.add(held=True), line.add(is_delayed=True), line.add()]
    assert line.pop() is waiters[0]
    for waiter in [*waiters, *waiters]:
        line.queue.discard(waiter)
    assert (len(line.queue), line.queue.held) == (0, 0)
    assert line.pop() is None


def test_draining_removes_every_waiter_once(line):
    """Whether it is ready or delayed."""
    waiters = [line.add(is_delayed=True), line.add(), line.add()]
    assert line.pop() is waiters[1]
    assert list(line.queue.drain()) == [waiters[0], waiters[2]]
    assert len(line.queue) == 0


@pytest.mark.parametrize("aging_every", [0, 1])
def test_waiters_that_have_left_do_not_stay_in_memory(loop, aging_every):
    """Whether they gave up or were admitted by age, and so left the heap without being its first."""
    line = Line(loop, aging_every=aging_every)
    for _ in range(5000):
        line.queue.discard(line.add())
    for _ in range(5000):
        line.add()
        line.pop()
    assert len(line.queue) == 0
    assert len(line.queue._lines[ALONE]._by_claim) < 200


def test_a_negative_share_is_refused():
    """0 turns ageing off; less than that means nothing."""
    with pytest.raises(ValueError, match="aging_every"):
        WaitQueue(aging_every=-1)


# Shares


def shares_of(line: Line, count: int, *, seconds: dict[str, float] | None = None) -> list[str]:
    """Start so many waiters, each ending at once after its share's time; return whose they were."""
    started = []
    for _ in range(count):
        waiter = line.pop()
        assert waiter is not None
        started.append(waiter.order.share.name)
        if seconds is not None:
            line.queue.settle(waiter.order.share, seconds[waiter.order.share.name])
    return started


def test_a_lower_level_comes_first(line):
    """Whatever the deadlines and priorities of the other; a delayed waiter keeps nobody back."""
    people, batch = Share(0, "people"), Share(1, "batch")
    first = line.add(share=batch, priority=9, deadline=1.0)
    second = line.add(share=people)
    delayed = line.add(share=people, is_delayed=True)
    assert [line.pop(), line.pop()] == [second, first]
    line.queue.make_ready(delayed)
    line.add(share=batch)
    assert line.pop() is delayed


def test_weights_share_out_the_starts(line):
    """Three to one, evenly spread, while both wait."""
    for _ in range(60):
        line.add(share=Share(0, "a", 3.0))
        line.add(share=Share(0, "b", 1.0))
    started = shares_of(line, 40)
    assert started.count("a") == 30
    assert all(started[start : start + 4].count("b") == 1 for start in range(0, 40, 4))


def test_long_answers_cost_their_share_more(line):
    """Equal weights are equal parts of the window, not of the starts."""
    for _ in range(200):
        line.add(share=Share(0, "long"))
        line.add(share=Share(0, "short"))
    started = shares_of(line, 200, seconds={"long": 3.0, "short": 1.0})
    assert 0.65 < started.count("short") / 200 < 0.85


def test_what_a_share_does_not_use_is_not_saved_up(line):
    """One that comes back after a while gets its part from then on, and no more."""
    for _ in range(100):
        line.add(share=Share(0, "a"))
    shares_of(line, 50)
    for _ in range(50):
        line.add(share=Share(0, "b"))
    assert shares_of(line, 20).count("b") == 10


def test_one_message_at_a_time_is_no_advantage(line):
    """A share that never has two waiters gets its part, not every second start of ten shares."""
    names = [f"s{number}" for number in range(9)]
    for _ in range(50):
        for name in names:
            line.add(share=Share(0, name))
    started = []
    for _ in range(100):
        if not any(each.order.share.name == "one" for each in line.queue._all()):
            line.add(share=Share(0, "one"))
        started += shares_of(line, 1)
    assert 8 <= started.count("one") <= 12


def test_what_failed_comes_after_the_fresh_ones_of_other_shares(line):
    """A tenant whose messages always fail keeps no other one waiting."""
    bad, good = line.add(share=Share(0, "bad"), rank=1), line.add(share=Share(0, "good"))
    assert [line.pop(), line.pop()] == [good, bad]


def test_shares_are_forgotten(line):
    """Their names come from requesters."""
    for number in range(2000):
        line.add(share=Share(0, f"t{number}"))
        line.pop()
    assert len(line.queue._lines) <= MAX_SHARES + 2


def test_ageing_stays_within_the_share(loop):
    """A strict level is strict."""
    line = Line(loop, aging_every=2)
    batch = [line.add(share=Share(1, "batch")) for _ in range(4)]
    people = [line.add(share=Share(0, "people"), priority=number) for number in range(4)]
    started = [line.pop() for _ in range(8)]
    assert set(started[:4]) == set(people)
    assert set(started[4:]) == set(batch)


def popped(line: Line, now: float = 0.0) -> list[str | None]:
    """Keys of all waiters in the order in which they start."""
    keys = []
    while (waiter := line.pop(now)) is not None:
        keys.append(waiter.key)
    return keys


def test_equal_prefixes_start_one_after_the_other(line):
    """The oldest of each group brings its group along; without a prefix there is no group."""
    for key, prefix in (("a1", 1), ("b1", 2), ("c", None), ("a2", 1), ("d", None), ("b2", 2), ("a3", 1)):
        line.add(key, prefix=prefix)
    assert popped(line) == ["a1", "a2", "a3", "b1", "b2", "c", "d"]


def test_a_group_goes_on_with_those_that_come_later(line):
    """As long as it has one ready; then the first one is next."""
    line.add("a1", prefix=1)
    line.add("b1", prefix=2)
    assert line.pop().key == "a1"
    line.add("a2", prefix=1)
    delayed = line.add("a3", prefix=1, is_delayed=True)
    assert [line.pop().key, line.pop().key] == ["a2", "b1"]
    line.queue.make_ready(delayed)
    assert popped(line) == ["a3"]


def test_deadlines_priorities_and_failures_come_before_prefixes(line):
    """Only among those that are alike in all of them does a prefix decide."""
    line.add("a1", prefix=1)
    line.add("b1", prefix=2)
    line.add("a failed", prefix=1, rank=1)
    line.add("a late", prefix=1, priority=-1)
    assert line.pop().key == "a1"
    line.add("urgent", prefix=3, priority=5)
    line.add("due", prefix=4, deadline=9.0)
    assert popped(line) == ["due", "urgent", "b1", "a late", "a failed"]


def test_a_common_deadline_does_not_keep_groups_apart(line):
    """As in a batch whose requests have to be ready by the same time."""
    for key, prefix in (("a1", 1), ("b1", 2), ("a2", 1)):
        line.add(key, prefix=prefix, deadline=9.0)
    assert popped(line) == ["a1", "a2", "b1"]


def test_none_is_overtaken_for_ever(line):
    """One that has waited for `overtaken_s` is next, however many of the group there are."""
    line.add("a1", prefix=1)
    line.add("b1", prefix=2, since=10.0)
    line.add("a2", prefix=1, since=11.0)
    assert line.pop(now=309.0).key == "a1"
    line.add("a3", prefix=1, since=305.0)
    assert line.pop(now=309.0).key == "a2"
    assert line.pop(now=310.0).key == "b1"


def test_ageing_goes_on_with_groups(loop):
    """One admission in so many goes to the longest wait, and leaves the group as it is."""
    line = Line(loop, aging_every=3)
    line.add("a0", prefix=1)
    line.add("b", prefix=2)
    for number in range(1, 5):
        line.add(f"a{number}", prefix=1)
    assert popped(line) == ["a0", "a1", "b", "a2", "a3", "a4"]


def test_shares_have_groups_of_their_own(line):
    """The one that is next by its part of the window goes on with its own group."""
    first, second = Share(name="x"), Share(name="y")
    for key, share, prefix in (
        ("x1", first, 1),
        ("y1", second, 2),
        ("x2", first, 3),
        ("y2", second, 2),
        ("x3", first, 1),
    ):
        line.add(key, share=share, prefix=prefix)
    assert popped(line) == ["x1", "y1", "x3", "y2", "x2"]


@given(st.lists(st.tuples(st.sampled_from([None, 1, 2, 3]), st.integers(0, 1), st.booleans()), min_size=1, max_size=60))
def test_groups_lose_and_repeat_no_waiter(entries):
    """Whatever the order of adding, leaving and starting: each starts once, and nothing is kept of those that left."""
    loop = asyncio.new_event_loop()
    line = Line(loop, aging_every=4)
    waiters = [line.add(str(number), prefix=prefix, priority=high) for number, (prefix, high, _) in enumerate(entries)]
    for waiter, (_, _, leaves) in zip(waiters, entries, strict=True):
        if leaves:
            line.queue.discard(waiter)
    stayed = [waiter.key for waiter in waiters if waiter.state is not WaiterState.GONE]
    assert sorted(popped(line)) == sorted(stayed)
    assert len(line.queue) == 0
    assert not any(each._by_prefix or each.waiters for each in line.queue._lines.values())
    loop.close()
