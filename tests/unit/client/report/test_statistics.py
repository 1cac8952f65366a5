"""Counts, rates, percentiles and bins, against arithmetic done another way; output files in every condition."""

import gzip
import itertools
import json
import statistics
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.client.report.answers import a_line, a_run
from worker.client.errors import InputError
from worker.client.io.lines import RawLine
from worker.client.report.results import DURATIONS, Price, is_shown, is_weak
from worker.client.report.sample import NoAnswerError, read_sample
from worker.client.report.statistics import (
    MAX_BINS,
    MAX_FINISH_REASONS,
    MAX_GROUPS,
    OTHERS,
    UNKNOWN,
    WIDTHS_S,
    Statistics,
    Timeline,
    read_report,
)

positive = st.floats(0.001, 1000)
T0 = 1_795_207_337.0
moments = st.lists(st.floats(T0, T0 + 3e6), min_size=1, max_size=60)
DATA = b"\n".join(a_run()[:-1]) + b"\n"


def report_of(lines, **options):
    counts = Statistics()
    for number, line in enumerate(lines, 1):
        try:
            counts.add(read_sample(line), RawLine.of(number, line))
        except NoAnswerError as error:
            counts.add_unreadable(number, str(error))
    return counts.report("out.jsonl", **options)


def timeline_of(moments, **more):
    timeline = Timeline()
    for moment in moments:
        timeline.add(moment, **{"is_error": False, "output_tokens": 2, **more})
    return timeline


def test_an_independent_count_of_a_run_agrees():
    """Answers, errors, tokens and times by model and class, as plain Python counts them."""
    lines = a_run()
    report = report_of(lines)
    answers = [json.loads(line) for line in lines[:-1]]
    good = [answer for answer in answers if answer["status_code"] == 200]
    assert (report.total.answers, report.total.errors, report.unreadable) == (400, 20, 1)
    assert report.total.statuses == {"200": 380, "400": 20}
    for group in report.models:
        mine = [answer for answer in answers if answer["stats"]["model"] == group.name]
        times = sorted(answer["stats"]["ttft_s"] for answer in mine if answer["status_code"] == 200)
        assert group.answers == len(mine)
        assert group.tokens["output"].total == 20 * len(times)
        assert group.tokens["output"].missing == len(mine) - len(times)
        assert group.tokens["input_cached"].total is None
        spread = group.durations["ttft_s"]
        assert (spread.count, spread.missing) == (len(times), 0)
        assert spread.mean == pytest.approx(statistics.fmean(times))
        deciles = statistics.quantiles(times, n=100, method="inclusive")
        assert spread.percentiles[50].value == pytest.approx(deciles[49], rel=0.03)
        assert spread.percentiles[90].value == pytest.approx(deciles[89], rel=0.05)
    assert [(group.name, group.answers) for group in report.error_classes] == [
        ("context_length", 10),
        ("stream_broken", 10),
    ]
    starts = [round(float(answer["stats"]["request_time"][17:-1]), 3) for answer in answers]
    ends = [start + answer["stats"]["ttlt_s"] for start, answer in zip(starts, answers, strict=True)]
    duration = max(ends) - min(starts)
    assert report.duration_s == pytest.approx(duration, abs=0.001)
    assert report.send_window_s == pytest.approx(max(starts) - min(starts), abs=0.001)
    assert report.answers_per_s == pytest.approx(400 / duration, rel=1e-4)
    assert report.requests_per_minute == pytest.approx(399 * 60 / (max(starts) - min(starts)), rel=1e-4)
    assert report.total.tokens["output"].per_s == pytest.approx(20 * len(good) / duration, rel=1e-4)
    assert sum(item.good for item in report.bins) == 380
    assert sum(item.errors for item in report.bins) == 20


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (1, {}),
        (2, {50: True}),
        (9, {50: True}),
        (10, {50: False, 90: True}),
        (49, {50: False, 90: True}),
        (50, {50: False, 90: False}),
        (99, {50: False, 90: False}),
        (100, {50: False, 90: False, 99: True}),
        (499, {50: False, 90: False, 99: True}),
        (500, {50: False, 90: False, 99: False}),
    ],
)
def test_percentiles_of_few_values_are_hidden_or_marked(count, shown):
    """p50, p90 and p99 need 2, 10 and 100 values, and 10, 50 and 500 not to be weak."""
    report = report_of(a_line(number) for number in range(count))
    found = report.total.durations["ttft_s"].percentiles
    assert {percent: item.is_weak for percent, item in found.items() if item is not None} == shown
    exported = report.total.durations["ttft_s"].as_dict()
    assert exported["weak"] == [f"p{percent}" for percent, weak in shown.items() if weak]
    assert [exported[f"p{percent}"] is not None for percent in (50, 90, 99)] == [p in shown for p in (50, 90, 99)]


