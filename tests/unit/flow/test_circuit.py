"""One circuit: when it opens, which attempt is the probe, and which reports are too old to count."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from tests.support.fakeclock import FakeClock
from worker.flow.circuit import DOUBT_S, Circuit, CircuitConfig, CircuitState, Pass


def a_circuit(clock: FakeClock, *, jitter: float = 0.0, **config: object) -> Circuit:
    return Circuit(CircuitConfig(**{"trip_failures": 1, **config}), clock.now, jitter=lambda: jitter)  # type: ignore[arg-type]


def fail(circuit: Circuit, times: int, error_class: str = "server_error") -> None:
    for _ in range(times):
        circuit.record_failure(circuit.enter(), error_class)


def trip(circuit: Circuit, error_class: str = "not_ready", **options: float) -> None:
    circuit.record_failure(circuit.enter(), error_class, trip=True, **options)


def test_opens_after_so_many_counted_failures_in_a_row(clock):
    """Four of five leave it closed, the fifth opens it."""
    circuit = a_circuit(clock)
    fail(circuit, 4)
    assert circuit.allows()
    fail(circuit, 1)
    assert not circuit.allows()
    assert circuit.statistics().error_class == "server_error"


def test_refused_connections_open_it_sooner(clock):
    """Three in a row of the class connect are enough."""
    circuit = a_circuit(clock)
    fail(circuit, 2, "connect")
    assert circuit.allows()
    fail(circuit, 1, "connect")
    assert not circuit.allows()


def test_a_class_limit_needs_a_row_of_that_class(clock):
    """Refused connections between other failures count only towards the general limit."""
    circuit = a_circuit(clock)
    for error_class in ("connect", "connect", "timeout", "connect"):
        fail(circuit, 1, error_class)
    assert circuit.allows()
    fail(circuit, 1, "connect")
    assert not circuit.allows()


def test_a_success_breaks_the_row(clock):
    """Failures count in a row only."""
    circuit = a_circuit(clock)
    fail(circuit, 4)
    circuit.record_success(circuit.enter())
    fail(circuit, 4)
    assert circuit.allows()


def test_old_failures_fall_out_of_the_row(clock):
    """Failures further back than the window do not count."""
    circuit = a_circuit(clock)
    fail(circuit, 4)
    clock.advance(30.0)
    fail(circuit, 4)
    assert circuit.allows()
    assert circuit.statistics().failures == 4


@pytest.mark.parametrize("takes_s", [10.0, 60.0, 600.0])
@pytest.mark.parametrize("slots", [1, 2, 3, 4])
def test_failures_that_take_long_are_a_row_even_with_few_slots(clock, slots, takes_s):
    """One after the other begins when the last has failed: no time is between them, however long each takes."""
    circuit = a_circuit(clock)
    under_way, failures = [], 0
    while circuit.allows():
        under_way += [(circuit.enter(), clock.now()) for _ in range(slots - len(under_way))]
        clock.advance(takes_s / slots)
        token, began_at = under_way.pop(0)
        others = [each for _, each in under_way]
        circuit.record_failure(token, "timeout", key=str(failures), began_at=began_at, under_way=others)
        failures += 1
        if circuit.changes_at() is not None and circuit.state is CircuitState.CLOSED:
            clock.advance(DOUBT_S)
            circuit.end_doubt(others)
        assert failures <= 8
    assert circuit.state is CircuitState.OPEN


def test_a_doubt_that_is_not_ended_in_time_opens_nothing_later(clock):
    """The row is over by then."""
    circuit = a_row_in_doubt(clock)
    clock.advance(30.0)
    assert circuit.is_pristine
    circuit.end_doubt([])
    assert (circuit.state, circuit.allows(), circuit.is_pristine) == (CircuitState.CLOSED, True, True)


def test_a_trip_opens_at_once(clock):
    """One failure of a class that trips is enough."""
    circuit = a_circuit(clock)
    trip(circuit, "auth")
    assert not circuit.allows()
    statistics = circuit.statistics()
    assert (statistics.state, statistics.error_class) == (CircuitState.OPEN, "auth")
    assert statistics.next_probe_at == clock.now() + 1.0


def test_many_that_fail_together_trip_once(clock):
    """Reports of attempts begun before the trip neither trip again nor lengthen the wait."""
    circuit = a_circuit(clock)
    passes = [circuit.enter() for _ in range(100)]
    for token in passes:
        circuit.record_failure(token, "not_ready", trip=True)
    assert circuit.statistics().trips == 1
    assert circuit.statistics().next_probe_at == clock.now() + 1.0


def test_a_row_of_one_message_alone_opens_nothing(clock):
    """The second message opens it; refused connections need no second one, for they are no message's trouble."""
    circuit = a_circuit(clock, trip_failures=2)
    for _ in range(20):
        circuit.record_failure(circuit.enter(), "not_ready", key="m", trip=True)
    assert circuit.allows()
    circuit.record_failure(circuit.enter(), "not_ready", key="n", trip=True)
    assert not circuit.allows()
    circuit = a_circuit(clock)
    for _ in range(3):
        circuit.record_failure(circuit.enter(), "connect", key="m")
    assert not circuit.allows()


