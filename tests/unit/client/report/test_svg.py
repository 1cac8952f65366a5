"""Scales, ticks and shapes."""

import itertools
import math
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.client.report.svg import Drawing, cut, linear, log_ticks, logarithmic, round_steps, time_ticks


def test_scales_take_ends_to_ends():
    """Linear ones by difference, logarithmic ones by ratio."""
    assert [linear(0, 10, 100, 0)(value) for value in (0, 5, 10)] == [100, 50, 0]
    assert logarithmic(0.01, 100, 0, 40)(1) == pytest.approx(20)
    assert linear(3, 3, 0, 10)(3) == 0


@given(st.floats(1e-4, 1e9))
def test_round_steps_are_round_and_reach_the_top(top):
    """A few equal steps from 0, each 1, 2 or 5 times a power of ten, and no empty one above the top."""
    steps = list(round_steps(top))
    assert steps[0] == 0
    assert steps[-1] >= top * (1 - 1e-6)
    assert steps[-2] < top
    assert 2 <= len(steps) <= 6
    digits = steps[1] / 10 ** math.floor(math.log10(steps[1]) + 1e-9)
    assert min(abs(digits - round_one) for round_one in (1, 2, 5, 10)) < 1e-6


@given(st.floats(1e-5, 1e5), st.floats(1.02, 1e6), st.booleans())
def test_log_ticks_stay_inside_and_apart(low, ratio, is_time):
    """Labels never touch, and a plot of any range has some."""
    high = low * ratio
    x = logarithmic(low, high, 0, 400)
    ticks = log_ticks(low, high, x, "{:,.6g} s".format, is_time=is_time)
    assert all(low * 0.999 <= value <= high * 1.001 for value, _ in ticks)
    assert all(x(b[0]) - x(a[0]) > 7 * len(a[1]) / 2 for a, b in itertools.pairwise(ticks))
    assert ticks


@given(st.floats(0.05, 1e9))
def test_time_ticks_are_few_and_labelled(span):
    """From 0 to the end, at most eight, each with number and unit."""
    ticks = list(time_ticks(span))
    assert 1 <= len(ticks) <= 9
    assert ticks[0][0] == 0
    assert all(0 <= moment <= span * 1.001 and label.split()[1] in {"s", "min", "h", "d"} for moment, label in ticks)


def test_a_drawing_is_well_formed_and_has_a_name():
    """A drawing is XML for any texts, with a title and a description."""
    drawing = Drawing("key", 100, 50, title="A & <b>", description='"quoted"')
    drawing.rect(0, 0, 10, 10, "good", tip="<script>alert(1)</script>")
    drawing.text(1, 2, "<&>")
    root = ET.fromstring(drawing.render())
    assert root.get("role") == "img"
    names = {part.get("id"): part.text for part in root if part.get("id")}
    assert [names[key] for key in root.get("aria-labelledby").split()] == ["A & <b>", '"quoted"']
    assert [part.text for part in root.iter("text")] == ["<&>"]
    assert root.find("rect/title").text == "<script>alert(1)</script>"


def test_labels_stay_inside_the_drawing():
    """A tick at the very edge is moved in, not cut off."""
    drawing = Drawing("key", 100, 50, title="t", description="d")
    drawing.tick(99, 40, "1,000 s")
    assert float(next(ET.fromstring(drawing.render()).iter("text")).get("x")) + 7.2 * 3.5 <= 100.1
    assert cut("a" * 60) == "a" * 23 + "…"
