"""The model of scaling: the autoscaler's algorithm by its documentation, and a queue in which nothing gets lost."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from benchmarks import scaling
from benchmarks.scaling_model import Autoscaler, Plant, Scaler, burst, formula, simulate, steady

ROOT = Path(__file__).resolve().parents[2]
KEDA = ROOT / "deploy" / "kustomize" / "components" / "keda" / "scaledobject.yaml"
ONE_BY_ONE = Plant(window=1, hoard=0, seconds=10, sigma=0)


def test_a_ratio_close_to_one_changes_nothing() -> None:
    """Within 10 % of the target on both sides, whatever the rounding."""
    for value in (901, 1000, 1099):
        assert Autoscaler(Scaler(target=100)).replicas(0, 10, {100: value}) == 10
    assert Autoscaler(Scaler(target=100)).replicas(0, 10, {100: 1101}) == 12


def test_the_metric_that_asks_for_most_wins() -> None:
    """And without any, nothing changes."""
    assert Autoscaler(Scaler()).replicas(0, 10, {128: 128 * 12, 13: 13 * 15}) == 15
    assert Autoscaler(Scaler()).replicas(0, 10, {}) == 10


@pytest.mark.parametrize(("current", "most"), [(1, 5), (3, 7), (4, 8), (10, 20), (30, 50)])
def test_growth_is_the_larger_of_doubling_and_four_pods(current: int, most: int) -> None:
    """Within 30 s, and never over the maximum."""
    assert Autoscaler(Scaler()).replicas(0, current, {128: 10**6}) == most


def test_growth_of_one_period_counts_together() -> None:
    """Two looks within 30 s may not double twice; after the period it goes on."""
    autoscaler = Autoscaler(Scaler(maximum=1000))
    assert autoscaler.replicas(0, 10, {128: 10**6}) == 20
    assert autoscaler.replicas(15, 20, {128: 10**6}) == 20
    assert autoscaler.replicas(30, 20, {128: 10**6}) == 40


def test_shrinking_waits_for_the_highest_of_five_minutes() -> None:
    """One high moment keeps the pods for 300 s, then a quarter goes every 120 s, rounded towards fewer."""
    autoscaler, current, seen = Autoscaler(Scaler(target=100)), 10, {}
    for now in range(0, 900, 15):
        current = autoscaler.replicas(now, current, {100: 1000 if now == 0 else 0})
        seen[now] = current
    assert (seen[285], seen[300], seen[405], seen[420], seen[540]) == (10, 7, 7, 5, 3)
    assert seen[885] == 1


def test_the_models_numbers_are_the_manifests() -> None:
    """Speeds, times and targets stand in both places."""
    manifest = yaml.safe_load(KEDA.read_text())["spec"]
    scaler = Scaler()
    behavior: Any = manifest["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    (down,) = behavior["scaleDown"]["policies"]
    assert scaler.up == tuple(tuple(policy.values()) for policy in behavior["scaleUp"]["policies"])
    assert scaler.down == (down["type"], down["value"], down["periodSeconds"])
    assert scaler.stabilise_s == behavior["scaleDown"]["stabilizationWindowSeconds"]
    assert (scaler.polling_s, scaler.cooldown_s) == (manifest["pollingInterval"], manifest["cooldownPeriod"])
    thresholds = [float(trigger["metadata"]["threshold"]) for trigger in manifest["triggers"]]
    assert [scaler.target, scaler.load_target] == thresholds
    assert f"[{scaler.remembered_s / 60:g}m]" in manifest["triggers"][0]["metadata"]["query"]
    assert scaler.minimum == manifest["minReplicaCount"]


def test_one_pod_needs_what_arithmetic_says() -> None:
    """Seven requests of 10 s, one at a time: 70 s, a fixed fleet, nothing cut."""
    result = simulate(burst(7), ONE_BY_ONE, Scaler(maximum=1))
    assert (result.drained_s, result.peak, result.cut) == (70, 1, 0)
    assert result.pod_hours == pytest.approx(70 / 3600, abs=2 / 3600)
    assert result.wait_s == 50, "the 95th percentile of 0, 10 ... 60 that seven values have"


def test_the_backlog_is_seen_late() -> None:
    """Without the load trigger no pod comes before the sample after the burst is visible."""
    slow = Plant(seconds=600, sigma=0)
    alone = Scaler(load_target=None)
    early = simulate(burst(1000), slow, alone, limit_s=alone.first_sample_s + alone.visible_s)
    late = simulate(burst(1000), slow, alone, limit_s=alone.first_sample_s + alone.visible_s + alone.sync_s + 1)
    assert (early.peak, late.peak) == (1, 5)


def test_the_load_trigger_notices_at_once() -> None:
    """A full pod asks for help within a look of the autoscaler."""
    assert simulate(burst(1000), Plant(seconds=600), Scaler(), limit_s=17).peak == 2


def test_zero_stays_zero_until_a_message_comes() -> None:
    """Nothing costs nothing; a message wakes one pod, after the metric's lag, and it goes after the cooldown."""
    nothing = simulate([(3600.0, 0)], Plant(), Scaler(minimum=0))
    assert (nothing.peak, nothing.pod_hours) == (0, 0)
    one = simulate(burst(1), Plant(seconds=5, sigma=0), Scaler(minimum=0))
    assert one.peak == 1
    assert 150 + 30 <= one.wait_s <= 150 + 15 + 30
    assert 300 / 3600 < one.pod_hours < 900 / 3600