@pytest.mark.parametrize(("share", "failures"), [(0.0, 5), (0.1, 5), (0.2, 6), (0.5, 14)])
def test_a_row_has_to_be_longer_than_chance_explains(clock, share, failures):
    """Where messages fail anyhow, five in a row are no news."""
    circuit = a_circuit(clock)
    for index in range(failures):
        assert circuit.allows()
        circuit.record_failure(circuit.enter(), "server_error", key=str(index), failing_share=share)
    assert not circuit.allows()


def a_row_in_doubt(clock: FakeClock, under_way: int = 1) -> Circuit:
    """A row that is long enough, while others are under way that began with it."""
    circuit = a_circuit(clock)
    for index in range(5):
        circuit.record_failure(circuit.enter(), "server_error", key=str(index), under_way=[clock.now()] * under_way)
    return circuit


def test_while_others_are_under_way_a_row_is_in_doubt(clock):
    """It is no trip, but nothing starts."""
    circuit = a_row_in_doubt(clock)
    assert (circuit.state, circuit.allows(), circuit.is_pristine) == (CircuitState.CLOSED, False, False)
    assert circuit.changes_at() == clock.now() + DOUBT_S
    assert circuit.statistics().trips == 0


def test_a_success_ends_the_doubt(clock):
    """Failures are often quicker than answers; nothing was lost but the time of one."""
    circuit = a_row_in_doubt(clock)
    assert not circuit.record_success(Pass(0, is_probe=False), began_at=clock.now())
    assert circuit.allows()
    assert circuit.changes_at() is None
    assert circuit.is_pristine


def test_a_doubt_ends_when_all_have_failed(clock):
    """The last failure leaves none under way that could tell."""
    circuit = a_row_in_doubt(clock)
    circuit.record_failure(Pass(0, is_probe=False), "server_error", key="last")
    assert circuit.state is CircuitState.OPEN


def test_a_doubt_ends_after_its_time(clock):
    """One that hangs is no reason to wait longer, and no report is needed."""
    circuit = a_row_in_doubt(clock)
    under_way = [clock.now()]
    clock.advance(DOUBT_S / 2)
    circuit.end_doubt(under_way)
    assert (circuit.state, circuit.is_doubt_over()) == (CircuitState.CLOSED, False)
    clock.advance(DOUBT_S / 2)
    assert circuit.is_doubt_over()
    circuit.end_doubt(under_way)
    assert (circuit.state, circuit.error_class) == (CircuitState.OPEN, "server_error")
    circuit.end_doubt(under_way)
    assert circuit.statistics().trips == 1


def test_a_row_that_is_outlasted_opens_nothing(clock):
    """Where answers take long, those that fail at once are a row whenever many begin together."""
    circuit = a_row_in_doubt(clock, under_way=15)
    under_way = [clock.now()] * 15
    clock.advance(DOUBT_S)
    circuit.end_doubt(under_way)
    assert (circuit.state, circuit.allows(), circuit.is_pristine) == (CircuitState.CLOSED, True, True)


