"""Waiting is measured from response times: long requests are no congestion, and it is seen without short ones."""

import math
import random

import pytest

from worker.flow.window.latency import BATCH_S, Kind, LatencyMeter, OverdueFirstBytes, Reading, SizeLine

SECONDS_PER_TOKEN = 0.02


def times(rng: random.Random, count: int, wait_s: float = 0.0) -> list[tuple[float, float]]:
    """Return (time, tokens) of lognormal requests behind a queue; tokens explain the time up to 15 %."""
    works = [250.0 * math.exp(rng.gauss(0, 1.0)) for _ in range(count)]
    return [(0.1 + wait_s + SECONDS_PER_TOKEN * work * math.exp(rng.gauss(0, 0.15)), work) for work in works]


def feed(meter: LatencyMeter, answers: list[tuple[float, float]], kind: Kind) -> None:
    for time_s, work in answers:
        if kind is Kind.FIRST_BYTE:
            meter.first_byte(time_s - SECONDS_PER_TOKEN * work)
        meter.answered(time_s, work if kind is Kind.SIZED else None, in_round=kind is not Kind.FIRST_BYTE)


def a_meter(rng: random.Random, clock, kind: Kind) -> LatencyMeter:
    meter = LatencyMeter(clock.now)
    feed(meter, times(rng, 64), kind)
    meter.end_round(clean=True)
    return meter


@pytest.mark.parametrize("kind", [Kind.SIZED, Kind.WHOLE])
def test_long_tails_alone_are_no_waiting(clock, kind):
    """Of 100 rounds of half a flight without a queue, at most a few seem to wait for a quarter."""
    rng = random.Random(1)
    meter = a_meter(rng, clock, kind)
    wrong = 0
    for _ in range(100):
        feed(meter, times(rng, 16), kind)
        wrong += meter.read().share > 0.25
        meter.end_round(clean=False)
    assert wrong <= 3


def test_small_answers_weigh_most(clock):
    """The error grows with the size; half of the rounds are right to a fortieth of the mean time."""
    rng = random.Random(5)
    meter = a_meter(rng, clock, Kind.SIZED)
    errors = []
    for _ in range(200):
        feed(meter, times(rng, 16), Kind.SIZED)
        errors.append(abs(meter.read().wait_s))
        meter.end_round(clean=False)
    assert sorted(errors)[100] < 0.2


@pytest.mark.parametrize(("kind", "off_by"), [(Kind.SIZED, 1.0), (Kind.WHOLE, 2.0), (Kind.FIRST_BYTE, 0.6)])
def test_a_queue_is_measured_in_seconds(clock, kind, off_by):
    """Eight seconds of waiting are measured as about eight, whatever the times are made of."""
    rng = random.Random(2)
    meter = a_meter(rng, clock, kind)
    readings = []
    for _ in range(20):
        feed(meter, times(rng, 16, wait_s=8.0), kind)
        readings.append(meter.read())
        meter.end_round(clean=False)
    assert {reading.kind for reading in readings} == {kind}
    assert sorted(reading.wait_s for reading in readings)[10] == pytest.approx(8.0, abs=off_by)


def test_the_share_is_that_of_the_window_by_littles_law(clock):
    """Waiting as long as being served means that half of the window waits."""
    meter = LatencyMeter(clock.now)
    for _ in range(64):
        meter.first_byte(0.1)
        meter.answered(4.0, None, in_round=False)
    meter.end_round(clean=True)
    for _ in range(16):
        meter.first_byte(4.1)
    assert meter.read().share == pytest.approx(0.5)


def test_the_best_kind_present_decides(clock):
    """Where first bytes are reported, they are judged."""
    meter = LatencyMeter(clock.now)
    for _ in range(8):
        meter.first_byte(0.1)
    meter.answered(3.0, 10.0, in_round=True)
    assert meter.read().kind is Kind.FIRST_BYTE
    assert meter.collected() == 8


def test_without_anything_to_compare_with_there_is_no_wait(clock):
    """The first round is the measure of the next ones."""
    meter = LatencyMeter(clock.now)
    meter.answered(100.0, None, in_round=True)
    assert (meter.read().wait_s, meter.read().share) == (0.0, 0.0)


def test_shorter_than_usual_is_no_negative_share(clock):
    """A backend that became faster waits for nothing."""
    meter = LatencyMeter(clock.now)
    meter.answered(4.0, None, in_round=True)
    meter.end_round(clean=True)
    meter.answered(1.0, None, in_round=True)
    assert meter.read().wait_s == -3.0
    assert meter.read().share == 0.0


def feed_tokens(meter: LatencyMeter, each_token_s: float, wait_s: float = 0.0) -> None:
    """Add answers of 4 to 64 tokens, of which each takes so long."""
    for tokens in range(4, 68, 4):
        meter.answered(0.1 + wait_s + each_token_s * tokens, float(tokens), in_round=True)


def test_slower_tokens_are_no_waiting(clock):
    """An engine that runs twice as many sequences takes longer for each token; only what all wait alike is a queue."""
    meter = LatencyMeter(clock.now)
    for _ in range(4):
        feed_tokens(meter, 0.02)
        meter.end_round(clean=True)
    for _ in range(40):
        feed_tokens(meter, 0.04)
        meter.end_round(clean=False)
    feed_tokens(meter, 0.04)
    assert meter.read().share < 0.02
    meter.end_round(clean=False)
    feed_tokens(meter, 0.04, wait_s=1.0)
    assert meter.read().wait_s == pytest.approx(1.0, abs=0.15)