@given(st.integers(0, 10_000), st.integers(1, 99), st.integers(1, 50))
def test_the_rules_count_values_beyond_the_percentile(count, percent, min_tail):
    """Exactly: shown with at least one value beyond it, trusted with at least `min_tail`."""
    beyond = count * (100 - percent) // 100
    assert is_shown(count, percent) == (beyond >= 1)
    assert is_weak(count, percent, min_tail) == (beyond < min_tail)


def test_nulls_are_left_out_and_counted():
    """They are no zeros: neither in means nor in sums."""
    nothing = {"tokens": {"input": 7, "output": None}, "ttft_s": None, "queue_s": None}
    report = report_of([a_line(1), a_line(2, **nothing), a_line(3, stats=False)])
    spread = report.total.durations["ttft_s"]
    assert (spread.count, spread.missing, spread.mean) == (1, 2, pytest.approx(0.1))
    assert report.total.tokens["output"].total == 20
    assert report.total.tokens["output"].missing == 2
    assert report.total.tokens["input"].total == 17
    assert report.timed == 2


def test_errors_do_not_make_a_model_look_fast():
    """A refusal within a millisecond is in the times of its class, not of its model."""
    lines = [a_line(1, ttlt_s=5.0), a_line(2, 429, error_class="rate_limited", ttlt_s=0.001)]
    report = report_of(lines)
    assert report.models[0].durations["ttlt_s"].minimum == 5.0
    assert report.total.durations["ttlt_s"].count == 1
    spread = report.error_classes[0].durations["ttlt_s"]
    assert (spread.count, spread.missing, spread.maximum) == (1, 0, 0.001)


def test_groups_are_bounded_for_any_names():
    """From a number on, models are counted together, last in the list."""
    report = report_of(a_line(number, model=f"model-{number}") for number in range(MAX_GROUPS + 30))
    assert len(report.models) == MAX_GROUPS + 1
    assert (report.models[-1].name, report.models[-1].answers) == (OTHERS, 30)


def test_what_is_not_known_has_a_name():
    """An answer without a model is counted as well."""
    report = report_of([a_line(1, 400, stats=False)])
    assert (report.models[0].name, report.models[0].errors) == (UNKNOWN, 1)


def test_nothing_gives_an_empty_report():
    """No division by zero, nothing invented."""
    report = report_of([])
    assert report.total.answers == 0
    assert (report.duration_s, report.answers_per_s, report.requests_per_minute) == (None, None, None)
    assert json.loads(json.dumps(report.as_dict()))["models"] == {}


def test_the_machine_form_names_every_duration_and_kind():
    """Scripts rely on the keys; docs/report.md shows them."""
    exported = report_of(a_run()).as_dict()
    assert list(exported["total"]["durations"]) == list(DURATIONS)
    assert list(exported["total"]["tokens"]) == ["input", "output", "input_cached", "output_reasoning"]
    assert exported["models"]["large"]["durations"]["ttft_s"].keys() >= {"count", "missing", "mean", "p50", "weak"}
    assert exported["started"] == "2026-11-20T20:42:00.100Z"
    assert exported["timeline"]["bins"][0].keys() == {
        "start", "good", "errors", "output_tokens", "attempts", "ttlt_p50", "ttlt_p90",
    }  # fmt: skip
    assert list(exported["total"]["sizes"]) == ["output_tokens", "output_tokens_per_s"]


