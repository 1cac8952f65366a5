"""What the soak calls flat, and its picture."""

import dataclasses
from xml.etree import ElementTree as ET

from tests.chaos.soak import Bounds, Sample, complaints, growth, plot


def _samples(rss: list[float]) -> list[Sample]:
    return [
        Sample(at_s=5.0 * number, rss_mb=value, descriptors=20, threads=4, tasks=9, answered=number)
        for number, value in enumerate(rss)
    ]


def test_memory_that_fills_and_then_stays_is_flat():
    """What the first half costs is not counted."""
    assert complaints(_samples([60 + min(number, 40) for number in range(120)]), Bounds()) == []


def test_steady_growth_is_told():
    """0.8 MB a minute over twenty minutes is more than the bound."""
    samples = _samples([60 + 0.8 * number / 12 for number in range(240)])
    assert complaints(samples, Bounds()) == [f"rss_mb grew by {growth(samples, 'rss_mb'):g}, allowed are 3"]


def test_each_quantity_is_watched():
    """A jump of any of them in the last sixth is told."""
    flat = _samples([60.0] * 60)
    for name in ("descriptors", "threads", "tasks"):
        jumped = [dataclasses.replace(sample, **{name: 500}) if sample.at_s >= 245 else sample for sample in flat]
        assert [complaint.split()[0] for complaint in complaints(jumped, Bounds())] == [name]


def test_the_picture_has_a_curve_for_each():
    """It is XML, with one line a quantity."""
    root = ET.fromstring(plot(_samples([60.0, 61.0, 62.0])))
    assert len(root.findall(".//{http://www.w3.org/2000/svg}polyline")) == 4
