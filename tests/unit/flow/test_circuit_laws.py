"""Whatever is reported to a circuit in whatever order, its laws hold."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from tests.support.fakeclock import FakeClock
from worker.flow.circuit import Circuit, CircuitConfig, CircuitState, Pass


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
