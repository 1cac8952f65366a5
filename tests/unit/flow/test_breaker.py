"""The breaker of a route: what concerns one model stops that model, what concerns the backend stops all."""

import pytest

from tests.support.fakeclock import FakeClock
from worker.flow.breaker import CONNECT, MAX_MODELS, Breaker, BreakerChange, BreakerEffect, BreakerScope
from worker.flow.circuit import CircuitState


def a_breaker(clock: FakeClock) -> Breaker:
    return Breaker(now=clock.now, jitter=lambda: 0.0)


def trip_model(breaker: Breaker, model: str | None) -> None:
    breaker.report(breaker.enter(model), BreakerEffect.TRIP, error_class="not_ready", scope=BreakerScope.MODEL)


def test_a_models_failure_stops_only_that_model(clock):
    """Other models and requests without one go on."""
    breaker = a_breaker(clock)
    trip_model(breaker, "a")
    assert not breaker.allows_model("a")
    assert breaker.allows_model("b")
    assert breaker.allows_model(None)
    assert breaker.allows_route()
    with pytest.raises(RuntimeError):
        breaker.enter("a")


def test_a_models_probe_closes_its_circuit_and_it_is_forgotten(clock):
    """Nothing is remembered of a model that works."""
    breaker = a_breaker(clock)
    trip_model(breaker, "a")
    assert breaker.model_changes_at("a") == clock.now() + 1.0
    clock.advance(1.0)
    probe = breaker.enter("a")
    assert not breaker.allows_model("a")
    assert breaker.report(probe, BreakerEffect.SUCCESS)
    assert breaker.statistics().models == {}
    assert breaker.model_changes_at("a") is None


def test_counted_failures_of_a_model_add_up_for_it_alone(clock):
    """Five of one model open its circuit, not the route's."""
    breaker = a_breaker(clock)
    for _ in range(5):
        token = breaker.enter("a")
        breaker.report(token, BreakerEffect.COUNT, error_class="server_error", scope=BreakerScope.MODEL)
    assert not breaker.allows_model("a")
    assert breaker.is_closed
    assert breaker.statistics().route.failures == 0


def test_a_models_failures_together_trip_it_once(clock):
    """Attempts that started before its circuit opened, or before it closed again, change nothing."""
    breaker = a_breaker(clock)
    early = [breaker.enter("a") for _ in range(3)]
    for token in early[:2]:
        breaker.report(token, BreakerEffect.TRIP, error_class="not_ready", scope=BreakerScope.MODEL)
    assert breaker.statistics().models["a"].trips == 1
    clock.advance(1.0)
    breaker.report(breaker.enter("a"), BreakerEffect.SUCCESS)
    breaker.report(early[2], BreakerEffect.TRIP, error_class="not_ready", scope=BreakerScope.MODEL)
    assert breaker.allows_model("a")


def test_a_scope_without_a_model_is_the_route(clock):
    """A request that names no model cannot open a model's circuit."""
    breaker = a_breaker(clock)
    trip_model(breaker, None)
    assert not breaker.allows_route()


def test_a_models_failure_does_not_decide_the_routes_probe(clock):
    """The route stays open, and another message may probe it at once."""
    breaker = a_breaker(clock)
    breaker.report(breaker.enter(), BreakerEffect.TRIP, error_class="auth")
    clock.advance(10.0)
    probe = breaker.enter("a")
    assert probe.is_probe
    assert not breaker.allows_route()
    breaker.report(probe, BreakerEffect.TRIP, error_class="not_ready", scope=BreakerScope.MODEL)
    assert breaker.statistics().route.state is CircuitState.OPEN
    assert breaker.allows_route()
    assert not breaker.allows_model("a")


def test_an_end_that_says_nothing_frees_both_probes(clock):
    """A cancelled attempt may have been the probe of the route and of its model."""
    breaker = a_breaker(clock)
    trip_model(breaker, "a")
    breaker.report(breaker.enter(), BreakerEffect.TRIP, error_class="not_ready")
    clock.advance(1.0)
    breaker.report(breaker.enter("a"), BreakerEffect.NONE)
    assert breaker.allows_route()
    assert breaker.allows_model("a")


