"""Series are plain numbers, and a scrape of them is what the library's own metrics would give."""

import prometheus_client
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics

from worker.telemetry.series import Counter, Family, Gauge, Histogram

BOUNDS = (0.001, 0.1, 1, 60.0, 3600)
amounts = st.floats(0, 1e6) | st.integers(0, 2**40) | st.sampled_from(BOUNDS)
changes = st.lists(
    st.tuples(st.sampled_from(["counter", "gauge", "histogram"]), st.sampled_from(["a", 'b"\\\n']), amounts)
)


def _change(kind: str, series: object, amount: float) -> None:
    match kind, series:
        case "counter", Counter() | prometheus_client.Counter():
            series.inc(amount)
        case "gauge", Gauge() | prometheus_client.Gauge():
            series.inc()
            series.inc()
            series.dec()
            if amount > 1:
                series.set(-amount)
        case "histogram", Histogram() | prometheus_client.Histogram():
            series.observe(amount)
        case _:
            raise AssertionError(kind)


@given(changes, changes)
def test_a_scrape_is_that_of_the_library(
    labelled: list[tuple[str, str, float]], only: list[tuple[str, str, float]]
) -> None:
    """Names, kinds, meanings, labels, bounds, numbers and their order, in both formats, after any changes."""
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    makers = {"counter": Counter, "gauge": Gauge, "histogram": lambda: Histogram(BOUNDS)}
    more = {"histogram": {"buckets": BOUNDS}}
    own = {
        (kind, labels): Family(f"{kind}_{len(labels)}{'_total' * (kind == 'counter')}", "What.", labels, make, ours)
        for kind, make in makers.items()
        for labels in ((), ("x", "y"))
    }
    library = {
        (kind, labels): getattr(prometheus_client, kind.capitalize())(
            f"{kind}_{len(labels)}", "What.", labels, registry=theirs, **more.get(kind, {})
        )
        for kind, labels in own
    }
    for kind, label, amount in labelled:
        for families in (own, library):
            _change(kind, families[kind, ("x", "y")].labels(label, "c"), amount)
    for kind, _, amount in only:
        _change(kind, own[kind, ()].labels(), amount)
        _change(kind, library[kind, ()], amount)
    for generate in (generate_latest, generate_openmetrics):
        expected = [line for line in generate(theirs).decode().splitlines() if "_created" not in line]
        assert generate(ours).decode().splitlines() == expected


def test_a_series_is_made_once() -> None:
    """The same values of the labels are the same series; `clear` forgets all of them."""
    family = Family("x_total", "What.", ("a",), Counter, CollectorRegistry())
    first = family.labels("1")
    assert family.labels("1") is first
    assert family.labels("2") is not first
    family.clear()
    assert family.labels("1") is not first


@pytest.mark.parametrize("values", [(), ("1", "2")])
def test_a_series_has_all_labels(values: tuple[str, ...]) -> None:
    """A value too few or too many is an error of the caller."""
    family = Family("x", "What.", ("a",), Gauge, CollectorRegistry())
    with pytest.raises(ValueError, match="has the labels"):
        family.labels(*values)