def test_what_a_scale_down_cuts_runs_again() -> None:
    """With a drain too short, requests are cut and counted, and answered all the same; with time enough none is."""
    plant = Plant(seconds=60, drain_s=1)
    alone = Scaler(target=256, load_target=None)
    cut = simulate(burst(20_000), plant, alone)
    assert cut.cut > 100
    spared = simulate(burst(20_000), replace(plant, drain_s=540), alone)
    assert spared.cut == 0
    assert spared.drained_s < cut.drained_s, "work that was cut is done twice"
    assert simulate(burst(20_000), plant, replace(alone, load_target=13)).cut == 0, "busy pods are kept"


def test_draining_pods_are_paid_for() -> None:
    """A pod that finishes its requests after SIGTERM still stands in the bill."""
    alone = Scaler(target=256, load_target=None)
    long, short = Plant(seconds=60, drain_s=540), Plant(seconds=60, drain_s=0)
    assert simulate(burst(20_000), long, alone).pod_hours > simulate(burst(20_000), short, alone).pod_hours


@hypothesis_settings(max_examples=40)
@given(
    count=st.integers(1, 300),
    seconds=st.floats(1, 90),
    target=st.sampled_from([1, 16, 128]),
    load=st.sampled_from([None, 13.0]),
    minimum=st.sampled_from([0, 1]),
    drain=st.sampled_from([0.0, 8.0, 540.0]),
)
def test_every_message_is_answered(
    *, count: int, seconds: float, target: float, load: float | None, minimum: int, drain: float
) -> None:
    """Whatever the numbers: it ends, no faster than the work allows, and no message waits longer than that."""
    plant = Plant(seconds=seconds, drain_s=drain, sigma=0)
    scaler = Scaler(target=target, load_target=load, minimum=minimum, maximum=8)
    result = simulate(burst(count), plant, scaler)
    assert result.drained_s >= seconds * -(-count // (8 * plant.window)) - 1
    assert result.drained_s < 24 * 3600 - 1
    assert result.peak <= 8
    assert result.wait_s <= result.drained_s


def test_the_formula_keeps_its_word() -> None:
    """A steady stream waits about as long as was asked for, by the backlog alone: within a fifth."""
    arrivals = list(steady(5, 2 * 3600))
    for wait_s in (180, 300, 600):
        target = formula(16, wait_s, 20)
        assert simulate(arrivals, Plant(), Scaler(target=target, load_target=None)).wait_s == pytest.approx(
            wait_s, rel=0.2
        )
    assert formula(16, 10, 20) == 16, "never under N"


def test_a_steady_stream_arrives_evenly() -> None:
    """So many a second, all of them, also fractions."""
    assert sum(count for _, count in steady(0.3, 100)) == 30
    assert all(count == 5 for _, count in steady(5, 10))


@pytest.mark.slow
def test_the_tables_of_the_docs_are_the_models() -> None:
    """docs/scaling.md shows what the model says now."""
    page = (ROOT / "docs" / "scaling.md").read_text()
    assert scaling.renew(page, scaling.figures()) == page, "stale: python -m benchmarks.scaling --write docs/scaling.md"


def test_a_document_without_the_place_is_refused() -> None:
    """Rather than left as it is."""
    with pytest.raises(SystemExit, match="0 places for burst"):
        scaling.renew("no marks", {"burst": ["| a |"]})


def test_the_command_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    """One row a target, the formula's marked."""
    scaling.main(["--burst", "200", "--seconds", "10", "--window", "8", "--wait", "180"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["8", "32", "64", "128", "144 *"]
