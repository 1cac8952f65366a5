"""Quantiles within a promised distance of the exact ones, in bounded memory."""

import itertools
import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.client.sketch import ACCURACY, SMALLEST, QuantileSketch

durations = st.floats(SMALLEST * 1.001, 1e8) | st.sampled_from([0.05, 1.0, 60.0])


def sketch_of(values):
    sketch = QuantileSketch()
    for value in values:
        sketch.add(value)
    return sketch


def nearest_rank(values, percent):
    """The oracle: the smallest value that at least `percent` of all do not exceed, by exact arithmetic."""
    return next(
        value
        for value in sorted(values)
        if Fraction(sum(other <= value for other in values), len(values)) >= Fraction(percent, 100)
    )


@given(st.lists(durations, min_size=1, max_size=80), st.integers(1, 100))
def test_percentiles_are_within_one_percent(values, percent):
    """Every percentile is as close to the exact one as promised, and never outside of the values."""
    found = sketch_of(values).percentile(percent)
    assert found == pytest.approx(nearest_rank(values, percent), rel=ACCURACY * (1 + 1e-9))
    assert min(values) <= found <= max(values)


@given(st.lists(st.just(0.0) | durations, min_size=1, max_size=50))
def test_count_sum_and_bounds_are_exact(values):
    """What needs no sketch is not estimated."""
    sketch = sketch_of(values)
    assert (sketch.count, sketch.minimum, sketch.maximum) == (len(values), min(values), max(values))
    assert sketch.mean == pytest.approx(math.fsum(values) / len(values))


def test_zeros_are_zero():
    """Most messages are never held; that is shown as 0 and not as something small."""
    sketch = sketch_of([0.0] * 90 + [3.0] * 10)
    assert sketch.percentile(90) == 0.0
    assert sketch.percentile(91) == pytest.approx(3.0, rel=ACCURACY)


def test_without_values_there_is_nothing():
    """No value, no mean, no percentile, no bars."""
    sketch = QuantileSketch()
    assert (sketch.mean, sketch.percentile(50), sketch.histogram(10)) == (None, None, ())


def test_memory_does_not_grow_with_the_values():
    """For any values, from 0 to the age of the universe, there are at most 1,728 buckets."""
    sketch = sketch_of(1e-9 * 1.0025**step for step in range(20_000))
    assert len(sketch._buckets) == 1_728


@given(st.lists(st.just(0.0) | durations, min_size=1, max_size=50), st.integers(1, 40))
def test_histogram_has_every_value_in_its_bar(values, bars):
    """At most as many bars as asked for, one more for zeros, without gaps, and all values are in them."""
    histogram = sketch_of(values).histogram(bars)
    assert len(histogram) <= bars + 1
    assert sum(bar.count for bar in histogram) == len(values)
    positive = [bar for bar in histogram if bar.low > 0]
    assert all(left.high == pytest.approx(right.low) for left, right in itertools.pairwise(positive))
    for bar in histogram:
        inside = [value for value in values if bar.low * (1 + 1e-9) < value <= bar.high * (1 - 1e-9)]
        assert bar.count >= len(inside)


@given(st.lists(st.floats(0, 1e6), max_size=60), st.lists(st.floats(0, 1e6), max_size=60))
def test_merged_sketches_are_one_of_all_values(first, second):
    """In every number that they tell."""
    parts = [QuantileSketch(), QuantileSketch()]
    whole = QuantileSketch()
    for sketch, values in zip(parts, (first, second), strict=True):
        for value in values:
            sketch.add(value)
            whole.add(value)
    parts[0].merge(parts[1])
    assert (parts[0].count, parts[0].minimum, parts[0].maximum) == (whole.count, whole.minimum, whole.maximum)
    assert [parts[0].percentile(p) for p in (1, 50, 99)] == [whole.percentile(p) for p in (1, 50, 99)]
