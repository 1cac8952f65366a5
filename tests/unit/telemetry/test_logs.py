"""Logs: where they go, what they look like, what they never hold, and that writing them cannot end the worker."""

import io
import json
import logging
import re
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from worker.telemetry.logs import FrequentLog, SafeStream, StateLog, configure_logs, get_logger

_log = get_logger("made at import", part="x")


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    """Leave the process's logging as it was found."""
    structlog.reset_defaults()
    root = logging.getLogger()
    before = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = before
    structlog.reset_defaults()


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


class Broken(io.StringIO):
    """A stream whose other end is gone."""

    def write(self, _: str) -> int:
        raise BrokenPipeError

    def flush(self) -> None:
        raise BrokenPipeError


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_lines_are_json_off_a_terminal() -> None:
    """One JSON object a line, with level, time in UTC, logger and context; a logger made at import obeys too."""
    configure_logs("auto", "info", stream := io.StringIO())
    _log.info("settled", message_id="7", status_code=200, odd=1j, raw=b"\xff", big=2**70)
    (line,) = lines(stream)
    assert line.pop("timestamp").endswith("Z")
    assert line == {
        "event": "settled",
        "level": "info",
        "logger": "made at import",
        "part": "x",
        "message_id": "7",
        "status_code": 200,
        "odd": "1j",
        "raw": "/w==",
        "big": 2**70,
    }


@pytest.mark.parametrize(("log_format", "is_json"), [("auto", False), ("console", False), ("json", True)])
def test_a_terminal_gets_text_unless_asked_otherwise(log_format: str, is_json: bool) -> None:
    """`auto` looks at the stream."""
    configure_logs(log_format, "info", stream := Terminal())
    _log.info("hello", part="y")
    assert stream.getvalue().startswith("{") is is_json
    assert "hello" in stream.getvalue()


@pytest.mark.parametrize(("level", "expected"), [("debug", 4), ("info", 3), ("warning", 2), ("error", 1)])
def test_the_level_filters(level: str, expected: int) -> None:
    """Lines below the level are not written."""
    configure_logs("json", level, stream := io.StringIO())
    for write in (_log.debug, _log.info, _log.warning, _log.error):
        write("x")
    assert len(lines(stream)) == expected


@pytest.mark.parametrize("log_format", ["json", "console"])
@pytest.mark.parametrize(
    "fields", [{"a": 1, "b": None, "c": "ü\n", "d": 0.25}, {"odd": 1j, "big": 2**70}, {"half": "\ud800"}, {}]
)
def test_a_frequent_line_is_what_structlog_writes(log_format: str, fields: dict[str, Any]) -> None:
    """The same keys in the same order and the same bytes, whatever the values are; only the time is a later one."""
    configure_logs(log_format, "info", stream := Terminal())
    get_logger("name").info("event", **fields)
    FrequentLog("name").info("event", fields)
    first, second = re.sub(r"[\d-]*T?\d\d:\d\d:[\d.]+Z?", "TIME", stream.getvalue()).splitlines()
    assert first == second
    assert "TIME" in first


@pytest.mark.parametrize(("level", "expected"), [("debug", 1), ("info", 1), ("warning", 0)])
def test_a_frequent_line_has_a_level(level: str, expected: int) -> None:
    """It is one of level info."""
    configure_logs("json", level, stream := io.StringIO())
    FrequentLog("name").info("event", {})
    assert len(lines(stream)) == expected


def test_a_frequent_line_is_dropped_and_counted_like_others() -> None:
    """A closed pipe ends no request."""
    safe = configure_logs("json", "info", Broken())
    FrequentLog("name").info("event", {})
    assert safe.dropped_lines == 1


@pytest.mark.parametrize("level", ["debug", "info", "warning", "error"])
@pytest.mark.parametrize("log_format", ["json", "console"])
def test_a_state_is_told_at_every_level(level: str, log_format: str) -> None:
    """A log that says nothing of start and drain does not say whether the worker runs; it is the same line as any."""
    configure_logs(log_format, level, stream := io.StringIO())
    StateLog("name").info("worker_started", http_port=1)
    configure_logs(log_format, "info", plain := io.StringIO())
    get_logger("name").info("worker_started", http_port=1)
    first, second = [re.sub(r"[\dT:.-]{8,}Z?", "TIME", each.getvalue()) for each in (stream, plain)]
    assert first == second
    assert first.count("worker_started") == 1


ANSWERED = {
    "message_id": "17",
    "delivery_attempt": 1,
    "backend": "default",
    "path": "/v1/chat/completions",
    "model": "llama 3",
    "attempts": 1,
    "total_s": 0.68,
    "queue_s": 0.006,
    "request_id": "1b671a64-40d5-591e-99b0-da01ff1f3341",
    "disposition": "reply",
    "status_code": 500,
    "error": "no",
    "bytes": 709,
    "error_class": "server_error",
}


