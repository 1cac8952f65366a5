"""
What the server can do wrong: the modes, the behaviour that sets one for some requests, and its effect on an answer.

Pure: the clock is an argument, chance comes from the seed.  `control` reads behaviours with the table `MODES` and
chooses among them.  `instead` is the answer of a mode that never looks at the request, `alter` damages a good answer,
`stream_fault` says how a stream breaks; the data plane does it on a socket.  `docs/simbackend.md` lists every row of
`MODES`; a test compares them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Any, Literal

from worker.emulators.openai.dialects import Answer, Kind, SimError, error_answer
from worker.emulators.openai.options import Reader, choice, flag, headers, integer, optional, text, texts
from worker.emulators.openai.sagemaker import ERRORS, FrameBreak, FrameFault
from worker.emulators.openai.sagemaker import error_answer as service_error
from worker.emulators.openai.seeded import Draws
from worker.emulators.openai.sse import LINE_ENDINGS, PLAIN, Break, StreamFault
from worker.emulators.openai.timing import RetryAfter, parse_duration, parse_retry_after


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
    FRAMES = "frames"
    """The same, for answers in the frames of SageMaker's `InvokeEndpointWithResponseStream` only."""
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

_FRAME_PARAMS: Mapping[str, Param] = {
    "break": Param(choice(*(kind.value for kind in FrameBreak)), "none"),
    "after_bytes": _SIZE,
    "error_code": Param(text, "ModelInvocationTimeExceeded"),
    "message": Param(text, "The simulated service broke the stream."),
    "part_bytes": Param(optional(integer(1))),
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
    Mode("stream", Stage.STREAM, "breaks or distorts streams", _STREAM_PARAMS),
    Mode(
        "sagemaker_error",
        Stage.INSTEAD,
        "an error of SageMaker itself",
        {
            "error": Param(choice(*ERRORS), "ServiceUnavailable"),
            "message": _MESSAGE,
            "original_status": Param(optional(integer(0, 599)), None),
            "original_message": _MESSAGE,
        },
    ),
    Mode("frames", Stage.FRAMES, "breaks SageMaker's event stream", _FRAME_PARAMS),
    Mode(
        "refuse",
        Stage.LISTENER,
        "closes the listening socket: connections are refused",
        {"connections": Param(choice("drop", "keep"), "drop")},
    ),
)
MODES: Mapping[str, Mode] = {row.name: row for row in _ROWS}


@dataclass(frozen=True, slots=True)
class Facts:
    """What a filter can see of a request."""

    path: str
    model: str | None
    stream: bool
    headers: Mapping[str, str]
    """Case-insensitive names."""
    data: bytes
    """The body as it came."""
    metadata: Mapping[str, Any]
    """The body's own `metadata` object; empty when there is none."""
    is_inference: bool
    framed: bool = False
    """The answer comes in frames."""


@dataclass(frozen=True, slots=True)
class Match:
    """Filters, all of which must hold; None does not filter."""

    path: str | None = None
    """Shell pattern, for example `/v1/chat/*`."""
    model: str | None = None
    """Shell pattern."""
    stream: bool | None = None
    header: Mapping[str, str] | None = None
    """Header names and a text each value must contain."""
    metadata: Mapping[str, str] | None = None
    """Keys of the body's `metadata` and a text each value must contain."""
    body: str | None = None
    """A text the body must contain, compared as UTF-8 bytes."""

    def holds(self, facts: Facts) -> bool:
        """Return whether the request passes every filter."""
        return (
            (self.path is None or fnmatchcase(facts.path, self.path))
            and (self.model is None or (facts.model is not None and fnmatchcase(facts.model, self.model)))
            and (self.stream is None or facts.stream is self.stream)
            and (self.body is None or self.body.encode() in facts.data)
            and all(part in facts.headers.get(name, "\0") for name, part in (self.header or {}).items())
            and all(part in str(facts.metadata.get(key, "\0")) for key, part in (self.metadata or {}).items())
        )


MATCH_READERS: Mapping[str, Reader] = {
    "path": text,
    "model": text,
    "stream": flag,
    "header": texts,
    "metadata": texts,
    "body": text,
}


