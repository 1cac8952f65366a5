"""
What a behaviour makes of a request: the answer, or the lack of one.

Pure.  `instead` serves the modes that never look at the request, `alter` those that spoil a good answer, `stream_fault`
those that break a stream; carrying it out on a socket is the data plane's work.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from worker.emulators.openai.behaviours import Behaviour
from worker.emulators.openai.error_shapes import Answer, Kind, SimError, error_answer
from worker.emulators.openai.modes import Stage
from worker.emulators.openai.retry_after import RetryAfter
from worker.emulators.openai.sse import PLAIN, Break, StreamFault

_PAGE = (
    "<html>\r\n<head><title>{status} {reason}</title></head>\r\n<body>\r\n<center><h1>{status} {reason}</h1></center>"
    "\r\n<hr><center>nginx</center>\r\n</body>\r\n</html>\r\n"
)
"""The shape of nginx's built-in error page."""
_REASONS = {502: "Bad Gateway", 503: "Service Temporarily Unavailable", 504: "Gateway Time-out"}
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
class Delivery:
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


def hint(retry_after: RetryAfter | None, wait_s: float, now_s: float) -> dict[str, str]:
    """Return the header of a hint, none without one; `wait_s` is the real wait, `now_s` Unix seconds."""
    return {} if retry_after is None else retry_after.headers(wait_s, now_s)


def instead(  # noqa: PLR0911 - one return per mode
    behaviour: Behaviour, dialect: str, *, path: str, streamed: bool, model: str | None, window: int, now_s: float
) -> Answer | Drop | Hang:
    """
    Return what an `instead` mode does to a request.

    Args:
        behaviour: The behaviour that hit.
        dialect: How errors are spelled.
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
            page = _PAGE.format(status=status, reason=_REASONS.get(status, "Error"))
            return Answer(status, page.encode(), "text/html")
        case "empty_200":
            return Answer(200, b"")
        case "raw":
            return Answer(params["status"], params["body"].encode(), params["content_type"], params["headers"])
        case "hang":
            return Hang(params["hang_s"])
        case "reset":
            return Drop("reset")
        case "close":
            return Drop("closed")
    error = SimError(
        _KINDS[behaviour.mode.name],
        params.get("message"),
        status=params.get("status"),
        headers=hint(params.get("retry_after"), _AUTO_WAIT_S, now_s),
        model=model,
        window=window,
        tokens=window + 1,
    )
    return error_answer(dialect, error, path=path, streamed=streamed)


def alter_body(behaviour: Behaviour | None, body: dict[str, Any]) -> dict[str, Any]:
    """Return a unary body, or the JSON of a chunk, as the mode wants it before it is encoded."""
    if behaviour is None:
        return body
    match behaviour.mode.name:
        case "empty_choices":
            return {key: [] if key in {"choices", "data", "output"} else value for key, value in body.items()}
        case "oversize" if body.get("object") == "list":
            return {**body, "padding": "x" * behaviour.params["bytes"]}
    return body


def alter(behaviour: Behaviour | None, answer: Answer) -> Delivery:  # noqa: PLR0911 - one return per mode
    """Return how a good answer is sent."""
    if behaviour is None:
        return Delivery(answer)
    params: Mapping[str, Any] = behaviour.params
    body = answer.body
    cut = params.get("after_bytes")
    part = len(body) // 2 if cut is None else min(cut, len(body))
    match behaviour.mode.name:
        case "truncated_json":
            return Delivery(answer, sent=min(part, len(body) - 1))
        case "half_json":
            return Delivery(Answer(answer.status, body[:part], answer.content_type))
        case "nan_json":
            return Delivery(Answer(answer.status, b'{"score":NaN,"limit":-Infinity,' + body[1:], answer.content_type))
        case "json_array":
            return Delivery(Answer(answer.status, b"[" + body + b"]", answer.content_type))
        case "bad_gzip":
            coded = {"Content-Encoding": "gzip"}
            return Delivery(Answer(answer.status, b"\x1f\x8b\x08" + body, answer.content_type, coded))
        case "slow_body":
            return Delivery(answer, body_delay_s=params["delay_s"])
    return Delivery(answer)


def said(behaviour: Behaviour | None) -> str | None:
    """Return the text a mode puts into the model's mouth."""
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