@pytest.mark.parametrize("work", [None, 0.0])
def test_a_wait_for_a_batch_is_none_where_sizes_are_unknown(clock, work):
    """Embeddings have no output tokens, and an engine computes them in batches; a longer wait is a queue."""
    meter = LatencyMeter(clock.now)
    for _ in range(16):
        meter.answered(0.1, work, in_round=True)
    meter.end_round(clean=True)
    meter.answered(0.1 + 0.9 * BATCH_S, work, in_round=True)
    assert meter.read() == Reading(Kind.WHOLE, 0.0, 0.0)
    meter.end_round(clean=False)
    meter.answered(0.1 + 3.0 * BATCH_S, work, in_round=True)
    assert meter.read().wait_s == pytest.approx(2.0 * BATCH_S)


def test_rebasing_makes_the_present_normal(clock):
    """After it the same times are no wait."""
    meter = LatencyMeter(clock.now)
    meter.answered(1.0, None, in_round=True)
    meter.end_round(clean=True)
    meter.answered(9.0 + BATCH_S, None, in_round=True)
    assert meter.read().wait_s == pytest.approx(8.0)
    meter.rebase()
    assert meter.read().wait_s == 0.0


def test_rounds_that_are_not_clean_do_not_move_the_measure(clock):
    """A queue does not become normal by lasting."""
    meter = LatencyMeter(clock.now)
    meter.answered(1.0, None, in_round=True)
    meter.end_round(clean=True)
    for _ in range(200):
        meter.answered(5.0 + BATCH_S, None, in_round=True)
        assert meter.read().wait_s == pytest.approx(4.0)
        meter.end_round(clean=False)


def test_the_mean_time_of_service_leaves_the_waiting_out(clock):
    """Little's law needs what an answer takes without the queue."""
    meter = LatencyMeter(clock.now)
    assert meter.service_s == 0.0
    clock.advance(2.0)
    assert meter.service_s == 2.0
    for _ in range(64):
        meter.answered(4.0, None, in_round=True)
    meter.end_round(clean=True)
    for _ in range(8):
        meter.answered(10.0, None, in_round=True)
    meter.read()
    meter.end_round(clean=False)
    before = meter.service_s
    for _ in range(100):
        meter.answered(10.0, None, in_round=False)
    assert before < 5.0
    assert meter.service_s == pytest.approx(4.0, abs=0.5)


def test_the_usual_first_byte_is_that_of_nine_in_ten_clean_answers(clock):
    """One odd prompt does not change it; before enough are known there is none."""
    meter = LatencyMeter(clock.now)
    assert meter.usual_first_byte_s() is None
    for _ in range(19):
        meter.first_byte(0.2)
    meter.first_byte(60.0)
    meter.end_round(clean=True)
    assert meter.usual_first_byte_s() == 0.2


def test_the_line_finds_the_seconds_per_token():
    """A constant beside it (a queue, a prefill) does not bend the slope."""
    rng = random.Random(3)
    line = SizeLine()
    for time_s, work in times(rng, 300, wait_s=5.0):
        line.add(work, time_s)
    assert line.slope == pytest.approx(SECONDS_PER_TOKEN, rel=0.15)


def test_equal_sizes_and_falling_times_have_no_slope():
    """Sizes from which no slope can be computed explain nothing."""
    line = SizeLine()
    assert line.slope == 0.0
    for _ in range(100):
        line.add(100.0, 3.0)
    assert line.slope == 0.0
    line = SizeLine()
    for work in range(1, 50):
        line.add(float(work), 100.0 - work)
    assert line.slope == 0.0


# Overdue first bytes.


def overdue_after(*started_at: float) -> OverdueFirstBytes:
    overdue = OverdueFirstBytes()
    for number, at in enumerate(started_at):
        overdue.begin(number, at)
    return overdue


def test_overdue_first_bytes_are_a_share_of_the_attempts_under_way():
    """A first byte is overdue after twice the usual time."""
    overdue = overdue_after(0.0, 1.0, 2.0, 9.0)
    assert overdue.share(10.0, 1.0, 8) == 3 / 8
    assert overdue.share(10.0, 6.0, 8) == 0.0


def test_a_few_overdue_first_bytes_are_no_queue():
    """One or two prompts may be long, whatever their share."""
    assert overdue_after(0.0, 1.0).share(10.0, 1.0, 2) == 0.0


def test_what_a_later_attempt_overtook_hangs_and_is_no_queue():
    """An attempt that started when the others were overdue already has its first byte: they wait for nothing."""
    overdue = overdue_after(0.0, 0.5, 1.0, 1.5, 4.0, 5.0)
    assert overdue.share(9.0, 1.0, 8) == 6 / 8
    overdue.came(4)
    assert overdue.share(9.0, 1.0, 8) == 0.0, "of five, four hang, and one says nothing"


def test_first_bytes_that_come_in_the_order_of_their_starts_contradict_no_queue():
    """As they do while all wait: the first of them is served first."""
    overdue = overdue_after(*range(12))
    for number in range(4):
        overdue.came(number)
    assert overdue.share(20.0, 2.0, 8) == 1.0


def test_attempts_that_have_begun_to_answer_or_have_ended_are_not_overdue():
    """Ending one twice is harmless, and so is ending an unknown one."""
    overdue = overdue_after(0.0, 1.0, 2.0)
    overdue.end(0)
    overdue.end(0)
    overdue.end(77)
    assert overdue.share(10.0, 1.0, 3) == 0.0
    overdue.end(1)
    overdue.end(2)
    assert not overdue


def test_without_attempts_under_way_the_share_is_zero():
    """The attempts may have left the count before they left this list."""
    assert overdue_after(0.0, 0.0, 0.0).share(10.0, 1.0, 0) == 0.0