@dataclass(slots=True)
class Behaviour:
    """One thing to do wrong; the counters are the only parts that change."""

    mode: Mode
    params: Mapping[str, Any]
    name: str
    match: Match = field(default_factory=Match)
    count: int | None = None
    """Requests it hits before it is spent; None is no limit."""
    skip: int = 0
    """Matching requests it lets pass first."""
    probability: float = 1.0
    """Share of the remaining matching requests that it hits."""
    for_s: float | None = None
    """Seconds it lasts; None is until it is removed."""
    after_s: float = 0.0
    """Seconds before it begins."""
    since_s: float = 0.0
    """Clock reading when it was set."""
    seen: int = 0
    """Matching requests while it was active."""
    hits: int = 0

    def state(self, now_s: float) -> str:
        """Return `pending`, `active` or `spent`."""
        begins_s = self.since_s + self.after_s
        if now_s < begins_s:
            return "pending"
        over = self.for_s is not None and now_s >= begins_s + self.for_s
        return "spent" if over or (self.count is not None and self.hits >= self.count) else "active"

    def takes(self, facts: Facts, now_s: float, seed: int) -> bool:
        """Return whether it hits this request; a match is counted."""
        wrong_form = facts.stream if self.mode.unary_only else self.mode.stage is Stage.STREAM and not facts.stream
        wrong_form = wrong_form or (self.mode.stage is Stage.FRAMES and not facts.framed)
        in_scope = facts.is_inference or self.mode.whole_server or self.match.path is not None
        if self.state(now_s) != "active" or not in_scope or wrong_form:
            return False
        if not self.match.holds(facts):
            return False
        self.seen += 1
        if self.seen <= self.skip:
            return False
        if self.probability < 1 and Draws(seed, self.name, self.seen).uniform("hit") >= self.probability:
            return False
        self.hits += 1
        return True

    def as_json(self, now_s: float) -> dict[str, Any]:
        """Return it as it was set, with what became of it."""
        given = {key: value for key in MATCH_READERS if (value := getattr(self.match, key)) is not None}
        limits = {"count": self.count, "skip": self.skip, "probability": self.probability}
        times = {"for_s": self.for_s, "after_s": self.after_s}
        outcome = {"state": self.state(now_s), "seen": self.seen, "hits": self.hits}
        params = {key: value if _is_json(value) else str(value) for key, value in self.params.items()}
        return {"mode": self.mode.name, "name": self.name, **params, "match": given, **limits, **times, **outcome}


def _is_json(value: object) -> bool:
    return value is None or isinstance(value, str | int | float | bool | dict)


_PAGE = (
    "<html>\r\n<head><title>{status} {reason}</title></head>\r\n<body>\r\n<center><h1>{status} {reason}</h1></center>"
    "\r\n<hr><center>nginx</center>\r\n</body>\r\n</html>\r\n"
)
"""The shape of nginx's built-in error page."""
_REASON_PHRASES = {502: "Bad Gateway", 503: "Service Temporarily Unavailable", 504: "Gateway Time-out"}
_AUTO_WAIT_S = 1.0
"""What `auto` means for an error that is not caused by a limit: there is no real wait to tell."""


@dataclass(frozen=True, slots=True)
class Drop:
    """No answer: the connection ends."""

    how: Literal["reset", "closed"]


@dataclass(frozen=True, slots=True)
class Hang:
    """No answer for `seconds` (None: for as long as the client waits), then the connection closes."""

    seconds: float | None


@dataclass(frozen=True, slots=True)
class ServiceError:
    """An answer of the service in front of the server: it is sent as it is."""

    answer: Answer


@dataclass(frozen=True, slots=True)
class SendPlan:
    """An answer and how much of it is sent: with `sent` below its length the connection closes early."""

    answer: Answer
    sent: int | None = None
    """Bytes of the body; None is all."""
    body_delay_s: float = 0.0
    """Seconds between head and body."""


_KINDS = {
    "outage_5xx": Kind.SERVER_ERROR,
    "not_ready": Kind.NOT_READY,
    "overloaded": Kind.OVERLOADED,
    "rate_limit": Kind.RATE_LIMIT,
    "quota": Kind.QUOTA,
    "unauthorized": Kind.UNAUTHORIZED,
    "forbidden": Kind.FORBIDDEN,
    "model_not_found": Kind.MODEL_NOT_FOUND,
    "content_filter": Kind.CONTENT_FILTER,
    "context_length": Kind.CONTEXT_LENGTH,
}


def retry_after_header(retry_after: RetryAfter | None, wait_s: float, now_s: float) -> dict[str, str]:
    """Return the header of a hint, none without one; `wait_s` is the real wait, `now_s` Unix seconds."""
    return {} if retry_after is None else retry_after.headers(wait_s, now_s)


