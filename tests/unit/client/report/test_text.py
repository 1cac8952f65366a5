"""The tables, and how numbers are written for people."""

import json
import re

import pytest

from tests.unit.client.report.answers import a_line, a_run
from tests.unit.client.report.test_statistics import report_of
from worker.client.report.results import Price
from worker.client.report.text import amount, compact, duration, render_text, round_duration, share, table


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"), (0, "0"), (0.000_000_3, "0.000000"), (0.000_123_4, "0.000123"), (0.011_34, "0.0113"),
        (0.999_9, "1.000"), (2.044, "2.04"), (12.74, "12.7"), (999.9, "1,000"), (12_345.6, "12,346"),
    ],
)  # fmt: skip
def test_amounts_have_three_digits(value, text):
    """Never scientific, never more than three digits that mean something before the thousands."""
    assert amount(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0.0 %"), (0.000_01, "<0.1 %"), (0.001, "0.1 %"), (0.5, "50.0 %"), (1, "100.0 %")]
)
def test_a_share_that_is_not_nothing_is_not_shown_as_nothing(value, text):
    """One error in a million must not look like none."""
    assert share(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"), (0, "0 s"), (3e-7, "0.300 µs"), (0.000_35, "350 µs"), (0.012_34, "12.3 ms"), (0.9999, "1.000 s"),
        (2.044, "2.04 s"), (119, "119 s"), (192, "3.20 min"), (9000, "2.50 h"), (5 * 86_400, "5.00 d"),
    ],
)  # fmt: skip
def test_durations_have_the_unit_that_suits_them(seconds, text):
    """From microseconds to days, three digits each."""
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0"), (5e-6, "5 µs"), (0.05, "50 ms"), (20, "20 s"), (60, "1 min"), (150, "2.5 min"), (7200, "2 h"), (2 * 86_400, "2 d")],
)  # fmt: skip
def test_round_durations_are_short(seconds, text):
    """As they stand on an axis."""
    assert round_duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.5, "0.5"), (1500, "1,500"), (20_000, "20k"), (1.5e6, "1.5M"), (2e9, "2G")]
)
def test_numbers_on_an_axis_fit_beside_it(value, text):
    """However large they are."""
    assert compact(value) == text


def test_what_answers_say_is_told():
    """Length and speed of one answer, and why it ended; what it cost, with a price."""
    lines = [a_line(number, finish_reason="stop" if number % 4 else "length") for number in range(200)]
    text = render_text(report_of(lines, prices={"m": Price(input=1000.0, output=0.0, cached=0.0)}))
    assert re.search(r"^output tokens +200 +20\.0 +20\.0 ", text, re.MULTILINE)
    assert re.search(r"^output tokens/s +200 +20\.0 ", text, re.MULTILINE)
    assert "ended by stop: 150, length: 50" in text
    assert "cost of the tokens: 2.00" in text


def test_the_report_says_what_a_person_asks_first():
    """How many, how many wrong, how fast, by model, by class; in lines that fit a terminal."""
    text = render_text(report_of(a_run()))
    assert text.startswith("out.jsonl: 400 answers, 20 of them errors (5.0 %)\n2026-11-20T20:42:00.100Z to ")
    assert "by status: 200: 380, 400: 20" in text
    assert "note: 1 line is not an answer; the first is line 401: " in text
    assert re.search(r"^large +\d+ +\d+ ", text, re.MULTILINE)
    assert re.search(r"^total +400 +20 +5\.0 %$", text, re.MULTILINE)
    assert re.search(r"^total +3,800 +7,600 +- +1,900 ", text, re.MULTILINE)
    assert re.search(r"^context_length +10 +2\.5 % +400 +0 ", text, re.MULTILINE)
    assert "* fewer than 5 values lie beyond it" in text
    assert re.search(r"^context_length, line 20: m$", text, re.MULTILINE)
    assert max(map(len, text.splitlines())) <= 80


