"""Progress of a run, in words, in lines and as a bar."""

import io
import re

import pytest

from worker.client.progress import BarDisplay, PlainDisplay, build_display, describe
from worker.client.summary import Progress


def a_progress(**changes):
    fields = {
        "expected_lines": 200, "skipped": 0, "answered": 50, "errors": 0, "waiting": 50, "publish_retries": 0,
        "output_tokens": 0, "duration_s": 10.0,
    }  # fmt: skip
    return Progress(**{**fields, **changes})


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_in_words():
    """One line has the progress of the run and its unusual counts."""
    assert describe(a_progress()) == "50/200 lines (25 %), 50 waiting"
    odd = a_progress(skipped=10, errors=3, publish_retries=2, expected_lines=None, waiting=40)
    assert describe(odd) == "60 lines, 10 answered before, 3 errors, 40 waiting, 2 publishes repeated"


def test_plain_display_writes_a_line_every_interval():
    """Off a terminal there is one line every five seconds, with the rate since the last one, and one at the end."""
    now, stream = [0.0], io.StringIO()
    with PlainDisplay(stream, clock=lambda: now[0]) as display:
        for second in range(1, 13):
            now[0] = float(second)
            display(a_progress(answered=10 * second, duration_s=now[0], expected_lines=120, waiting=120 - 10 * second))
    lines = stream.getvalue().splitlines()
    assert lines == [
        "50/120 lines (41 %), 70 waiting, 10.0 lines/s, 0:00:05",
        "100/120 lines (83 %), 20 waiting, 10.0 lines/s, 0:00:10",
        "120/120 lines (100 %), 10.0 lines/s, 0:00:12",
    ]
    display.close()
    assert stream.getvalue().splitlines() == lines


def test_plain_display_of_a_stalled_run():
    """A stalled run still writes its line."""
    now, stream = [0.0], io.StringIO()
    display = PlainDisplay(stream, clock=lambda: now[0])
    for _ in range(2):
        now[0] += 6.0
        display(a_progress(duration_s=now[0]))
    assert stream.getvalue().splitlines()[1] == "50/200 lines (25 %), 50 waiting, 0.0 lines/s, 0:00:12"


def test_nothing_to_show_writes_nothing():
    """A display that was told nothing writes nothing."""
    stream = io.StringIO()
    PlainDisplay(stream).close()
    assert stream.getvalue() == ""


def test_terminal_gets_a_bar(monkeypatch):
    """On a terminal the bar shows count, share and rate."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    now, stream = [0.0], Terminal()
    with build_display(stream, clock=lambda: now[0]) as display:
        assert isinstance(display, BarDisplay)
        now[0] = 5.0
        display(a_progress(errors=2))
        assert "50/200" in stream.getvalue()
    assert " 25%" in stream.getvalue()
    assert "2 errors" in stream.getvalue()


def test_the_bar_of_a_large_run_fits_80_columns(monkeypatch):
    """Ten million lines, errors and a high rate: nothing is cut off."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    now, stream = [0.0], Terminal()
    with build_display(stream, clock=lambda: now[0]) as display:
        for second in (1, 2):
            now[0] = float(second)
            display(
                a_progress(expected_lines=10_000_000, answered=4_500_000 * second, errors=1_000_000, duration_s=now[0])
            )
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue()).splitlines()[-1].rpartition("\r")[2]
    assert "9000000/10000000" in shown
    assert "1000000 errors, 4500000.0/s" in shown
    assert "…" not in shown
    assert len(shown) <= 80


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_what_is_said_stays_above_the_progress(stream, monkeypatch):
    """A sentence is written at once, as it stands, on either kind of stream, also after the end."""
    monkeypatch.setenv("TERM", "xterm")
    with build_display(stream) as display:
        display.say("error [bold]x[/], line 1: message")
    display.say("after")
    assert "error [bold]x[/], line 1: message\n" in stream.getvalue()
    assert stream.getvalue().endswith("after\n")


def test_bar_without_a_known_end(monkeypatch):
    """Input from a pipe has a count and no share."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    with build_display(stream) as display:
        display(a_progress(expected_lines=None))
    assert "50/?" in stream.getvalue()


def test_other_streams_get_plain_lines():
    """A file or a pipe gets plain lines."""
    assert isinstance(build_display(io.StringIO()), PlainDisplay)