@pytest.mark.parametrize(
    ("after_s", "is_open"), [(-1.0, True), (-0.01, False), (DOUBT_S - 0.01, False), (DOUBT_S + 0.01, True)]
)
def test_what_began_earlier_or_is_younger_than_the_failures_outlasts_nothing(clock, after_s, is_open):
    """What began before the row may have begun before the fault; what began just now may fail just as late."""
    circuit = a_circuit(clock)
    began_at = clock.now()
    clock.advance(0.2)
    for index in range(5):
        circuit.record_failure(circuit.enter(), "server_error", key=str(index), began_at=began_at, under_way=[began_at])
    clock.advance(DOUBT_S)
    circuit.end_doubt([began_at + after_s] * 15)
    assert (circuit.state is CircuitState.OPEN) is is_open


def test_refused_connections_are_in_no_doubt(clock):
    """They are no message's trouble, whoever else is under way."""
    circuit = a_circuit(clock)
    for _ in range(3):
        circuit.record_failure(circuit.enter(), "connect", key="m", under_way=[clock.now()])
    assert circuit.state is CircuitState.OPEN


@pytest.mark.parametrize(("began_at", "is_in_doubt"), [(2.9, False), (2.99, True), (3.0, True), (9.0, True)])
def test_only_what_began_with_the_row_or_later_can_tell_what_it_is(clock, began_at, is_in_doubt):
    """What began before it may be served although the backend is gone since."""
    circuit = a_circuit(clock, failures=2)
    clock.advance(10.0)
    for key, failed_began_at in (("a", 3.0), ("b", 5.0)):
        circuit.record_failure(circuit.enter(), "server_error", key=key, began_at=failed_began_at, under_way=[began_at])
    assert (circuit.state is CircuitState.CLOSED) is is_in_doubt


@pytest.mark.parametrize(("began_at", "failures"), [(0.0, 4), (2.97, 4), (2.99, 2), (6.0, 0), (7.0, 0)])
def test_a_success_ends_the_failures_of_attempts_that_began_no_later(clock, began_at, failures):
    """It says nothing about a fault that came after it had begun."""
    circuit = a_circuit(clock)
    clock.advance(10.0)
    for key, failed_began_at in (("a", 3.0), ("b", 3.0), ("c", 5.0), ("d", 6.0)):
        circuit.record_failure(circuit.enter(), "server_error", key=key, began_at=failed_began_at)
    circuit.record_success(circuit.enter(), began_at=began_at)
    assert circuit.statistics().failures == failures


def test_a_success_from_before_the_row_leaves_it_in_doubt(clock):
    """Whether it is chance is told by those that began with it."""
    circuit = a_row_in_doubt(clock)
    circuit.record_success(Pass(0, is_probe=False), began_at=clock.now() - 1.0)
    assert not circuit.allows()


def test_the_message_that_failed_last_is_remembered(clock):
    """So that another one is the next probe."""
    circuit = a_circuit(clock)
    circuit.record_failure(circuit.enter(), "not_ready", key="m", trip=True)
    assert circuit.last_failed == "m"


def test_a_probe_that_says_nothing_may_be_followed_later(clock):
    """The circuit stays open for that long, and no longer."""
    circuit = a_circuit(clock)
    trip(circuit)
    clock.advance(1.0)
    circuit.record_ignored(circuit.enter(), wait_s=2.0)
    assert circuit.changes_at() == clock.now() + 2.0


def test_a_late_success_does_not_close_it(clock):
    """An answer to a request sent before the trip is no evidence of now."""
    circuit = a_circuit(clock)
    early = circuit.enter()
    trip(circuit)
    assert not circuit.record_success(early)
    assert not circuit.allows()


def test_a_late_failure_does_not_reopen_it(clock):
    """Attempts that still fail from before the outage do not count after it."""
    circuit = a_circuit(clock)
    early = [circuit.enter() for _ in range(10)]
    trip(circuit)
    clock.advance(1.0)
    assert circuit.record_success(circuit.enter())
    for late in early:
        circuit.record_failure(late, "connection_lost")
    assert circuit.is_pristine


