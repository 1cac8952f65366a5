"""
Whether a request is sent as a stream, and in which form: the decision before an attempt.

Pure.  By default a request is streamed if its body asks for a stream; every other body reaches the backend byte for
byte.  An operator who wants to notice hangs and to measure first tokens chooses `auto`, which leaves out what servers
refuse to stream (`UNARY_FEATURES`) and what their streams answer in another way (`DIFFERENT_IN_STREAMS`).  What the
requester gets is one JSON answer in any case.  ADR 0012 has the reasons.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum, StrEnum

from worker.backends.request.body import Fields, is_set, raw, read_fields, value_of, with_changes
from worker.backends.streams.accumulate import Accumulator, accumulator_for, expected_choices
from worker.settings.schema import StreamMode

UNARY_FEATURES = (
    "audio",  # spoken answers: streamed they come in another format than asked for
    "background",  # Responses: answers at once that it is queued, a stream would wait for the end
    "best_of",  # OpenAI refuses to stream it: which one is best is known at the end
    "prompt_logprobs",  # vLLM refuses to stream them
    "use_beam_search",  # vLLM: likewise
    "kv_transfer_params",  # vLLM returns them in whole answers only
)
"""Keys of a request that servers refuse to stream, or for which streamed and whole answers are different things.

Source: https://platform.openai.com/docs/api-reference/completions/create (best_of),
https://platform.openai.com/docs/guides/background, https://github.com/vllm-project/vllm (entrypoints/openai)."""

DIFFERENT_IN_STREAMS = (
    "tools",  # streams have parsers of their own for tool calls: arguments cut, calls and text lost
    "functions",
    "tool_choice",
    "logprobs",  # lost in the streams of LiteLLM and llama-cpp-python
    "top_logprobs",
    "echo",  # vLLM: the log probabilities of the prompt are lost
)
"""Keys of a request whose answer some servers stream with other content than they answer as a whole; for `auto`.

Source: https://github.com/vllm-project/vllm/issues/18108, 21301, 19056 and 11392 for tool calls."""

_TRUE = b"true"
_ALONE = b'{"include_usage":true}'
_LIST_OF_PROMPTS = re.compile(rb'\[\s*["\[]')
"""Texts or lists of tokens; one list of tokens is one prompt."""


class Kind(StrEnum):
    """The APIs whose answers can be streamed."""

    CHAT = "chat/completions"
    COMPLETIONS = "completions"
    RESPONSES = "responses"


_ENDINGS = tuple(("/" + kind.value, kind) for kind in Kind)
"""Chat first: its name ends like that of completions."""


class Form(IntEnum):
    """How an answer is asked for; a server that refuses one is asked in the next lower."""

    UNARY = 0
    STREAM = 1
    STREAM_WITH_USAGE = 2
    """With `stream_options.include_usage`, without which most servers do not count the tokens of a stream."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A request as it is sent."""

    body: bytes
    form: Form = Form.UNARY
    new_accumulator: Callable[[], Accumulator | None] = lambda: None
    """Makes what assembles the answer, should it come as a stream; returns `None` where nothing can."""
    salvaged_tokens: int | None = None
    """Of the try that this one goes on from; `None` when it starts anew."""


def kind_of(path: str) -> Kind | None:
    """Return which streamable API a path belongs to, with any prefix and query; `None` for any other path."""
    path = path.partition("?")[0].rstrip("/")
    for ending, kind in _ENDINGS:
        if path.endswith(ending):
            return kind
    return None


def wanted_form(mode: StreamMode, kind: Kind | None, fields: Fields | None) -> Form:
    """
    Return the form in which a request is to be sent, before what the server is known to refuse.

    Args:
        mode: The route's setting.
        kind: Of the request's path.
        fields: The body's top level; `None` for what is no JSON object.
    """
    if kind is None or fields is None or mode == "never":
        return Form.UNARY
    if mode == "as_requested":
        is_wanted = raw(fields, "stream") == _TRUE
    else:
        is_wanted = not any(is_set(fields, key) for key in UNARY_FEATURES)
    if is_wanted and mode == "auto":
        # With several choices a server that ignores `n` looks like a stream that broke.
        is_wanted = choices_of(kind, fields) == 1 and not any(is_set(fields, key) for key in DIFFERENT_IN_STREAMS)
    if not is_wanted:
        return Form.UNARY
    return Form.STREAM if kind is Kind.RESPONSES else Form.STREAM_WITH_USAGE


def choices_of(kind: Kind, fields: Fields) -> int:
    """Return how many choices a whole answer has."""
    if kind is Kind.RESPONSES:
        return 1
    asked = {"n": value_of(fields, "n")} if "n" in fields else {}
    if kind is Kind.COMPLETIONS and _LIST_OF_PROMPTS.match(raw(fields, "prompt")):
        asked["prompt"] = value_of(fields, "prompt")
    return expected_choices("/" + kind, asked)


def form_changes(form: Form, kind: Kind | None, fields: Fields) -> dict[str, bytes | None]:
    """Return the keys to set and to remove so that a body asks for the form; empty when it does already."""
    asks = raw(fields, "stream") == _TRUE
    if form is Form.UNARY:
        return {"stream": None, "stream_options": None} if asks else {}
    changes: dict[str, bytes | None] = {} if asks else {"stream": _TRUE}
    if form is Form.STREAM_WITH_USAGE:
        if not _includes_usage(fields):
            changes["stream_options"] = _with_usage(fields)
    elif kind is not Kind.RESPONSES:  # there they are about other things than usage
        changes["stream_options"] = None
    return changes


def build_call(path: str, body: bytes, fields: Fields, form: Form) -> Call:
    """Return the call for a request that starts anew."""
    changes = form_changes(form, kind_of(path), fields)
    return Call(body=with_changes(body, fields, changes), form=form, new_accumulator=maker(path, fields))


def maker(path: str, fields: Fields, prefix: Mapping[int, str] | None = None) -> Callable[[], Accumulator | None]:
    """Return what makes the accumulator of a request; usage is left out if the request itself streams without it."""
    kind = kind_of(path)
    if kind is None:
        return lambda: None
    keep_usage = raw(fields, "stream") != _TRUE or _includes_usage(fields)
    choices = choices_of(kind, fields)
    return lambda: accumulator_for(path, choices=choices, keep_usage=keep_usage, prefix=prefix)


def _options(fields: Fields) -> Fields:
    return read_fields(raw(fields, "stream_options")) or {}


def _includes_usage(fields: Fields) -> bool:
    return raw(_options(fields), "include_usage") == _TRUE


def _with_usage(fields: Fields) -> bytes:
    options = raw(fields, "stream_options")
    return with_changes(options, _options(fields), {"include_usage": _TRUE}) if options.startswith(b"{") else _ALONE