def _keys(value):
    """Return the keys of an object at every depth; empty objects stand for what their neighbour has."""
    if isinstance(value, list):
        return [_keys(value[0])] if value else []
    return {key: _keys(inner) for key, inner in value.items()} if isinstance(value, dict) else None


def _agree(documented, real):
    if isinstance(documented, dict) and documented:
        assert documented.keys() == real.keys()
        for key in documented:
            _agree(documented[key], real[key])
    elif isinstance(documented, list) and documented:
        _agree(documented[0], real[0])


def test_the_documented_machine_form_has_exactly_the_real_keys():
    """The example of docs/report.md, wherever it is filled in."""
    page = (Path(__file__).parents[4] / "docs" / "report.md").read_text("utf-8")
    example = json.loads(page.split("```json\n")[1].split("```")[0])
    real = report_of(a_run()).as_dict()
    for group in ("models", "error_classes"):
        assert set(map(len, example.pop(group).values())) == {0}
        real.pop(group)
    real["total"]["statuses"] = example["total"]["statuses"]
    _agree(_keys(example), _keys(real))


def test_memory_does_not_grow_with_the_run():
    """Sketches, groups and bins are bounded, so that a run may have any number of lines."""
    counts = Statistics()
    sample = [(read_sample(line), RawLine.of(1, line)) for line in a_run()[:-1]]
    sizes = []
    for _ in range(3):
        for item in sample:
            counts.add(*item)
        sizes.append(len(counts._timeline._bins) + len(counts._total.sketches["ttft_s"]._buckets))
    assert sizes[0] == sizes[1] == sizes[2]


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
    """Every answer is in the bin of its time, in any order; there are never too many bins."""
    timeline = timeline_of(moments)
    bins = list(timeline.bins())
    assert 1 <= len(bins) <= MAX_BINS
    assert sum(item.good for item in bins) == len(moments)
    for item in bins:
        inside = [moment for moment in moments if item.start + 0.01 < moment < item.start + timeline.width_s - 0.01]
        assert item.good >= len(inside)
    assert timeline_of(moments[::-1]).width_s == timeline.width_s


