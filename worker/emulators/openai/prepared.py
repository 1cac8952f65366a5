"""
Answers that cost next to nothing: bytes made once, with the caller's request id put in.

For measuring whoever calls this server: requests are neither parsed nor validated, and every answer to a path is the
same.  Streams are not asked about: the answer is always the unary body.
"""

from collections.abc import Mapping

import msgspec

from worker.emulators.openai import wire
from worker.emulators.openai.answers import Identity, chat_body, completion_body, embedding_body
from worker.emulators.openai.dialects import DIALECTS
from worker.emulators.openai.dice import Dice
from worker.emulators.openai.generation import generate
from worker.emulators.openai.options import SimOptions
from worker.emulators.openai.responses import response_body
from worker.emulators.openai.validation import Call, Endpoint, check

_MARK = "\x01"
"""Stands for the request id while the bytes are made; JSON writes it as an escape that occurs nowhere else."""
_ESCAPED_MARK = msgspec.json.encode(_MARK)[1:-1]
_SAMPLES: Mapping[Endpoint, dict[str, object]] = {
    Endpoint.CHAT: {"messages": [{"role": "user", "content": "Say something."}]},
    Endpoint.COMPLETIONS: {"prompt": "Say something."},
    Endpoint.RESPONSES: {"input": "Say something."},
    Endpoint.EMBEDDINGS: {"input": "Say something.", "dimensions": 8},
}
_BODIES = {
    Endpoint.CHAT: chat_body,
    Endpoint.COMPLETIONS: completion_body,
    Endpoint.RESPONSES: response_body,
}


def body_of(call: Call, options: SimOptions, identity: Identity, dice: Dice) -> dict[str, object]:
    """Return the unary body of a call as nothing but its seed and itself make it."""
    if call.endpoint is Endpoint.EMBEDDINGS:
        return embedding_body(call, options.seed)
    return _BODIES[call.endpoint](call, generate(call, dice, options), DIALECTS[options.dialect], identity)


class Prepared:
    """The bytes of one path's answer."""

    def __init__(self, endpoint: Endpoint, options: SimOptions, created: int) -> None:
        """Make the answer once; `created` is Unix seconds."""
        call = check(endpoint, {"model": "simulated", **_SAMPLES[endpoint]}, options)
        body = msgspec.json.encode(body_of(call, options, Identity(_MARK, created), Dice(options.seed, endpoint)))
        self._parts = body.split(_ESCAPED_MARK)
        self._fixed = sum(map(len, self._parts))
        self._marks = len(self._parts) - 1

    def bytes_for(self, request_id: str) -> bytes:
        """Return the whole HTTP answer, head included, for a keep-alive connection."""
        shown = msgspec.json.encode(request_id)[1:-1]
        length = self._fixed + self._marks * len(shown)
        head = wire.head(200, "application/json", {"x-request-id": request_id}, length=length)
        return head + shown.join(self._parts)


def prepare(options: SimOptions, created: int) -> Mapping[str, Prepared]:
    """Return the prepared answers by path."""
    return {endpoint.value: Prepared(endpoint, options, created) for endpoint in Endpoint}
