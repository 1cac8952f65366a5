"""
The ways the simulated server can misbehave: one row per mode, with the parameters it takes.

`control` reads behaviours with this table, `faults` carries them out, and `docs/simbackend.md` lists every row; a test
compares them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from worker.emulators.openai.error_shapes import Kind
from worker.emulators.openai.latency import parse_duration
from worker.emulators.openai.readers import Reader, choice, flag, headers, integer, optional, text
from worker.emulators.openai.retry_after import parse_retry_after
from worker.emulators.openai.sse import LINE_ENDINGS, Break


class Stage(StrEnum):
    """When in a request's life a mode steps in."""

    OK = "ok"
    """Never: the request is served as usual, and no later behaviour is looked at."""
    INSTEAD = "instead"
    """Before anything is checked; the request is not served."""
    ALTER = "alter"
    """After a request was served; what is sent is changed or delayed."""
    STREAM = "stream"
    """The same, for requests with `"stream": true` only; others are not matched."""
    LISTENER = "listener"
    """It concerns the socket, not requests."""


@dataclass(frozen=True, slots=True)
class Param:
    """One parameter of a mode."""

    read: Reader
    default: Any = None


@dataclass(frozen=True, slots=True)
class Mode:
    """One way to misbehave."""

    name: str
    stage: Stage
    meaning: str
    params: Mapping[str, Param] = field(default_factory=dict)
    whole_server: bool = False
    """Without a path filter it also hits `/health`, `/v1/models` and unknown paths, not just inference paths."""
    unary_only: bool = False
    """It changes one JSON body, so requests with `"stream": true` are not matched."""


_SECONDS = Param(optional(parse_duration))
_HINT = Param(parse_retry_after)
_MESSAGE = Param(optional(text))
_SIZE = Param(optional(integer(0)))
_USAGE_ON = choice("own_chunk", "empty_delta", "finish_chunk", "first_chunk")
_BREAKS = [kind.value for kind in Break]
_MAX_OVERSIZE_BYTES = 1 << 30

_STREAM_PARAMS: Mapping[str, Param] = {
    "break": Param(choice(*_BREAKS), "none"),
    "after_bytes": _SIZE,
    "after_events": _SIZE,
    "idle_s": _SECONDS,
    "comment_every_s": Param(parse_duration, 0.2),
    "error": Param(choice(*(kind.value for kind in Kind)), "server_error"),
    "error_status": Param(optional(integer(400, 599))),
    "missing_done": Param(flag, default=False),
    "missing_finish_reason": Param(flag, default=False),
    "missing_last_blank": Param(flag, default=False),
    "line_ending": Param(choice(*LINE_ENDINGS), "lf"),
    "bom": Param(flag, default=False),
    "split_bytes": Param(optional(integer(1))),
    "multiline": Param(flag, default=False),
    "usage_on": Param(optional(_USAGE_ON)),
}

_OUTAGE = {"status": Param(integer(500, 599), 500), "message": _MESSAGE, "retry_after": _HINT}
_HINTED = {"message": _MESSAGE, "retry_after": _HINT}

_ROWS = (
    Mode("ok", Stage.OK, "answers as usual"),
    Mode("outage_5xx", Stage.INSTEAD, "an error in the dialect's JSON", _OUTAGE, whole_server=True),
    Mode(
        "html_502",
        Stage.INSTEAD,
        "a proxy's HTML page",
        {"status": Param(integer(400, 599), 502)},
        whole_server=True,
    ),
    Mode("not_ready", Stage.INSTEAD, "503 while a model loads", {"retry_after": _HINT}, whole_server=True),
    Mode("overloaded", Stage.INSTEAD, "503 (TGI: 429) because of too much work", _HINTED),
    Mode("rate_limit", Stage.INSTEAD, "429 rate limit", _HINTED),
    Mode("quota", Stage.INSTEAD, "insufficient quota", {"status": Param(choice(429, 402), 429)}),
    Mode("unauthorized", Stage.INSTEAD, "401 whatever key was sent"),
    Mode("forbidden", Stage.INSTEAD, "403"),
    Mode("model_not_found", Stage.INSTEAD, "404 for the request's model"),
    Mode("content_filter", Stage.INSTEAD, "400 of a content filter"),
    Mode("context_length", Stage.INSTEAD, "the prompt is too long, whatever its length"),
    Mode(
        "raw",
        Stage.INSTEAD,
        "exactly this status, body and headers",
        {
            "status": Param(integer(200, 999), 200),
            "body": Param(text, ""),
            "content_type": Param(text, "application/json"),
            "headers": Param(headers, {}),
        },
    ),
    Mode("hang", Stage.INSTEAD, "never answers; closes after hang_s", {"hang_s": _SECONDS}, whole_server=True),
    Mode("reset", Stage.INSTEAD, "TCP reset instead of an answer", whole_server=True),
    Mode("close", Stage.INSTEAD, "connection closed without an answer", whole_server=True),
    Mode("empty_200", Stage.INSTEAD, "200 with no body at all"),
    Mode(
        "truncated_json",
        Stage.ALTER,
        "Content-Length is right, the body stops early",
        {"after_bytes": _SIZE},
        unary_only=True,
    ),
    Mode("half_json", Stage.ALTER, "a whole HTTP answer with half its JSON", {"after_bytes": _SIZE}, unary_only=True),
    Mode("nan_json", Stage.ALTER, "JSON with NaN and Infinity in it", unary_only=True),
    Mode("json_array", Stage.ALTER, "the body as the one element of an array", unary_only=True),
    Mode("bad_gzip", Stage.ALTER, "says gzip and is not", unary_only=True),
    Mode(
        "oversize",
        Stage.ALTER,
        "the body padded to at least this many bytes",
        {"bytes": Param(integer(1, _MAX_OVERSIZE_BYTES), 11_000_000)},
    ),
    Mode("empty_choices", Stage.ALTER, "no choices, no data, no output"),
    Mode(
        "abort",
        Stage.ALTER,
        "every choice has this finish_reason",
        {"finish_reason": Param(text, "abort")},
    ),
    Mode("say", Stage.ALTER, "answers exactly this text", {"text": Param(text, "")}),
    Mode("slow_first_byte", Stage.ALTER, "waits before the head", {"delay_s": Param(parse_duration, 10.0)}),
    Mode("slow_body", Stage.ALTER, "waits between head and body", {"delay_s": Param(parse_duration, 10.0)}),
    Mode("stream", Stage.STREAM, "breaks or bends streams", _STREAM_PARAMS),
    Mode(
        "refuse",
        Stage.LISTENER,
        "closes the listening socket: connections are refused",
        {"connections": Param(choice("drop", "keep"), "drop")},
    ),
)
MODES: Mapping[str, Mode] = {row.name: row for row in _ROWS}