@given(moments, st.lists(positive, min_size=1, max_size=200))
def test_times_of_merged_bins_are_those_of_their_answers(moments, values):
    """The median of a bin is that of all answers in it, however often bins were merged; attempts add up."""
    timeline = Timeline()
    for moment, value in zip(itertools.cycle(moments), values, strict=False):
        timeline.add(moment, is_error=False, output_tokens=0, attempts=2, ttlt_s=value)
    bins = [item for item in timeline.bins() if item.good]
    assert sum(item.attempts for item in bins) == 2 * len(values)
    if len(bins) == 1:
        assert bins[0].ttlt_p50 == pytest.approx(sorted(values)[(len(values) + 1) // 2 - 1], rel=0.02)
        assert (bins[0].ttlt_p90 is None) == (len(values) < 10)
    assert all(min(values) * 0.99 <= item.ttlt_p50 <= max(values) * 1.01 for item in bins)


def test_lengths_speeds_and_ends_of_good_answers():
    """Tokens of one answer by its time to the last one; an error says nothing about them."""
    lines = [
        a_line(1, tokens={"output": 30}, ttlt_s=2.0),
        a_line(2, tokens={"output": 10}, ttlt_s=0.5, finish_reason="length"),
        a_line(3, tokens={"output": None}),
        a_line(4, 500, error_class="x", tokens={"output": 99}),
    ]
    total = report_of(lines).total
    assert (total.sizes["output_tokens"].count, total.sizes["output_tokens"].missing) == (2, 1)
    assert total.sizes["output_tokens"].mean == 20
    assert total.sizes["output_tokens_per_s"].mean == pytest.approx((15 + 20) / 2)
    assert total.finish_reasons == {"stop": 2, "length": 1}


def test_reasons_are_bounded_for_any_words():
    """Servers choose them."""
    report = report_of(a_line(number, finish_reason=f"reason-{number}") for number in range(40))
    assert len(report.total.finish_reasons) == MAX_FINISH_REASONS + 1
    assert report.total.finish_reasons[OTHERS] == 40 - MAX_FINISH_REASONS


def test_a_price_is_that_of_the_model_or_of_all_others():
    """Cached input tokens have their own; what no price is known for costs nothing that could be told."""
    tokens = {"input": 1_000_000, "output": 500_000, "input_cached": 400_000}
    lines = [a_line(1, model="a", tokens=tokens), a_line(2, model="b", tokens=tokens)]
    price = Price(input=1.0, output=2.0, cached=0.5)
    report = report_of(lines, prices={"a": price})
    assert {group.name: group.cost for group in report.models} == {"a": pytest.approx(0.6 + 0.2 + 1.0), "b": None}
    assert report.total.cost == pytest.approx(1.8)
    assert report_of(lines, prices={"a": price, "": price}).total.cost == pytest.approx(3.6)
    assert report_of(lines).total.cost is None
    assert report_of([a_line(1, stats=False)], prices={"": price}).total.cost is None


def test_a_long_run_has_enough_bins_to_see_something():
    """Merging never leaves fewer than a sixth of the bins."""
    assert len(list(timeline_of(T0 + second for second in range(0, 86_400, 7)).bins())) >= MAX_BINS // 6


def test_nonsense_times_cost_no_memory():
    """A clock that was wrong by decades makes the plot useless, and nothing worse."""
    timeline = timeline_of([0.0, *(T0 + second for second in range(1000))])
    assert len(list(timeline.bins())) <= MAX_BINS
    assert sum(item.good for item in timeline.bins()) == 1001


@pytest.mark.parametrize(
    ("name", "pack"),
    [("out.jsonl", bytes), ("out.jsonl.gz", gzip.compress), ("out.jsonl.zst", zstandard.compress)],
)
def test_files_are_read_by_their_names(tmp_path, name, pack):
    """Plain, gzip and zstd give the same report."""
    path = tmp_path / name
    path.write_bytes(pack(DATA))
    report, failure = read_report(str(path))
    assert (report.total.answers, report.total.errors, report.unreadable, failure) == (400, 20, 0, None)


def test_a_torn_file_is_counted_up_to_the_tear(tmp_path):
    """Also while a run is going on; what is wrong is told beside the report."""
    path = tmp_path / "out.jsonl.gz"
    path.write_bytes(gzip.compress(DATA[:-1000])[:-20])
    report, failure = read_report(str(path))
    assert 300 < report.total.answers < 400
    assert isinstance(failure, InputError)
    assert "ends in the middle" in str(failure)


def test_a_line_that_is_no_answer_is_named_by_its_number(tmp_path):
    """The first of them, with the reason; the others are counted."""
    path = tmp_path / "out.jsonl"
    path.write_bytes(b"\n".join([a_line(1), b"", b"nonsense", a_line(2), b'{"id":']))
    report, failure = read_report(str(path))
    assert (report.total.answers, report.unreadable, failure) == (2, 2, None)
    assert report.first_unreadable[0] == 3
    assert report.first_unreadable[1]


def test_a_file_that_is_not_there_is_an_error(tmp_path):
    """There is nothing to report about."""
    with pytest.raises(InputError, match=r"none\.jsonl: does not exist"):
        read_report(str(tmp_path / "none.jsonl"))


def test_variants_are_groups_of_their_own():
    """Answers, errors and times by variant; answers without one are in none."""
    lines = [a_line(number, variant="blue", ttlt_s=1.0) for number in range(30)]
    lines += [a_line(number, variant="green", ttlt_s=2.0) for number in range(10)]
    lines += [a_line(99, 500, variant="green", error_class="server_error"), a_line(100)]
    report = report_of(lines)
    blue, green = report.variants
    assert (blue.name, blue.answers, blue.errors, blue.durations["ttlt_s"].mean) == ("blue", 30, 0, 1.0)
    assert (green.name, green.answers, green.errors, green.durations["ttlt_s"].mean) == ("green", 11, 1, 2.0)
    assert set(report.as_dict()["variants"]) == {"blue", "green"}
    assert report_of([a_line(1)]).variants == ()