def replacement(  # noqa: PLR0911 - one return per mode
    behaviour: Behaviour, dialect: str, *, path: str, streamed: bool, model: str | None, window: int, now_s: float
) -> Answer | Drop | Hang | ServiceError:
    """
    Return what an `instead` mode does to a request.

    Args:
        behaviour: The behaviour that hit.
        dialect: How errors are written.
        path: The request's path.
        streamed: Whether it asked for a stream.
        model: Its model, for texts.
        window: The context window, for texts.
        now_s: Unix seconds, which HTTP dates count from.
    """
    params = behaviour.params
    match behaviour.mode.name:
        case "html_502":
            status = params["status"]
            page = _PAGE.format(status=status, reason=_REASON_PHRASES.get(status, "Error"))
            return Answer(status, page.encode(), "text/html")
        case "empty_200":
            return Answer(200, b"")
        case "raw":
            return Answer(params["status"], params["body"].encode(), params["content_type"], params["headers"])
        case "hang":
            return Hang(params["hang_s"])
        case "sagemaker_error":
            return _service_error(params)
        case "reset":
            return Drop("reset")
        case "close":
            return Drop("closed")
    error = SimError(
        _KINDS[behaviour.mode.name],
        params.get("message"),
        status=params.get("status"),
        headers=retry_after_header(params.get("retry_after"), _AUTO_WAIT_S, now_s),
        model=model,
        window=window,
        tokens=window + 1,
    )
    return error_answer(dialect, error, path=path, streamed=streamed)


def _service_error(params: Mapping[str, Any]) -> ServiceError:
    status, message = ERRORS[params["error"]]
    fields = {"Message": params["message"] or message}
    if params["error"] == "ModelError":
        original = params["original_message"]
        given = params["original_status"]
        fields |= {
            "OriginalStatusCode": 500 if given is None else given,
            "OriginalMessage": "oops" if original is None else original,
        }
    return ServiceError(service_error(params["error"], status, fields))


def altered_body(behaviour: Behaviour | None, body: dict[str, Any]) -> dict[str, Any]:
    """Return a unary body, or the JSON of a chunk, as the mode wants it before it is encoded."""
    if behaviour is None:
        return body
    match behaviour.mode.name:
        case "empty_choices":
            return {key: [] if key in {"choices", "data", "output"} else value for key, value in body.items()}
        case "oversize" if not body.keys() & {"choices", "output"}:
            return {**body, "padding": "x" * behaviour.params["bytes"]}
    return body


def send_plan(behaviour: Behaviour | None, answer: Answer) -> SendPlan:  # noqa: PLR0911 - one return per mode
    """Return how a good answer is sent."""
    if behaviour is None:
        return SendPlan(answer)
    params: Mapping[str, Any] = behaviour.params
    body = answer.body
    cut = params.get("after_bytes")
    part = len(body) // 2 if cut is None else min(cut, len(body))
    match behaviour.mode.name:
        case "truncated_json":
            return SendPlan(answer, sent=min(part, len(body) - 1))
        case "half_json":
            return SendPlan(Answer(answer.status, body[:part], answer.content_type))
        case "nan_json":
            return SendPlan(Answer(answer.status, b'{"score":NaN,"limit":-Infinity,' + body[1:], answer.content_type))
        case "json_array":
            return SendPlan(Answer(answer.status, b"[" + body + b"]", answer.content_type))
        case "bad_gzip":
            coded = {"Content-Encoding": "gzip"}
            return SendPlan(Answer(answer.status, b"\x1f\x8b\x08" + body, answer.content_type, coded))
        case "slow_body":
            return SendPlan(answer, body_delay_s=params["delay_s"])
    return SendPlan(answer)


def forced_text(behaviour: Behaviour | None) -> str | None:
    """Return the text that a mode makes the model say."""
    if behaviour is None:
        return None
    match behaviour.mode.name:
        case "say":
            return str(behaviour.params["text"])
        case "oversize":
            return "x" * int(behaviour.params["bytes"])
    return None


def stream_fault(behaviour: Behaviour | None) -> StreamFault:
    """Return how a stream is to be broken."""
    if behaviour is None or behaviour.mode.stage is not Stage.STREAM:
        return PLAIN
    params = dict(behaviour.params)
    return StreamFault(break_=Break(params.pop("break")), **{**params, "error": Kind(params["error"])})


def frame_fault(behaviour: Behaviour | None) -> FrameFault:
    """Return how the frames around an answer are to be broken."""
    if behaviour is None or behaviour.mode.stage is not Stage.FRAMES:
        return FrameFault()
    params = dict(behaviour.params)
    return FrameFault(break_=FrameBreak(params.pop("break")), **params)
