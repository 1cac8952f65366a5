"""
Logging: structlog, JSON lines unless standard error is a terminal, and one canonical line per settlement.

Library loggers go through the same pipe.  Bodies and keys never appear: nothing here is given them.
Writing must not end the worker: a full disk or a closed pipe drops lines, counted in `dropped_lines`.
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
    is_json = log_format == "json" or (log_format == "auto" and not safe.isatty())
    shared: list[Processor] = [
        _name_logger,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    renderer: list[Processor] = (
        [structlog.processors.format_exc_info, _RENDER_JSON]
        if is_json
        # The default formatter of tracebacks shows local variables: bodies and keys.
        else [structlog.dev.ConsoleRenderer(colors=safe.isatty(), exception_formatter=structlog.dev.plain_traceback)]
    )
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