def console_line(event: str, write: str = "info", colours: bool = False, **fields: Any) -> str:
    configure_logs("console", "info", stream := (Terminal() if colours else io.StringIO()))
    getattr(get_logger("name"), write)(event, **fields)
    return re.sub(r"^\d\d:\d\d:\d\d", "TIME", stream.getvalue())


def test_a_terminal_gets_one_short_line_an_event() -> None:
    """What happened comes first, the error's text last; ids and parts of durations are in the JSON only."""
    assert console_line("delivery_answered", **ANSWERED) == (
        'TIME delivery_answered status_code=500 error_class=server_error model="llama 3" backend=default '
        "message_id=17 attempts=1 total_s=0.68 error=no\n"
    )
    assert console_line("worker_started", http_port=8080, nothing=None) == "TIME worker_started http_port=8080\n"


def test_a_terminal_shows_what_needs_attention() -> None:
    """By a word, and by a colour where there are any; a library's sentence names the library."""
    assert console_line("attempt_held", "warning") == "TIME WARNING attempt_held\n"
    assert console_line("x_failed", "error", colours=True) == "TIME \x1b[31mERROR x_failed\x1b[0m\n"
    assert console_line("slow task", "warning") == "TIME WARNING slow task (name)\n"


@pytest.mark.parametrize("text", ["a\nb", "\x1b[2J", "\r\n14:00:00 ERROR forged", "\u2028", "\ud800", "x" * 10_000])
def test_no_value_controls_a_terminal_or_forges_a_line(text: str) -> None:
    """Control characters are written as escapes, and what is long is cut."""
    line = console_line("delivery_answered", model=text, list=[text])
    assert line.endswith("\n")
    assert line[:-1].isprintable()
    assert len(line) < 400


def test_library_loggers_go_through_the_same_pipe() -> None:
    """Their warnings come as the same JSON with their own logger's name and tracebacks; their chatter does not."""
    configure_logs("json", "debug", stream := io.StringIO())
    logging.getLogger("some.library").info("chatter")
    logging.getLogger("some.library").warning("careful %s", "there")
    try:
        {}["gone"]
    except KeyError:
        logging.getLogger("asyncio").exception("never retrieved")
    first, second = lines(stream)
    assert (first["event"], first["logger"], first["level"]) == ("careful there", "some.library", "warning")
    assert (second["logger"], second["level"]) == ("asyncio", "error")
    assert "KeyError: 'gone'" in second["exception"]


def test_noisy_loggers_are_quiet() -> None:
    """What a library writes about normal events is not written."""
    configure_logs("json", "info", stream := io.StringIO())
    logging.getLogger("aiohttp.access").error("x")
    assert stream.getvalue() == ""


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_tracebacks_show_no_values(log_format: str) -> None:
    """A traceback names files and lines, never what variables held: they hold bodies and keys."""
    configure_logs(log_format, "info", stream := Terminal())
    api_key = "sk-" + "secret"
    try:
        int(api_key[:0])
    except ValueError:
        _log.exception("failed")
        logging.getLogger("lib").exception("failed as well")
    assert stream.getvalue().count("ValueError") >= 2
    assert "sk-secret" not in stream.getvalue()


def test_a_line_is_one_line() -> None:
    """Line breaks in values do not forge further lines."""
    configure_logs("json", "info", stream := io.StringIO())
    _log.info("a\nb", text='x\r\n{"level":"error"}')
    assert [line["event"] for line in lines(stream)] == ["a\nb"]


def test_configuring_twice_writes_once() -> None:
    """A second configuration replaces the first."""
    configure_logs("json", "info", first := io.StringIO())
    configure_logs("json", "info", second := io.StringIO())
    _log.info("x")
    logging.getLogger("lib").warning("y")
    assert first.getvalue() == ""
    assert [line["event"] for line in lines(second)] == ["x", "y"]


def test_a_broken_stream_loses_lines_and_counts_them() -> None:
    """A closed pipe ends no request: neither ours nor a library's logging raises."""
    safe = configure_logs("json", "info", Broken())
    _log.info("x")
    logging.getLogger("lib").warning("y")
    assert safe.dropped_lines == 2


def test_a_closed_stream_loses_lines() -> None:
    """Writing to a closed stream raises ValueError in Python; here it is counted, and it is no terminal."""
    stream = io.StringIO()
    safe = SafeStream(stream)
    stream.close()
    assert safe.write("x") == 0
    safe.flush()
    safe.flush()
    assert safe.dropped_lines == 1
    assert safe.isatty() is False


def test_the_default_is_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    """Standard output belongs to answers."""
    configure_logs("json", "info")
    _log.info("x")
    captured = capsys.readouterr()
    assert (captured.out, json.loads(captured.err)["event"]) == ("", "x")
