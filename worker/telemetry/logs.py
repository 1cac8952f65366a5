"""
Logging: structlog, JSON lines unless standard error is a terminal, and one canonical line per settlement.

Library loggers go through the same pipe.  Bodies and keys never appear: nothing here is given them.
Writing must not end the worker: a full disk or a closed pipe drops lines, counted in `dropped_lines`.

A terminal gets one short line an event: the time of day, the event, and the fields that say what happened; ids and the
parts of durations are in the JSON only.
"""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any, TextIO, cast

import msgspec
import structlog
from structlog.typing import EventDict, Processor

_QUIET = ("aiohttp.access",)
"""Loggers that write about normal events at info."""


_NAME = "logger_name"
"""`structlog.get_logger` has a parameter called `logger`, so the name travels under this key until it is rendered."""


def _name_logger(_: Any, __: str, line: EventDict) -> EventDict:
    if _NAME in line:
        line["logger"] = line.pop(_NAME)
    return line


_FIRST = ("status_code", "reason", "error_class", "model", "backend")
"""Fields of a console line that come first, where they are there; `error`, the longest, comes last."""
_JSON_ONLY = frozenset(
    {
        "path",
        "delivery_attempt",
        "request_id",
        "backend_request_id",
        "trace_id",
        "disposition",
        "rule",
        "bytes",
        "queue_s",
        "attempt_s",
        "ttft_s",
        "backend_status",
    }
)
"""Fields of the canonical line that a terminal does not get: a person at one looks for what happened, not for ids."""
_MAX_CONSOLE_CHARS = 160
"""Of one value on a terminal."""
_COLOURS = {"warning": "\x1b[33m", "error": "\x1b[31m", "critical": "\x1b[31m"}
_RESET = "\x1b[0m"


def _plain(value: object) -> str:
    """Return a value as one line of bounded length, without control characters."""
    text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    if len(text) > _MAX_CONSOLE_CHARS:
        text = text[: _MAX_CONSOLE_CHARS - 1] + "…"
    return text if text.isprintable() else repr(text)[1:-1]


def _quoted(value: object) -> str:
    """Return the same, in quotes where it has blanks."""
    text = _plain(value)
    return f'"{text}"' if " " in text or not text else text


class _ConsoleRenderer:
    """
    Renders a line for a person: `14:03:31 delivery_answered status_code=200 model=m total_s=0.6 message_id=7`.

    Args:
        colours: Whether warnings are yellow and errors red.
    """

    def __init__(self, *, colours: bool) -> None:
        self._colours = colours

    def __call__(self, _: Any, __: str, line: EventDict) -> str:
        """Return the line; a traceback follows on lines of its own."""
        time = str(line.pop("timestamp", ""))[11:19]
        event, level = _plain(line.pop("event", "")), str(line.pop("level", "info"))
        logger, exception, stack = (line.pop(key, None) for key in ("logger", "exception", "stack"))
        keys = [key for key in _FIRST if key in line]
        keys += [key for key in line if key not in {*_FIRST, *_JSON_ONLY, "error"}]
        keys += ["error"] if "error" in line else []
        fields = [f"{key}={_quoted(line[key])}" for key in keys if line[key] is not None]
        if " " in event:  # a library's sentence
            fields.append(f"({logger})")
        if level in _COLOURS:
            event = f"{level.upper()} {event}"
            if self._colours:
                event = _COLOURS[level] + event + _RESET
        text = " ".join([time, event, *fields])
        return "\n".join([text, *(str(part) for part in (stack, exception) if part)])


class SafeStream:
    """
    A text stream whose failures to write are counted instead of raised.

    Args:
        stream: Where lines go.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._has_failed = False
        self.dropped_lines = 0

    def write(self, text: str) -> int:
        """Write, or note the loss; never raises OSError or ValueError (closed stream)."""
        try:
            return self._stream.write(text)
        except (OSError, ValueError):
            self._has_failed = True
            return 0

    def flush(self) -> None:
        """Flush, as every logger does once a line, and count the line if any part of it was lost."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._has_failed = True
        if self._has_failed:
            self.dropped_lines += 1
            self._has_failed = False

    def isatty(self) -> bool:
        """Whether lines go to a terminal."""
        return not self._stream.closed and self._stream.isatty()


