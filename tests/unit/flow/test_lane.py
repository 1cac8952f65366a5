"""Lanes: what concerns one model stops that model, what concerns the backend stops all, and there are not too many."""

import pytest

from tests.support.fakeclock import FakeClock, settle
from tests.support.flow import (
    AUTH,
    LOADING,
    OK,
    ONE_IS_ENOUGH,
    REFUSED,
    SERVER_ERROR,
    NoJitter,
    a_gate,
    admit,
    admit_after,
    waiting,
)
from worker.flow.circuit import CircuitConfig, CircuitState
from worker.flow.gate import AttemptSignal, RouteGate
from worker.flow.lane import MAX_LANES, SHARED, BreakerChange, BreakerEffect, Lanes
from worker.flow.window.adaptive import AdaptiveWindow


def states(gate: RouteGate) -> dict[str, CircuitState]:
    return {name: lane.circuit.state for name, lane in gate.statistics().lanes.items()}


async def test_a_models_failure_stops_only_that_model(clock: FakeClock) -> None:
    """Other models and requests without one go on, each in a window of its own."""
    gate = a_gate(clock)
    (await admit(gate, lane_name="a")).finish(LOADING)
    stopped = waiting(gate, lane_name="a")
    await settle()
    assert not stopped.done()
    for model in ("b", "c", None):
        assert (await admit(gate, lane_name=model)) is not None
    assert states(gate) == {
        "a": CircuitState.OPEN,
        "b": CircuitState.CLOSED,
        "c": CircuitState.CLOSED,
        "": CircuitState.CLOSED,
    }
    gate.close()
    with pytest.raises(Exception, match="draining"):
        await stopped


async def test_one_message_alone_opens_nothing(clock: FakeClock) -> None:
    """However often it fails, and whatever the backend says; a second message that fails confirms it."""
    for signal in (LOADING, AttemptSignal(breaker=BreakerEffect.COUNT, error_class="server_error")):
        gate = a_gate(clock, config=CircuitConfig())
        for _ in range(10):
            (await admit(gate, key="m")).finish(signal)
        assert states(gate) == {"": CircuitState.CLOSED}
        (await admit(gate, key="n")).finish(signal)
        assert states(gate) == {"": CircuitState.OPEN}


async def test_refused_connections_of_one_message_open_the_route(clock: FakeClock) -> None:
    """A host that refuses connections is no message's trouble."""
    gate = a_gate(clock, config=CircuitConfig())
    for _ in range(3):
        (await admit(gate, key="m")).finish(REFUSED)
    assert gate.statistics().circuit.state is CircuitState.OPEN


async def test_a_models_failure_does_not_decide_the_routes_probe(clock: FakeClock) -> None:
    """The route stays open, and another message may probe it at once."""
    gate = a_gate(clock)
    (await admit(gate)).finish(AUTH)
    probe = await admit_after(gate, clock, 1.0)
    assert probe.is_route_probe
    probe.finish(LOADING)
    assert gate.statistics().circuit.state is CircuitState.OPEN
    assert (await admit(gate, lane_name="b")).is_route_probe


async def test_a_failure_of_the_route_frees_the_models_probe(clock: FakeClock) -> None:
    """When the backend refuses, nothing was learned about the model."""
    gate = a_gate(clock)
    (await admit(gate, lane_name="a")).finish(LOADING)
    clock.advance(1.0)
    (await admit(gate, lane_name="a")).finish(AUTH)
    clock.advance(1.0)
    assert (await admit(gate, lane_name="a")).is_probe


async def test_a_circuit_that_opens_or_closes_is_reported_once(clock: FakeClock) -> None:
    """With its model; failures of attempts that started before, and probes that fail, report nothing."""
    changes: list[BreakerChange] = []
    gate = RouteGate(
        lambda: AdaptiveWindow(8, 8, 8, now=clock.now), ONE_IS_ENOUGH, clock, on_change=changes.append, rng=NoJitter()
    )
    permits = [await admit(gate, lane_name="a") for _ in range(3)]
    for permit in permits:
        permit.finish(LOADING)
    clock.advance(1.0)
    (await admit(gate, lane_name="a")).finish(LOADING)
    clock.advance(2.0)
    probe = await admit(gate, lane_name="a")
    probe.first_byte()
    probe.finish(OK)
    (await admit(gate)).finish(AUTH)
    assert changes == [
        BreakerChange(lane="a", error_class="not_ready", open_s=None),
        BreakerChange(lane="a", error_class="not_ready", open_s=3.0),
        BreakerChange(lane=None, error_class="auth", open_s=None),
    ]


async def test_lanes_are_bounded_whatever_models_are_asked_for(clock: FakeClock) -> None:
    """An idle lane makes room; where every lane is in use, further models share one."""
    gate = a_gate(clock)
    for index in range(3 * MAX_LANES):
        (await admit(gate, lane_name=f"idle {index}")).finish(OK)
    assert len(gate.statistics().lanes) == MAX_LANES
    permits = [await admit(gate, lane_name=f"busy {index}") for index in range(MAX_LANES)]
    shared = await admit(gate, lane_name="one more")
    assert gate.statistics().lanes[SHARED].in_flight == 1
    blocked = waiting(gate, lane_name="yet another")
    await settle()
    assert not blocked.done()
    for permit in (*permits, shared):
        permit.finish(OK)
    (await blocked).finish(OK)


async def test_a_lane_that_is_stopped_is_not_forgotten(clock: FakeClock) -> None:
    """Requesters that invent names cannot reopen a circuit."""
    gate = a_gate(clock)
    (await admit(gate, lane_name="down")).finish(LOADING)
    for index in range(2 * MAX_LANES):
        (await admit(gate, lane_name=f"m{index}")).finish(OK)
    assert states(gate)["down"] is CircuitState.OPEN


async def test_a_failure_long_ago_keeps_no_lane(clock: FakeClock) -> None:
    """It can be in no row any more, so that the lane makes room for another model."""
    gate = a_gate(clock)
    for index in range(MAX_LANES):
        (await admit(gate, lane_name=f"failed once {index}")).finish(SERVER_ERROR)
    at_once = await admit(gate, lane_name="at once")
    assert "at once" not in gate.statistics().lanes
    clock.advance(30.0)
    later = await admit(gate, lane_name="later")
    assert gate.statistics().lanes["later"].in_flight == 1
    later.finish(OK)
    at_once.finish(OK)


def test_a_model_without_a_lane_of_its_own_is_found_in_the_shared_one(clock: FakeClock) -> None:
    """Nothing is made by looking."""
    lanes = Lanes(lambda name: name, limit=1)  # type: ignore[arg-type, return-value]
    assert lanes.find("a") is None
    assert len(list(lanes)) == 0
