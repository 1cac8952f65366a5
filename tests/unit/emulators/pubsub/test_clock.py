import math

from google.pubsub_v1 import types
from hypothesis import given
from hypothesis import strategies as st

from worker.emulators.pubsub.clock import Timers
from worker.emulators.pubsub.deliveries import Delivery
from worker.emulators.pubsub.messages import store


def deliveries(count: int) -> list[Delivery]:
    return [Delivery(store(types.PubsubMessage.pb()(data=b"x"), number, 0)) for number in range(count)]


def pop_all(timers: Timers, now: float) -> list[Delivery]:
    popped = []
    while (due := timers.pop_due(now)) is not None:
        popped.append(due[1])
    return popped


def test_ends_come_in_order_and_not_before_their_time() -> None:
    """Due ends are popped, earliest first; the others stay."""
    a, b, c = deliveries(3)
    timers = Timers()
    timers.arm(a, 3.0)
    timers.arm(b, 1.0)
    timers.arm(c, 2.0)
    assert timers.next_due() == 1.0
    assert pop_all(timers, 2.0) == [b, c]
    assert timers.next_due() == 3.0
    assert pop_all(timers, 2.9) == []


def test_ends_at_the_same_moment_come_in_publish_order() -> None:
    """The order in which they were set, or extended, does not matter."""
    a, b, c = deliveries(3)
    timers = Timers()
    timers.arm(c, 5.0)
    timers.arm(a, 1.0)
    timers.arm(b, 5.0)
    timers.arm(a, 5.0)
    assert timers.pop_due(5.0) == (5.0, a)
    assert pop_all(timers, 5.0) == [b, c]


def test_an_extended_end_is_not_due_at_its_old_time() -> None:
    """Moving an end later adds no entry to the heap."""
    (a,) = deliveries(1)
    timers = Timers()
    for at in range(1, 100):
        timers.arm(a, float(at))
    assert len(timers) == 1
    assert pop_all(timers, 98.0) == []
    assert timers.next_due() == 99.0
    assert pop_all(timers, 99.0) == [a]


def test_a_shortened_end_is_due_at_its_new_time_only_once() -> None:
    """Moving an end earlier leaves a stale entry, which is never popped."""
    (a,) = deliveries(1)
    timers = Timers()
    timers.arm(a, 10.0)
    timers.arm(a, 5.0)
    assert timers.next_due() == 5.0
    assert pop_all(timers, 20.0) == [a]
    assert timers.next_due() == math.inf


def test_a_disarmed_end_never_comes() -> None:
    """This also holds when the delivery is armed again later."""
    a, b = deliveries(2)
    timers = Timers()
    timers.arm(a, 1.0)
    timers.arm(b, 2.0)
    timers.disarm(a)
    assert timers.next_due() == 2.0
    timers.arm(a, 3.0)
    assert pop_all(timers, 5.0) == [b, a]


def test_memory_follows_the_leases_not_the_traffic() -> None:
    """Stale entries are removed when they outnumber the live ones."""
    timers = Timers()
    keepers = deliveries(10)
    for delivery in keepers:
        timers.arm(delivery, 1e9)
    for _ in range(10_000):
        (passing,) = deliveries(1)
        timers.arm(passing, 1e6)
        timers.disarm(passing)
    assert len(timers) <= 2 * len(keepers) + 65
    assert set(pop_all(timers, 2e9)) == set(keepers)


operations = st.lists(
    st.tuples(st.sampled_from(["arm", "disarm", "pop"]), st.integers(0, 7), st.integers(0, 50)), max_size=200
)


@given(operations)
def test_it_agrees_with_a_dictionary(script: list[tuple[str, int, int]]) -> None:
    """Any sequence of calls pops exactly what a naive table of ends would, in order of time."""
    timers = Timers()
    items = deliveries(8)
    ends: dict[Delivery, float] = {}
    for verb, index, at in script:
        if verb == "arm":
            timers.arm(items[index], float(at))
            ends[items[index]] = float(at)
        elif verb == "disarm":
            timers.disarm(items[index])
            ends.pop(items[index], None)
        else:
            popped = pop_all(timers, float(at))
            due = {item: end for item, end in ends.items() if end <= at}
            assert set(popped) == set(due)
            assert [due[item] for item in popped] == sorted(due.values())
            for item in popped:
                del ends[item]
        assert timers.next_due() == min(ends.values(), default=math.inf)
