"""Counts of a run, and the table at its end."""

import io
import json

import pytest

from worker.client.io.lines import Refusal
from worker.client.io.outputs import Answer, local_answer
from worker.client.summary import InputCount, Tally, headline, print_summary, rows


def an_answer(status=200, **fields):
    return Answer(status_code=status, body=b"{}", **fields)


def a_tally(*answers, known=None, lines=None, is_input_read=True):
    tally = Tally(known)
    tally.lines = len(answers) if lines is None else lines
    tally.is_input_read = is_input_read
    for number, answer in enumerate(answers, 1):
        tally.count(answer, number)
    return tally


def test_summary_of_mixed_answers():
    """Statuses, classes, tokens and local answers are counted where they belong."""
    summary = a_tally(
        an_answer(input_tokens=10, output_tokens=5),
        an_answer(input_tokens=7),
        an_answer(429, error_class="rate_limited"),
        an_answer(400, error_class="bad_message"),
        an_answer(422, error_class="bad_message"),
        local_answer(Refusal(status_code=413, code="line_too_long", message="m")),
    ).summary(duration_s=2.0)
    assert summary.status_classes == {"2xx": 2, "4xx": 4}
    assert list(summary.error_classes.items()) == [("bad_message", 2), ("line_too_long", 1), ("rate_limited", 1)]
    assert (summary.input_tokens, summary.output_tokens, summary.output_tokens_per_s) == (17, 5, 2.5)
    assert (summary.is_complete, summary.lines_per_s) == (True, 3.0)
    assert str(summary.examples["line_too_long"]) == "line 6: m"


def test_each_error_class_has_its_first_answer_as_an_example():
    """Line, message and address; bounded, on one line, without what a terminal would obey."""
    text = "no such\n model \x1b[31m" + "x" * 1000
    body = json.dumps({"error": {"message": text}}).encode()
    tally = Tally()
    first = tally.count(Answer(status_code=404, body=body, error_class="model_not_found", url="http://h/v1/x"), 7)
    assert first is not None
    assert tally.count(Answer(status_code=404, body=body, error_class="model_not_found"), 8) is None
    assert str(first).startswith("line 7: no such model \ufffd[31mxxx")
    assert str(first).endswith("x… (http://h/v1/x)")
    assert len(first.message) == 300
    stream = io.StringIO()
    print_summary(tally.summary(duration_s=1.0), stream)
    assert "model_not_found, line 7: no such model" in stream.getvalue()
    assert max(map(len, stream.getvalue().splitlines())) <= 80


def test_times_are_those_of_the_backend_for_good_answers():
    """Not of the queue, and not of refusals, which are quick."""
    answers = [an_answer(attempt_s=2.0) for _ in range(9)] + [an_answer(400, error_class="x", attempt_s=0.001)]
    summary = a_tally(*answers, an_answer()).summary(duration_s=1.0)
    assert summary.backend_p50_s == pytest.approx(2.0, rel=0.011)
    assert ("backend time p90", "2.000 s") in list(rows(summary))
    assert a_tally(an_answer()).summary(duration_s=1.0).backend_p50_s is None


def test_an_interrupted_run_counts_all_lines_of_its_input():
    """Also those that were not read, and all that were answered before; a pipe has only what was read."""
    known = InputCount(lines=1000, answered=300)
    tally = a_tally(an_answer(), known=known, lines=150, is_input_read=False)
    tally.skipped = 100
    summary = tally.summary(duration_s=1.0)
    assert (summary.lines, summary.skipped, summary.answered, summary.unanswered) == (1000, 300, 1, 699)
    assert headline(summary) == "stopped: 301 of 1,000 lines answered"
    progress = tally.progress(duration_s=1.0)
    assert (progress.expected_lines, progress.skipped, progress.waiting) == (1000, 300, 49)
    pipe = a_tally(an_answer(), lines=150, is_input_read=False)
    assert headline(pipe.summary(duration_s=1.0)) == "stopped: 1 lines answered"
    assert ("lines", "150 read so far") in list(rows(pipe.summary(duration_s=1.0)))
    assert pipe.progress(duration_s=1.0).expected_lines is None


def test_what_was_read_in_the_end_counts():
    """A file that shrank or grew after it was counted."""
    for known in (InputCount(lines=5, answered=0), InputCount(lines=1, answered=1)):
        summary = a_tally(an_answer(), an_answer(), known=known).summary(duration_s=1.0)
        assert (summary.lines, summary.unanswered, summary.is_complete) == (2, 0, True)


def test_summary_without_usage_has_no_tokens():
    """Tokens are null, not zero, when no answer reported any."""
    summary = a_tally(an_answer()).summary(duration_s=0.0)
    assert (summary.input_tokens, summary.output_tokens, summary.output_tokens_per_s) == (None, None, None)
    names = [name for name, _ in rows(summary)]
    assert "input tokens" not in names


def test_table_shows_what_happened_and_nothing_else():
    """The table names counts that are not zero, to any stream, without colours off a terminal."""
    tally = a_tally(*[an_answer()] * 1001, lines=1004)
    tally.skipped, tally.duplicates = 2, 3
    stream = io.StringIO()
    print_summary(tally.summary(duration_s=10.0), stream)
    text = stream.getvalue()
    assert "\x1b" not in text
    shown = {line.split("│")[1].strip(): line.split("│")[2].strip() for line in text.splitlines() if "│" in line}
    assert shown["answered"] == "1,001"
    assert shown["answered before"] == "2"
    assert shown["not answered"] == "1"
    assert shown["duplicates dropped"] == "3"
    assert shown["status 2xx"] == "1,001"
    assert "publishes repeated" not in shown
    assert "example" not in text
    assert "stopped: 1,003 of 1,004 lines answered" in text


@pytest.mark.parametrize(
    ("answers", "is_input_read", "text"),
    [
        ([], True, "nothing to answer"),
        ([an_answer()], True, "all 1 lines answered"),
        ([an_answer(), an_answer(400, error_class="x")], True, "all 2 lines answered, 1 with an error"),
        ([an_answer()], False, "stopped: 1 lines answered"),
    ],
)
def test_headline(answers, is_input_read, text):
    """The first line says whether the run is complete, and whether there were errors."""
    assert headline(a_tally(*answers, is_input_read=is_input_read).summary(duration_s=1.0)) == text
