"""
Whether a request is sent as a stream, and in which form: the decision before an attempt.

Pure.  By default a request is streamed if its body asks for a stream; every other body reaches the backend byte for
byte.  An operator who wants to notice hangs and to measure first tokens chooses `auto`, which leaves out what servers
refuse to stream (`UNARY_FEATURES`) and what their streams answer in another way (`DIFFERENT_IN_STREAMS`).  What the
requester gets is one JSON answer in any case.  ADR 0012 has the reasons.
"""

import re
from collections.abc import Callable, Mapping
from enum import IntEnum

import msgspec

from worker.backends.streams.accumulator import Accumulator
from worker.backends.streams.reading import accumulator_for
from worker.ports import AttemptResult
from worker.settings.schema import StreamMode
from worker.wire.body import NOT_GIVEN, RequestBody
from worker.wire.endpoints import COMPLETIONS, RESPONSES, Endpoint

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
    "stop",  # LiteLLM: which of them ended the text is lost
    "stop_token_ids",
)
"""Keys of a request whose answer some servers stream with other content than they answer as a whole; for `auto`.

Source: https://github.com/vllm-project/vllm/issues/18108, 21301, 19056 and 11392 for tool calls."""

_TRUE = b"true"
_BOOLEANS = frozenset({b"true", b"false", *NOT_GIVEN})
_ALONE = b'{"include_usage":true}'
_GIVEN_IF_ZERO = frozenset({"logprobs", "top_logprobs"})
"""`"logprobs": 0` asks a completion for the log probability of each token and of no other."""
_COUNT = re.compile(rb"[1-9][0-9]{0,8}")
_LIST_OF_PROMPTS = re.compile(rb'\[\s*["\[]')
"""Texts or lists of tokens; one list of tokens is one prompt."""
_MAX_COMMAS = 100_000
"""Of prompts that are counted: to count more of them would take more time and memory than a stream is worth."""

_decode_list = msgspec.json.Decoder(list[msgspec.Raw]).decode


class Form(IntEnum):
    """How an answer is asked for; a server that refuses one is asked in the next lower."""

    UNARY = 0
    STREAM = 1
    STREAM_WITH_USAGE = 2
    """With `stream_options.include_usage`, without which most servers do not count the tokens of a stream."""


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """A request as it is sent."""

    body: bytes
    form: Form = Form.UNARY
    new_accumulator: Callable[[], Accumulator | None] = lambda: None
    """Makes what assembles the answer, should it come as a stream; returns `None` where nothing can."""
    salvaged_tokens: int | None = None
    """Of the attempt that this one goes on from; `None` when it starts anew."""


def wanted_form(mode: StreamMode, endpoint: Endpoint, body: RequestBody) -> Form:
    """
    Return the form in which a request is to be sent, before what the server is known to refuse.

    Args:
        mode: The route's setting.
        endpoint: Of the request's path.
        body: Of the request.
    """
    if mode == "never" or not endpoint.is_streamable:
        return Form.UNARY
    if mode == "as_requested":
        is_wanted = body.asks_for_stream
    else:
        is_wanted = body.is_object and not any(map(body.is_set, UNARY_FEATURES))
    if not is_wanted or is_for_the_server(body):
        return Form.UNARY
    choices = choices_of(endpoint, body)
    if mode == "auto":
        # With several choices a server that ignores `n` looks like a stream that broke.
        is_wanted = choices == 1 and not any(_is_asked(body, key) for key in DIFFERENT_IN_STREAMS)
    if not is_wanted or choices is None:
        return Form.UNARY
    return Form.STREAM_WITH_USAGE if endpoint.counts_on_request else Form.STREAM


def is_for_the_server(body: RequestBody) -> bool:
    """
    Whether a request asks for its stream in a way that servers refuse: they say so, if it reaches them as it is.

    A `stream` that is no boolean, `stream_options` that are no object, have an `include_usage` that is no boolean, or
    stand there without `"stream": true`.
    """
    if body.raw("stream") not in _BOOLEANS:
        return True
    options = body.raw("stream_options")
    if options in NOT_GIVEN:
        return False
    options_body = RequestBody(options)
    return not body.asks_for_stream or not options_body.is_object or options_body.raw("include_usage") not in _BOOLEANS


