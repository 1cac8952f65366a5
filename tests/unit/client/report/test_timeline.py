"""Counts over time, in bins that grow."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.client.report.timeline import MAX_BINS, WIDTHS_S, Timeline

T0 = 1_795_207_337.0
moments = st.lists(st.floats(T0, T0 + 3e6), min_size=1, max_size=60)


def timeline_of(moments, **more):
    timeline = Timeline()
    for moment in moments:
        timeline.add(moment, **{"is_error": False, "output_tokens": 2, **more})
    return timeline


def test_each_width_is_a_multiple_of_the_one_before():
    """Else merging neighbours would put answers into wrong bins."""
    for narrow, wide in itertools.pairwise(WIDTHS_S):
        assert wide / narrow == pytest.approx(round(wide / narrow))


def test_good_answers_errors_and_tokens_stand_in_their_bin():
    """A short run has bins of a tenth of a second; empty ones are there too."""
    timeline = timeline_of([T0 + 0.05, T0 + 0.35])
    timeline.add(T0 + 0.36, is_error=True, output_tokens=0)
    counts = [(item.good, item.errors, item.output_tokens) for item in timeline.bins()]
    assert counts == [(1, 0, 2), (0, 0, 0), (0, 0, 0), (1, 1, 2)]
    assert timeline.width_s == 0.1


@given(moments)
def test_nothing_is_lost_when_bins_are_merged(moments):
    """Every answer is in the bin of its time, in whatever order they come; there are never too many bins."""
    timeline = timeline_of(moments)
    bins = list(timeline.bins())
    assert 1 <= len(bins) <= MAX_BINS
    assert sum(item.good for item in bins) == len(moments)
    for item in bins:
        inside = [moment for moment in moments if item.start + 0.01 < moment < item.start + timeline.width_s - 0.01]
        assert item.good >= len(inside)
    assert timeline_of(moments[::-1]).width_s == timeline.width_s


def test_a_long_run_has_enough_bins_to_see_something():
    """Merging never leaves fewer than a sixth of the bins."""
    assert len(list(timeline_of(T0 + second for second in range(0, 86_400, 7)).bins())) >= MAX_BINS // 6


def test_nonsense_times_cost_no_memory():
    """A clock that was wrong by decades makes the plot useless, and nothing worse."""
    timeline = timeline_of([0.0, *(T0 + second for second in range(1000))])
    assert len(list(timeline.bins())) <= MAX_BINS
    assert sum(item.good for item in timeline.bins()) == 1001