def test_a_failure_of_the_route_frees_the_models_probe(clock):
    """When the backend refuses, nothing was learned about the model."""
    breaker = a_breaker(clock)
    trip_model(breaker, "a")
    clock.advance(1.0)
    breaker.report(breaker.enter("a"), BreakerEffect.TRIP, error_class="auth")
    assert breaker.allows_model("a")
    assert not breaker.allows_route()


def test_a_connection_closes_what_refused_connections_opened(clock):
    """An established connection is enough there, and says nothing about credentials."""
    for error_class, closes in (("connect", True), ("auth", False)):
        breaker = a_breaker(clock)
        breaker.report(breaker.enter(), BreakerEffect.TRIP, error_class=error_class)
        clock.advance(10.0)
        assert breaker.connected(breaker.enter()) is closes
        assert breaker.is_closed is closes


def test_a_probe_of_the_route_and_of_every_model_may_be_allowed_at_once(clock):
    """Every open circuit allows an attempt then."""
    breaker = a_breaker(clock)
    trip_model(breaker, "a")
    trip_model(breaker, "b")
    breaker.report(breaker.enter(), BreakerEffect.TRIP, error_class="auth")
    breaker.allow_probe()
    assert (breaker.allows_route(), breaker.allows_model("a"), breaker.allows_model("b")) == (True, True, True)


def test_circuits_that_only_count_make_room_for_others(clock):
    """Memory is bounded whatever names requesters invent; the oldest that is merely counting is forgotten."""
    breaker = a_breaker(clock)
    for index in range(MAX_MODELS + 10):
        token = breaker.enter(f"m{index}")
        breaker.report(token, BreakerEffect.COUNT, error_class="x", scope=BreakerScope.MODEL)
    models = breaker.statistics().models
    assert len(models) == MAX_MODELS
    assert "m0" not in models
    assert f"m{MAX_MODELS + 9}" in models


def test_open_circuits_are_kept_and_further_models_have_none(clock):
    """While as many circuits are open as there may be, another model's failure is not remembered."""
    breaker = a_breaker(clock)
    for index in range(MAX_MODELS + 1):
        trip_model(breaker, f"m{index}")
    assert not breaker.allows_model("m0")
    assert breaker.allows_model(f"m{MAX_MODELS}")


def test_a_circuit_that_opens_or_closes_is_reported_once(clock):
    """Failures of attempts that started before, and probes that fail, report nothing; the time open is the whole."""
    changes: list[BreakerChange] = []
    breaker = Breaker(now=clock.now, jitter=lambda: 0.0, on_change=changes.append)
    passes = [breaker.enter() for _ in range(4)]
    for token in passes:
        breaker.report(token, BreakerEffect.COUNT, error_class=CONNECT)
    clock.advance(1.0)
    breaker.report(breaker.enter(), BreakerEffect.COUNT, error_class="server_error")
    clock.advance(2.0)
    probe = breaker.enter()
    breaker.report(probe, BreakerEffect.SUCCESS)
    breaker.report(breaker.enter(), BreakerEffect.SUCCESS)
    assert changes == [
        BreakerChange(model=None, error_class=CONNECT, open_s=None),
        BreakerChange(model=None, error_class="server_error", open_s=3.0),
    ]


def test_the_circuit_of_a_model_is_reported_with_its_model(clock):
    """Also when a connection that stands, or a model's own probe, closes a circuit."""
    changes: list[BreakerChange] = []
    breaker = Breaker(now=clock.now, jitter=lambda: 0.0, on_change=changes.append)
    trip_model(breaker, "a")
    breaker.report(breaker.enter(), BreakerEffect.TRIP, error_class=CONNECT)
    clock.advance(1.0)
    probe = breaker.enter("a")
    assert breaker.connected(probe)
    breaker.report(probe, BreakerEffect.SUCCESS)
    assert [(change.model, change.error_class, change.open_s) for change in changes] == [
        ("a", "not_ready", None),
        (None, CONNECT, None),
        (None, CONNECT, 1.0),
        ("a", "not_ready", 1.0),
    ]
