"""What is remembered of answered messages, how long and how many."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.fakeclock import FakeClock
from worker.pipeline.memory_dedupe import Dedupe, DedupeStatistics, MemoryDedupe


def a_store(clock: FakeClock, capacity: int = 3, ttl_s: float = 60.0) -> MemoryDedupe:
    return MemoryDedupe(capacity, ttl_s, now=clock.now)


def test_the_same_request_is_a_hit_another_one_a_conflict(clock):
    """The fingerprint tells a redelivery from a reused id."""
    store = a_store(clock)
    assert store.get("k", "f") is Dedupe.MISS
    store.put("k", "f")
    assert store.get("k", "f") is Dedupe.HIT
    assert store.get("k", "g") is Dedupe.CONFLICT
    assert store.get("k", "f") is Dedupe.HIT


def test_asking_writes_nothing(clock):
    """Only a published answer is remembered."""
    store = a_store(clock)
    store.get("k", "f")
    assert store.get("k", "f") is Dedupe.MISS
    assert store.statistics().entries == 0


def test_entries_end_with_their_time(clock):
    """Counted from the last `put`, not from the last question."""
    store = a_store(clock)
    store.put("k", "f")
    clock.advance(59.9)
    assert store.get("k", "f") is Dedupe.HIT
    clock.advance(0.1)
    assert store.get("k", "f") is Dedupe.MISS
    assert store.statistics().entries == 0


def test_a_second_put_renews(clock):
    """Time and fingerprint are those of the latest answer."""
    store = a_store(clock)
    store.put("k", "f")
    clock.advance(50.0)
    store.put("k", "g")
    clock.advance(50.0)
    assert store.get("k", "g") is Dedupe.HIT
    assert store.get("k", "f") is Dedupe.CONFLICT


def test_the_least_recently_used_leaves_first(clock):
    """A question counts as use."""
    store = a_store(clock)
    for key in "abc":
        store.put(key, "f")
    store.get("a", "f")
    store.put("d", "f")
    assert [store.get(key, "f") for key in "abcd"] == [Dedupe.HIT, Dedupe.MISS, Dedupe.HIT, Dedupe.HIT]
    assert store.statistics().evicted == 1


def test_statistics_count_what_was_found(clock):
    """An entry that leaves after its time is no eviction."""
    store = a_store(clock, capacity=1)
    store.get("k", "f")
    store.put("k", "f")
    store.get("k", "f")
    store.get("k", "g")
    clock.advance(60.0)
    store.put("l", "f")
    assert store.statistics() == DedupeStatistics(entries=1, hits=1, misses=1, conflicts=1, evicted=0)


@pytest.mark.parametrize(("capacity", "ttl_s"), [(0, 60.0), (1, 0.0)])
def test_a_store_that_remembers_nothing_is_refused(clock, capacity, ttl_s):
    """Turning it off is done by not having one."""
    with pytest.raises(ValueError, match="capacity"):
        a_store(clock, capacity, ttl_s)


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.sampled_from("fg"), st.booleans(), st.floats(0, 40))))
def test_it_never_holds_too_much_and_never_lies(steps):
    """A hit or a conflict is always about the latest `put` of that key, within its time."""
    clock = FakeClock()
    store = a_store(clock)
    model: dict[str, tuple[str, float]] = {}
    for key, fingerprint, put, pause in steps:
        clock.advance(pause)
        if put:
            store.put(key, fingerprint)
            model[key] = (fingerprint, clock.now())
        else:
            answer = store.get(key, fingerprint)
            if answer is not Dedupe.MISS:
                latest, at = model[key]
                assert clock.now() - at < 60.0
                assert (answer is Dedupe.HIT) is (latest == fingerprint)
        assert store.statistics().entries <= 3