def test_half_open_allows_one_probe(clock):
    """After the wait exactly one attempt may start until its end is reported."""
    circuit = a_circuit(clock)
    trip(circuit)
    clock.advance(1.0)
    probe = circuit.enter()
    assert probe.is_probe
    assert not circuit.allows()
    assert circuit.statistics().next_probe_at is None
    assert circuit.record_success(probe)
    assert circuit.state is CircuitState.CLOSED


@pytest.mark.parametrize(
    ("error_class", "waits"),
    [
        ("not_ready", [1.0, 2.0, 4.0, 4.0]),
        ("auth", [1.0, 2.0, 4.0, 10.0, 20.0, 40.0, 60.0, 60.0]),
        ("quota", [1.0, 2.0, 4.0, 30.0, 60.0, 120.0, 240.0, 300.0, 300.0]),
    ],
)
def test_the_wait_doubles_up_to_the_maximum_of_the_class(clock, error_class, waits):
    """Never above its maximum; the first probes are early whatever the class, for the row may have been chance."""
    circuit = a_circuit(clock)
    for wait in waits:
        trip(circuit, error_class)
        assert circuit.changes_at() == clock.now() + wait
        clock.advance(wait)


def test_the_waits_of_the_class_begin_with_its_shortest_however_many_early_probes_failed(clock):
    """Where many messages fail anyhow more probes are early; a quota that is back is still noticed within a minute."""
    circuit = a_circuit(clock)
    waits = []
    for _ in range(9):
        if circuit.state is CircuitState.CLOSED:
            for _ in range(6):
                trip(circuit, "quota", failing_share=0.2)
        else:
            trip(circuit, "quota", failing_share=0.2)
        changes_at = circuit.changes_at()
        assert changes_at is not None
        waits.append(changes_at - clock.now())
        clock.advance(waits[-1])
    assert waits == [1.0, 2.0, 4.0, 4.0, 4.0, 4.0, 30.0, 60.0, 120.0]


def test_after_closing_the_wait_starts_anew(clock):
    """The doubling ends with the outage."""
    circuit = a_circuit(clock)
    for _ in range(3):
        trip(circuit)
        clock.advance(4.0)
    circuit.record_success(circuit.enter())
    trip(circuit)
    assert circuit.changes_at() == clock.now() + 1.0


def test_retry_after_replaces_the_wait_and_is_capped(clock):
    """It is obeyed to the second, up to a minute; a value below zero is zero."""
    for retry_after_s, wait in ((7.0, 7.0), (0.2, 0.2), (86400.0, 60.0), (-5.0, 0.0)):
        circuit = a_circuit(clock)
        trip(circuit, retry_after_s=retry_after_s)
        assert circuit.changes_at() == clock.now() + wait


def test_jitter_shortens_the_schedule_and_lengthens_a_retry_after(clock):
    """By a tenth at most; never longer than the schedule's maximum, never before the Retry-After."""
    circuit = a_circuit(clock, jitter=1.0)
    trip(circuit)
    assert circuit.changes_at() == pytest.approx(clock.now() + 0.9)
    circuit = a_circuit(clock, jitter=1.0)
    trip(circuit, retry_after_s=10.0)
    assert circuit.changes_at() == pytest.approx(clock.now() + 11.0)


def test_after_an_ignored_probe_another_may_start_at_once(clock):
    """A cancelled probe neither closes the circuit nor costs a wait."""
    circuit = a_circuit(clock)
    trip(circuit)
    clock.advance(1.0)
    circuit.record_ignored(circuit.enter())
    assert circuit.allows()
    assert circuit.state is CircuitState.OPEN


def test_a_hanging_probe_does_not_block_for_ever(clock):
    """After `probe_patience_s` another probe may start; the answer of either counts."""
    circuit = a_circuit(clock)
    trip(circuit)
    clock.advance(1.0)
    hanging = circuit.enter()
    clock.advance(29.9)
    assert not circuit.allows()
    clock.advance(0.2)
    second = circuit.enter()
    assert second.is_probe
    assert circuit.record_success(hanging)
    assert not circuit.record_success(second)


