"""The catalogue of metrics, and labels that stay few whatever requesters send."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from worker.telemetry.metrics import OTHER, LabelCap, Metrics, catalogue
from worker.telemetry.series import PREFIX, Family, Histogram

ENTRIES = list(catalogue())


def _attributes() -> set[str]:
    return set(vars(Metrics())) - {"registry", "families"}


def test_the_catalogue_is_complete_and_sorted() -> None:
    """Every attribute of `Metrics` that counts stands in it once, by the name that is scraped."""
    names = [name for name, *_ in ENTRIES]
    assert len(_attributes()) == len(names) == len(set(names))
    assert names == sorted(names)


def test_attributes_are_called_like_what_they_count() -> None:
    """Code reads `metrics.deliveries_total` and means the metric of that name."""
    assert {PREFIX + name for name in _attributes()} == {name for name, *_ in ENTRIES}


@pytest.mark.parametrize(("name", "kind", "labels", "meaning"), ENTRIES, ids=[entry[0] for entry in ENTRIES])
def test_an_entry_says_what_it_is(name: str, kind: str, labels: tuple[str, ...], meaning: str) -> None:
    """One prefix, the unit in the name, a sentence of meaning; label sets without anything unbounded."""
    assert re.fullmatch(PREFIX + r"[a-z][a-z0-9_]*", name)
    assert kind in {"counter", "gauge", "histogram"}
    assert name.endswith("_total") is (kind == "counter")
    assert kind != "histogram" or name.endswith(("_seconds", "_bytes"))
    assert meaning.endswith(".")
    assert meaning[0].isupper() or meaning[0].isdigit()
    closed = {
        "backend",
        "path",
        "model",
        "outcome",
        "status_code",
        "error_class",
        "disposition",
        "settlement",
        "reason",
        "variant",
        "tenant",
        "signal",
    }
    assert set(labels) <= closed | {"kind", "version"}


def test_what_is_scraped_are_the_names_of_the_catalogue() -> None:
    """A scrape of every metric with every label set gives the families of the catalogue and parses."""
    metrics = Metrics()
    for family in metrics.families:
        family.labels(*("x" for _ in family.label_names))
    families = {}
    for family in text_string_to_metric_families(generate_latest(metrics.registry).decode()):
        families[family.name + ("_total" if family.type == "counter" else "")] = family
    assert {name for name, *_ in ENTRIES} == set(families)
    for name, kind, _, meaning in ENTRIES:
        assert (families[name].type, families[name].documentation) == (kind, meaning)


@pytest.mark.parametrize(
    "family", [each for each in Metrics().families if each.kind == "histogram"], ids=lambda x: x.name
)
def test_buckets_rise(family: Family[Histogram]) -> None:
    """Buckets are sorted and cover more than two orders of magnitude."""
    bounds = list(family.labels(*("x" for _ in family.label_names)).bounds)
    assert bounds == sorted(set(bounds))
    assert bounds[-1] / bounds[0] > 100


def test_every_set_of_metrics_has_its_own_registry() -> None:
    """Tests and several workers in one process never share counts."""
    first, second = Metrics(), Metrics()
    first.draining.set(1)
    assert second.registry.get_sample_value("inference_worker_draining") == 0


def test_a_given_registry_is_used_once() -> None:
    """Two sets on one registry would count twice: the library refuses it."""
    registry = CollectorRegistry()
    assert Metrics(registry).registry is registry
    with pytest.raises(ValueError, match="Duplicated timeseries"):
        Metrics(registry)


def test_the_first_few_values_pass_and_the_rest_is_other() -> None:
    """Known ones always pass, `None` has a name, a value once let in stays in."""
    cap = LabelCap(("known",), limit=2)
    assert [cap.label(value) for value in ("a", "known", None, "b", "c", "a", "b", "c", "known")] == [
        *("a", "known", "none", "b", OTHER, "a", "b", OTHER, "known")
    ]


def test_long_values_are_other_and_take_no_room() -> None:
    """A requester cannot fill the room with what would never be read."""
    cap = LabelCap(limit=1)
    assert [cap.label(value) for value in ("x" * 129, "x" * 128, "y")] == [OTHER, "x" * 128, OTHER]


@pytest.mark.parametrize("value", ["a\nb", "\x00", "\ud800", "\u2028", "a\tb"])
def test_values_that_are_not_text_are_other(value: str) -> None:
    """A label is one line that can be encoded, whatever came."""
    assert LabelCap(limit=1).label(value) == OTHER


@given(st.lists(st.none() | st.text(max_size=200)), st.integers(0, 5))
def test_labels_are_few_whatever_comes(values: list[str | None], limit: int) -> None:
    """Never more than the known ones, the limit, `other` and `none`."""
    cap = LabelCap(("m1", "m2"), limit)
    assert len({cap.label(value) for value in values}) <= limit + 4
