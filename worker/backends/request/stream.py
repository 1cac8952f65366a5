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
from enum import IntEnum

from worker.backends.streams.accumulator import Accumulator
from worker.backends.streams.reading import accumulator_for
from worker.settings.schema import StreamMode
from worker.wire.body import RequestBody
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
)
"""Keys of a request whose answer some servers stream with other content than they answer as a whole; for `auto`.

Source: https://github.com/vllm-project/vllm/issues/18108, 21301, 19056 and 11392 for tool calls."""

_TRUE = b"true"
_ALONE = b'{"include_usage":true}'
_LIST_OF_PROMPTS = re.compile(rb'\[\s*["\[]')
"""Texts or lists of tokens; one list of tokens is one prompt."""


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
    """Of the attempt that this one goes on from; `None` when it starts anew."""


def wanted_form(mode: StreamMode, endpoint: Endpoint, body: RequestBody) -> Form:
    """
    Return the form in which a request is to be sent, before what the server is known to refuse.

    Args:
        mode: The route's setting.
        endpoint: Of the request's path.
        body: Of the request.
    """
    if mode == "never" or not endpoint.is_streamable or not body.is_object:
        return Form.UNARY
    is_wanted = body.asks_for_stream if mode == "as_requested" else not any(map(body.is_set, UNARY_FEATURES))
    if is_wanted and mode == "auto":
        # With several choices a server that ignores `n` looks like a stream that broke.
        is_wanted = choices_of(endpoint, body) == 1 and not any(map(body.is_set, DIFFERENT_IN_STREAMS))
    if not is_wanted:
        return Form.UNARY
    return Form.STREAM_WITH_USAGE if endpoint.counts_on_request else Form.STREAM


def choices_of(endpoint: Endpoint, body: RequestBody) -> int:
    """
    Return how many choices a whole answer has: `n`, times the prompts of completions; 1 where that makes no sense.

    Source: https://platform.openai.com/docs/api-reference/completions/create; a prompt is a text or a list of tokens.
    """
    if endpoint is RESPONSES:
        return 1
    n = body.value("n") if "n" in body.fields else 1
    n = n if type(n) is int and n > 0 else 1
    if endpoint is not COMPLETIONS or _LIST_OF_PROMPTS.match(body.raw("prompt")) is None:
        return n
    prompts = body.value("prompt")
    return n * len(prompts) if isinstance(prompts, list) else n


def form_changes(form: Form, endpoint: Endpoint, body: RequestBody) -> dict[str, bytes | None]:
    """Return the keys to set and to remove so that a body asks for the form; empty when it does already."""
    asks = body.asks_for_stream
    if form is Form.UNARY:
        return {"stream": None, "stream_options": None} if asks else {}
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
    """Return what makes the accumulator of a request; usage is left out if the request itself streams without it."""

    def make() -> Accumulator | None:
        keep_usage = not body.asks_for_stream or _includes_usage(body)
        return accumulator_for(endpoint, choices=choices_of(endpoint, body), keep_usage=keep_usage, prefix=prefix)

    return make


def _options(body: RequestBody) -> RequestBody:
    return RequestBody(body.raw("stream_options"))


def _includes_usage(body: RequestBody) -> bool:
    return _options(body).raw("include_usage") == _TRUE


def _with_usage(body: RequestBody) -> bytes:
    options = _options(body)
    return options.with_changes({"include_usage": _TRUE}) if options.is_object else _ALONE
