"""Progress of a run, in words, in lines and as a bar."""

import io

import pytest

from worker.client.progress import BarDisplay, PlainDisplay, build_display, describe
from worker.client.summary import Progress


def a_progress(**changes):
    fields = {
        "lines": 100, "skipped": 0, "answered": 50, "errors": 0, "publish_retries": 0, "output_tokens": 0,
        "lines_read": 100, "bytes_read": 1000, "bytes_total": 2000, "is_input_read": False, "duration_s": 10.0,
    }  # fmt: skip
    return Progress(**{**fields, **changes})


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 200),
        ({"bytes_total": None}, None),
        ({"bytes_read": 0, "lines_read": 0}, None),
        ({"is_input_read": True}, 100),
        ({"bytes_read": 3000}, 100),
    ],
)
def test_expected_lines_are_estimated_from_bytes(changes, expected):
    """Until the input has ended its number of lines is estimated, never below what was read."""
    assert a_progress(**changes).expected_lines == expected


def test_progress_in_words():
    """One line has the progress of the run and its unusual counts."""
    assert describe(a_progress()) == "50/200 lines (25 %), 50 waiting"
    odd = a_progress(skipped=10, errors=3, publish_retries=2, bytes_total=None)
    assert describe(odd) == "60 lines, 10 answered before, 3 errors, 40 waiting, 2 publishes repeated"


def test_plain_display_writes_a_line_every_interval():
    """Off a terminal there is one line every five seconds, with the rate since the last one, and one at the end."""
    now, stream = [0.0], io.StringIO()
    with PlainDisplay(stream, clock=lambda: now[0]) as display:
        for second in range(1, 13):
            now[0] = float(second)
            display(a_progress(answered=10 * second, duration_s=now[0], is_input_read=True, lines=120, lines_read=120))
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


def test_bar_without_a_known_end(monkeypatch):
    """Input from a pipe has a count and no share."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    with build_display(stream) as display:
        display(a_progress(bytes_total=None))
    assert "50/?" in stream.getvalue()


def test_other_streams_get_plain_lines():
    """A file or a pipe gets plain lines."""
    assert isinstance(build_display(io.StringIO()), PlainDisplay)