def test_a_probe_may_be_allowed_at_once_and_the_running_one_no_longer_counts(clock):
    """New credentials: the probe with the old ones no longer counts."""
    circuit = a_circuit(clock)
    circuit.allow_probe()
    assert circuit.state is CircuitState.CLOSED
    trip(circuit, "auth")
    clock.advance(10.0)
    old = circuit.enter()
    circuit.allow_probe()
    new = circuit.enter()
    circuit.record_failure(old, "auth", trip=True)
    assert circuit.state is CircuitState.HALF_OPEN
    assert circuit.record_success(new)


def test_entering_an_open_circuit_is_an_error(clock):
    """A caller that does not ask `allows` first gets an exception."""
    circuit = a_circuit(clock)
    trip(circuit)
    with pytest.raises(RuntimeError):
        circuit.enter()


@pytest.mark.parametrize(
    "config",
    [
        {"failures": 0},
        {"class_failures": {"connect": 0}},
        {"window_s": 0.0},
        {"probe_patience_s": 0.0},
        {"max_retry_after_s": -1.0},
    ],
)
def test_impossible_settings_are_refused(config):
    """A configuration that can never work cannot be built."""
    with pytest.raises(ValueError, match=r"count from 1|must be positive"):
        CircuitConfig(**config)


# Whatever is reported in whatever order.


class CircuitMachine(RuleBasedStateMachine):
    """Whatever is reported in whatever order, the laws of the circuit hold."""

    passes = Bundle("passes")

    def __init__(self) -> None:
        super().__init__()
        self.clock = FakeClock()
        self.circuit = Circuit(CircuitConfig(), self.clock.now, jitter=lambda: 0.0)
        self.probes: set[int] = set()

    @rule(target=passes)
    def enter(self) -> Pass | None:
        if not self.circuit.allows():
            with pytest.raises(RuntimeError):
                self.circuit.enter()
            return None
        was_closed = self.circuit.state is CircuitState.CLOSED
        token = self.circuit.enter()
        assert token.is_probe is not was_closed
        if token.is_probe:
            assert not self.circuit.allows(), "a second probe would be let through beside the first"
        return token

    @rule(token=consumes(passes), trips=st.booleans(), retry_after_s=st.none() | st.floats(-1, 1e6))
    def fail(self, token: Pass | None, trips: bool, retry_after_s: float | None) -> None:
        if token is None:
            return
        before = self.circuit.statistics()
        self.circuit.record_failure(token, "x", trip=trips, retry_after_s=retry_after_s)
        after = self.circuit.statistics()
        if (after.state, after.next_probe_at) != (before.state, before.next_probe_at):
            assert after.state is CircuitState.OPEN
            assert after.next_probe_at is not None
            assert after.next_probe_at - self.clock.now() <= 300.001

    @rule(token=consumes(passes))
    def succeed(self, token: Pass | None) -> None:
        if token is not None and self.circuit.record_success(token):
            assert token.is_probe
            assert self.circuit.is_pristine

    @rule(token=consumes(passes))
    def ignore(self, token: Pass | None) -> None:
        if token is not None:
            closed = self.circuit.state is CircuitState.CLOSED
            self.circuit.record_ignored(token)
            assert (self.circuit.state is CircuitState.CLOSED) is closed

    @rule(seconds=st.floats(0, 400))
    def wait(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule()
    def allow_probe(self) -> None:
        self.circuit.allow_probe()
        assert self.circuit.allows()

    @invariant()
    def never_stuck(self) -> None:
        """An open circuit always names the instant at which it lets something through."""
        at = self.circuit.changes_at()
        assert (at is None) is (self.circuit.state is CircuitState.CLOSED)
        assert at is None or at - self.clock.now() <= 300.001

    @invariant()
    def reasons_only_while_open(self) -> None:
        statistics = self.circuit.statistics()
        is_closed = statistics.state is CircuitState.CLOSED
        assert (statistics.error_class is None) is is_closed


CircuitMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
test_circuit_laws = CircuitMachine.TestCase