def _to_json(entry: Any, **_: Any) -> str:
    """Return a line as JSON; what JSON does not know is written as text, bytes in base64."""
    try:
        return msgspec.json.encode(entry, enc_hook=str).decode()
    except (OverflowError, TypeError, ValueError):  # e.g. a key that is no text, a lone surrogate
        return json.dumps(entry, default=str, skipkeys=True)


_RENDER_JSON = structlog.processors.JSONRenderer(serializer=_to_json)
_encode = msgspec.json.Encoder(enc_hook=str).encode


class _Lines(structlog.PrintLoggerFactory):
    """
    Makes structlog's loggers, and says where their lines go.

    Args:
        stream: Where lines go.
        level: Lowest level written, as a number.
    """

    def __init__(self, stream: SafeStream, level: int) -> None:
        super().__init__(cast("TextIO", stream))
        self.stream = stream
        self.level = level


def is_for_machines(log_format: str, stream: SafeStream) -> bool:
    """Say whether lines are JSON: where that is asked for, and by default off a terminal."""
    return log_format == "json" or (log_format == "auto" and not stream.isatty())


def configure_logs(log_format: str, level: str, stream: TextIO | None = None) -> SafeStream:
    """
    Set up structlog and the standard library's logging, once per process.

    Args:
        log_format: `auto`, `json` or `console`.
        level: Lowest level written.
        stream: Default: standard error.

    Returns:
        The stream in use; its `dropped_lines` tells how many lines could not be written.
    """
    safe = SafeStream(stream or sys.stderr)
    number = getattr(logging, level.upper())
    is_json = is_for_machines(log_format, safe)
    shared: list[Processor] = [
        _name_logger,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    # `format_exc_info` and not structlog's own formatter for terminals, which shows local variables: bodies and keys.
    renderer: list[Processor] = [
        structlog.processors.format_exc_info,
        _RENDER_JSON if is_json else _ConsoleRenderer(colours=safe.isatty()),
    ]
    structlog.configure(
        processors=[*shared, *renderer],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=_Lines(safe, number),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(safe)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_logger_name, *shared],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderer],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(number, logging.WARNING))
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return safe


def get_logger(name: str, **context: Any) -> Any:
    """
    Return a logger whose lines carry `logger=name` and the given context.

    It may be made when a module is imported: not `bind`, which would settle at once for the configuration of that
    moment, before `configure_logs` has run.
    """
    return structlog.get_logger(**{_NAME: name}, **context)


class FrequentLog:
    """
    The logger of a line that every message writes: in JSON, without running structlog's processors for each.

    Args:
        name: As for `get_logger`.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._log = get_logger(name)

    def info(self, event: str, fields: dict[str, Any]) -> None:
        """Write what `get_logger(name).info(event, **fields)` writes; on the event loop."""
        config = structlog.get_config()
        lines = config["logger_factory"]
        if not isinstance(lines, _Lines) or config["processors"][-1] is not _RENDER_JSON:  # for a terminal, or a test
            self._log.info(event, **fields)
        elif lines.level <= logging.INFO:
            try:
                line = _encode(
                    {**fields, "event": event, "logger": self._name, "level": "info", "timestamp": datetime.now(UTC)}
                )
            except (OverflowError, TypeError, ValueError):
                self._log.info(event, **fields)
            else:
                lines.stream.write(line.decode() + "\n")
                lines.stream.flush()


class StateLog:
    """
    The logger of lines that say what state the worker is in; `log.level` does not keep them back.

    They are few (a start, a drain, the end of a trouble whose beginning was a warning), and a log without them does not
    say whether the worker runs.

    Args:
        name: As for `get_logger`.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def info(self, event: str, **fields: Any) -> None:
        """Write a line of level info, whatever the lowest level is."""
        config = structlog.get_config()
        logger = structlog.wrap_logger(
            config["logger_factory"](), processors=config["processors"], wrapper_class=structlog.BoundLogger
        )
        logger.info(event, **{_NAME: self._name}, **fields)