def choices_of(endpoint: Endpoint, body: RequestBody) -> int | None:
    """
    Return how many choices a whole answer has: `n`, times the prompts of completions; 1 where that makes no sense.

    `None` if there are too many prompts to count them.

    Source: https://platform.openai.com/docs/api-reference/completions/create; a prompt is a text or a list of tokens.
    """
    if endpoint is RESPONSES:
        return 1
    raw_n = body.raw("n")
    n = int(raw_n) if _COUNT.fullmatch(raw_n) else 1
    prompts = body.raw("prompt") if endpoint is COMPLETIONS else b""
    if _LIST_OF_PROMPTS.match(prompts) is None:
        return n
    return None if prompts.count(b",") > _MAX_COMMAS else n * len(_decode_list(prompts))


def lacks_something(endpoint: Endpoint, body: RequestBody, form: Form, result: AttemptResult) -> bool:
    """
    Whether a whole streamed answer lacks the usage or the log probabilities that a whole one would have.

    Args:
        endpoint: Of the request's path.
        body: As the requester wrote it.
        form: In which it was sent.
        result: With the answer.
    """
    wants_usage = form is Form.STREAM_WITH_USAGE and (not body.asks_for_stream or _includes_usage(body))
    if wants_usage and result.stream_usage is None:
        return True
    if not endpoint.counts_on_request or not _is_asked(body, "logprobs"):
        return False
    return any(bytes(choice.logprobs) == b"null" for choice in _decode_answer(result.body).choices)


def form_changes(form: Form, endpoint: Endpoint, body: RequestBody) -> dict[str, bytes | None]:
    """Return the keys to set and to remove so that a body asks for the form; empty when it does already."""
    asks = body.asks_for_stream
    if form is Form.UNARY:
        return {"stream": None, "stream_options": None} if asks and not is_for_the_server(body) else {}
    changes: dict[str, bytes | None] = {} if asks else {"stream": _TRUE}
    if form is Form.STREAM_WITH_USAGE:
        if not _includes_usage(body):
            changes["stream_options"] = _with_usage(body)
    elif endpoint.counts_on_request:  # elsewhere the options are about other things than usage
        changes["stream_options"] = None
    return changes


def build_call(endpoint: Endpoint, body: RequestBody, form: Form) -> Call:
    """Return the call for a request that starts anew."""
    changes = form_changes(form, endpoint, body)
    return Call(body=body.with_changes(changes), form=form, new_accumulator=accumulator_maker(endpoint, body))


def accumulator_maker(
    endpoint: Endpoint, body: RequestBody, prefix: Mapping[int, str] | None = None
) -> Callable[[], Accumulator | None]:
    """Return what makes the accumulator of a request."""

    def make() -> Accumulator | None:
        return accumulator_for(endpoint, choices=choices_of(endpoint, body) or 1, prefix=prefix)

    return make


def _is_asked(body: RequestBody, key: str) -> bool:
    return body.is_set(key) or (key in _GIVEN_IF_ZERO and body.raw(key) == b"0")


class _Choice(msgspec.Struct):
    logprobs: msgspec.Raw = msgspec.Raw(b"null")


class _Answer(msgspec.Struct):
    choices: list[_Choice] = []


_decode_answer = msgspec.json.Decoder(_Answer).decode


def _options(body: RequestBody) -> RequestBody:
    return RequestBody(body.raw("stream_options"))


def _includes_usage(body: RequestBody) -> bool:
    return _options(body).raw("include_usage") == _TRUE


def _with_usage(body: RequestBody) -> bytes:
    options = _options(body)
    return options.with_changes({"include_usage": _TRUE}) if options.is_object else _ALONE