def test_a_row_of_zeros_is_left_out():
    """Nothing was held, so nothing is said about it; marks that do not occur are not explained."""
    text = render_text(report_of(a_line(number) for number in range(600)))
    assert "held" not in text
    assert "lie beyond" not in text


def test_percentiles_of_few_values_are_dashes():
    """Three values have a weak p50 and nothing else; both are explained."""
    text = render_text(report_of(a_line(number) for number in range(3)))
    assert re.search(r"^m\n  ttft +3 +0 +0\.100 +0\.100\* +- +- +0\.100$", text, re.MULTILINE)
    assert "* fewer than 5 values lie beyond it" in text
    assert "- too few values: none lies beyond it" in text


def test_without_times_only_counts_are_told():
    """Answers of a worker without `reply.include_stats`: no rates, no tables of times, and the reason."""
    text = render_text(report_of([a_line(1, stats=False), a_line(2, 429, stats=False)]))
    assert "answers/s" not in text
    assert "Times" not in text
    assert "2 answers have no times" in text
    assert "reply.include_stats" in text


def test_long_names_and_messages_fit_a_terminal():
    """A name of 128 characters is cut in the tables; an example is wrapped, with its address whole where it fits."""
    lines = [a_line(1, model="m" * 128), a_line(2, 500, model="n" * 128, error_class="e" * 40)]
    line = json.loads(lines[1])
    line |= {"url": "http://127.0.0.1:8000/v1/chat/completions", "id": "line-17-00000000"}
    line["body"]["error"]["message"] = "it failed " * 60
    text = render_text(report_of([lines[0], json.dumps(line).encode()]))
    assert max(map(len, text.splitlines())) <= 80
    assert f"{'e' * 40}, line 17: it failed it failed" in text
    assert "(http://127.0.0.1:8000/v1/chat/completions)" in text


def test_an_empty_file_is_told_as_such():
    """No tables of nothing."""
    assert render_text(report_of([])) == "out.jsonl: no answers\n"


def test_tables_are_aligned():
    """Words to the left, numbers to the right, no spaces at the ends."""
    lines = list(table(["name", "n"], [["a", "10"], ["longer", "5"]]))
    assert lines == ["name     n", "------  --", "a       10", "longer   5"]


def test_variants_have_tables_where_there_are_any():
    """How many, how many wrong, how fast; nothing of them otherwise."""
    lines = [a_line(number, variant="blue" if number % 3 else "green", ttlt_s=1.0 + number % 3) for number in range(60)]
    text = render_text(report_of(lines))
    assert re.search(
        r"^Answers by variant\nvariant +answers +errors +of them\n[- ]+\nblue +40 +0 +0\.0 %$", text, re.MULTILINE
    )
    assert re.search(r"^green +20 +0 +0\.0 %$", text, re.MULTILINE)
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "variant" not in render_text(report_of(a_run()))


def test_tenants_have_a_table_with_what_they_cost():
    """By tenant and model, from the worker's prices; where no tenant is known there is no table."""
    lines = [a_line(number, tenant="a" if number % 4 else "b", cost=0.25) for number in range(8)]
    text = render_text(report_of(lines))
    assert "By tenant and model\ntenant / model" in text
    assert re.search(r"^a / m +6 +0 +60 +120 +1\.50$", text, re.MULTILINE)
    assert re.search(r"^total +8 +0 +80 +160 +2\.00$", text, re.MULTILINE)
    assert "cost of the tokens: 0.5000" in render_text(report_of([a_line(1, cost=0.5)]))
    assert "tenant" not in render_text(report_of([a_line(1)]))


def test_the_values_of_tenants_are_in_the_json():
    """As the tables have them."""
    values = report_of([a_line(1, tenant="a", cost=0.5)]).as_dict()
    assert (values["tenants"]["a / m"]["cost"], values["total"]["cost"]) == (0.5, 0.5)
    assert report_of([a_line(1)]).as_dict()["total"]["cost"] is None
