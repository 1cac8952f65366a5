"""Counts of a run, and the table at its end."""

import io

import pytest

from worker.client.io.lines import Refusal
from worker.client.io.outputs import Answer, local_answer
from worker.client.summary import Tally, headline, print_summary, rows


def an_answer(status=200, **fields):
    return Answer(status_code=status, body=b"{}", **fields)


def test_summary_of_mixed_answers():
    """Statuses, classes, tokens and local answers are counted where they belong."""
    tally = Tally()
    tally.lines = 6
    tally.count(an_answer(input_tokens=10, output_tokens=5), 1.0)
    tally.count(an_answer(input_tokens=7), 1.0)
    tally.count(an_answer(429, error_class="rate_limited"), 1.0)
    tally.count(an_answer(400, error_class="bad_message"), 1.0)
    tally.count(an_answer(422, error_class="bad_message"), 1.0)
    tally.count(local_answer(Refusal(status_code=413, code="line_too_long", message="m")), None)
    summary = tally.summary(duration_s=2.0, is_input_read=True)
    assert summary.status_classes == {"2xx": 2, "4xx": 4}
    assert list(summary.error_classes.items()) == [("bad_message", 2), ("line_too_long", 1), ("rate_limited", 1)]
    assert (summary.input_tokens, summary.output_tokens, summary.output_tokens_per_s) == (17, 5, 2.5)
    assert (summary.is_complete, summary.lines_per_s) == (True, 3.0)


def test_summary_without_usage_has_no_tokens():
    """Tokens are null, not zero, when no answer reported any."""
    tally = Tally()
    tally.lines = 1
    tally.count(an_answer(), 1.0)
    summary = tally.summary(duration_s=0.0, is_input_read=True)
    assert (summary.input_tokens, summary.output_tokens, summary.output_tokens_per_s) == (None, None, None)
    names = [name for name, _ in rows(summary)]
    assert "input tokens" not in names


def test_table_shows_what_happened_and_nothing_else():
    """The table names counts that are not zero, to any stream, without colours off a terminal."""
    tally = Tally()
    tally.lines, tally.skipped, tally.duplicates = 1004, 2, 3
    for _ in range(1001):
        tally.count(an_answer(), 0.5)
    stream = io.StringIO()
    print_summary(tally.summary(duration_s=10.0, is_input_read=True), stream)
    text = stream.getvalue()
    assert "\x1b" not in text
    shown = {line.split("│")[1].strip(): line.split("│")[2].strip() for line in text.splitlines() if "│" in line}
    assert shown["answered"] == "1,001"
    assert shown["answered before"] == "2"
    assert shown["not answered"] == "1"
    assert shown["duplicates dropped"] == "3"
    assert shown["status 2xx"] == "1,001"
    assert "publishes repeated" not in shown
    assert "stopped: 1003 lines answered, 1 waiting" in text


@pytest.mark.parametrize(
    ("lines", "is_input_read", "text"),
    [(0, True, "nothing to answer"), (1, True, "all 1 lines answered"), (1, False, "stopped: 1 lines answered")],
)
def test_headline(lines, is_input_read, text):
    """The first line says whether the run is complete."""
    tally = Tally()
    tally.lines = lines
    for _ in range(lines):
        tally.count(an_answer(), 1.0)
    assert headline(tally.summary(duration_s=1.0, is_input_read=is_input_read)).startswith(text)
