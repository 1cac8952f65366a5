"""
Random unstreamed answers, as the servers of several dialects give them, and what it means for two of them to be equal.

Everything is drawn from one `random.Random`, so a seed reproduces a case.
"""

import json
import random
from dataclasses import dataclass
from typing import Any

Body = dict[str, Any]

ALPHABET = [
    "a",
    "Z",
    " ",
    "\n",
    '"',
    "\\",
    "/",
    "{",
    "ü",
    "€",
    "😀",
    "\u2028",
    "\u0085",
    "\x0c",
    "\r\n",
    "data: ",
    "[DONE]",
]
CATEGORIES = ("hate", "self_harm", "sexual", "violence")


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """How one server writes a stream of choices."""

    role_in_every_delta: bool = False
    first_content: Any = ""  # of the role chunk; ... for none at all
    reasoning: str = "reasoning_content"
    has_refusals: bool = False
    tools: str = "indexed"  # indexed, repeated (id and name in each delta), no_index, index_0 (whole calls)
    finish: str = "own_chunk"  # own_chunk, with_last
    usage: str = "last"  # last (without choices), with_finish, everywhere, first, zeros_before
    null_usage: bool = False
    null_fields: bool = True  # logprobs and finish_reason are null rather than absent
    created_changes: bool = False
    empty_id: bool = False
    fingerprint: str = "everywhere"  # everywhere, last, none
    extras: tuple[str, ...] = ()  # of a choice: stop_reason, token_ids, matched_stop
    filters: str = ""  # "", default, async
    obfuscation: bool = False
    n_max: int = 3
    timings: bool = False


DIALECTS = {
    "openai": Dialect(has_refusals=True, null_usage=True, obfuscation=True),
    "azure": Dialect(has_refusals=True, null_usage=True, filters="default"),
    "azure_async": Dialect(first_content=..., null_usage=True, null_fields=False, filters="async", n_max=1),
    "vllm": Dialect(reasoning="reasoning", fingerprint="last", extras=("stop_reason", "token_ids")),
    "vllm_continuous_usage": Dialect(reasoning="reasoning", usage="everywhere", finish="with_last", fingerprint="none"),
    "sglang": Dialect(usage="last", extras=("matched_stop",), fingerprint="none"),
    "tgi": Dialect(
        role_in_every_delta=True, tools="repeated", finish="with_last", empty_id=True, created_changes=True, n_max=1
    ),
    "llamacpp": Dialect(first_content=None, usage="with_finish", timings=True, n_max=1),
    "ollama": Dialect(role_in_every_delta=True, reasoning="reasoning", tools="index_0", created_changes=True, n_max=1),
    "gateway": Dialect(tools="no_index", usage="first", null_fields=False, fingerprint="none"),
    "zeros": Dialect(usage="zeros_before", null_fields=False),
}
"""The dialects of the servers this worker is pointed at; the last two are oddities that several gateways share."""


def text(rng: random.Random, most: int = 12) -> str:
    """A random string, often with what breaks parsers in it."""
    return "".join(rng.choice(ALPHABET) for _ in range(rng.randint(0, most)))


def usage_of(rng: random.Random) -> Body:
    """A usage with details."""
    prompt, completion = rng.randint(1, 5000), rng.randint(1, 5000)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": rng.randint(0, prompt)},
        "completion_tokens_details": {"reasoning_tokens": rng.randint(0, completion)},
    }


def filter_results(rng: random.Random) -> Body:
    """Azure's verdict on one choice or prompt."""
    return {name: {"filtered": False, "severity": rng.choice(["safe", "low"])} for name in CATEGORIES}


def logprob(rng: random.Random) -> Body:
    """One token's entry in a chat choice's logprobs."""
    value = rng.choice([-0.0, 0.0, -1, -9999.0, 1e-300, rng.uniform(-20, 0)])
    token = {"token": text(rng, 2), "logprob": value, "bytes": [rng.randint(0, 255)]}
    return {**token, "top_logprobs": [dict(token) for _ in range(rng.randint(0, 2))]}


def random_chat_body(rng: random.Random, dialect: Dialect) -> Body:
    """An unstreamed chat completion of the dialect's server."""
    return {
        **_top(rng, dialect, "chat.completion"),
        "choices": [_chat_choice(rng, dialect, i) for i in _indexes(rng, dialect)],
    }


def random_completion_body(rng: random.Random, dialect: Dialect) -> Body:
    """An unstreamed (legacy) completion."""
    return {
        **_top(rng, dialect, "text_completion"),
        "choices": [_text_choice(rng, dialect, i) for i in _indexes(rng, dialect)],
    }


def _indexes(rng: random.Random, dialect: Dialect) -> range:
    return range(rng.randint(1, dialect.n_max))


def _top(rng: random.Random, dialect: Dialect, kind: str) -> Body:
    top: Body = {
        "id": "" if dialect.empty_id else f"cmpl-{rng.randrange(10**9)}",
        "object": kind,
        "created": rng.choice([1_700_000_000, 2**31, 2**70]),
        "model": rng.choice(["m", "org/model-ü"]),
        "usage": usage_of(rng),
    }
    if dialect.fingerprint != "none":
        top["system_fingerprint"] = f"fp_{rng.randrange(10**6)}"
    if dialect.filters:
        top["prompt_filter_results"] = [{"prompt_index": 0, "content_filter_results": filter_results(rng)}]
    if dialect.timings:
        top["timings"] = {"predicted_per_token_ms": rng.uniform(0, 50), "predicted_n": rng.randint(0, 99)}
    return top


def _choice(rng: random.Random, dialect: Dialect, index: int, finish_reason: str) -> Body:
    choice: Body = {"index": index, "finish_reason": finish_reason}
    if "stop_reason" in dialect.extras:
        choice["stop_reason"] = rng.choice([None, 128001, "</s>"])
    if "matched_stop" in dialect.extras:
        choice["matched_stop"] = rng.choice([None, 2, "END"])
    if "token_ids" in dialect.extras:
        choice["token_ids"] = [rng.randrange(10**5) for _ in range(rng.randint(0, 6))]
    if dialect.filters:
        choice["content_filter_results"] = filter_results(rng)
    return choice


def _chat_choice(rng: random.Random, dialect: Dialect, index: int) -> Body:
    kind = rng.choice(["content", "content", "tools", "refusal" if dialect.has_refusals else "content"])
    message: Body = {"role": "assistant", "content": None}
    if rng.random() < 0.3:
        message[dialect.reasoning] = text(rng) + "r"
    if kind == "tools":
        message["content"] = rng.choice([None, text(rng) + "."])
        message["tool_calls"] = [
            {
                "id": f"call_{index}_{i}",
                "type": "function",
                "function": {"name": f"f{rng.randint(0, 1)}", "arguments": json.dumps({"q": text(rng)})},
            }
            for i in range(rng.randint(1, 3))
        ]
    elif kind == "refusal":
        message["refusal"] = text(rng) + "no"
    else:
        message["content"] = text(rng, 30) + rng.choice(["", "."])
        if dialect.reasoning in message:
            message["content"] += "."
    choice = _choice(rng, dialect, index, "tool_calls" if kind == "tools" else rng.choice(["stop", "length"]))
    if kind in ("content", "refusal") and rng.random() < 0.4:
        choice["logprobs"] = {kind: [logprob(rng) for _ in range(rng.randint(1, 6))]}
    return {**choice, "message": message}


def _text_choice(rng: random.Random, dialect: Dialect, index: int) -> Body:
    choice = _choice(rng, dialect, index, rng.choice(["stop", "length"]))
    if rng.random() < 0.4:
        tokens = [text(rng, 2) for _ in range(rng.randint(1, 6))]
        choice["logprobs"] = {
            "tokens": tokens,
            "token_logprobs": [rng.uniform(-9, 0) for _ in tokens],
            "top_logprobs": [rng.choice([None, {token: -0.5}]) for token in tokens],
            "text_offset": list(range(len(tokens))),
        }
    return {**choice, "text": text(rng, 30)}


def random_responses_body(rng: random.Random) -> Body:
    """An unstreamed answer of the Responses API."""
    items = [rng.choice([_message, _reasoning, _function_call])(rng, i) for i in range(rng.randint(1, 4))]
    is_whole = rng.random() < 0.8
    usage = {"input_tokens": rng.randint(1, 99), "output_tokens": rng.randint(1, 99), "total_tokens": 100}
    return {
        "id": f"resp_{rng.randrange(10**9)}",
        "object": "response",
        "created_at": rng.choice([1_700_000_000, 2**70]),
        "status": "completed" if is_whole else "incomplete",
        "error": None,
        "incomplete_details": None if is_whole else {"reason": "max_output_tokens"},
        "model": "m",
        "output": items,
        "temperature": rng.uniform(0, 2),
        "usage": {**usage, "output_tokens_details": {"reasoning_tokens": rng.randint(0, 9)}},
    }


def _message(rng: random.Random, index: int) -> Body:
    kinds = [rng.choice([("output_text", "text"), ("refusal", "refusal")]) for _ in range(rng.randint(1, 2))]
    content = [{"type": kind, field: text(rng) + "."} for kind, field in kinds]
    return {"id": f"msg_{index}", "type": "message", "role": "assistant", "status": "completed", "content": content}


def _reasoning(rng: random.Random, index: int) -> Body:
    return {"id": f"rs_{index}", "type": "reasoning", "summary": [{"type": "summary_text", "text": text(rng) + "."}]}


def _function_call(rng: random.Random, index: int) -> Body:
    call = {
        "id": f"fc_{index}",
        "type": "function_call",
        "call_id": f"call_{index}",
        "name": "f",
        "status": "completed",
    }
    return {**call, "arguments": json.dumps({"q": text(rng)})}


def canon(value: Any, key: str = "") -> Any:
    """
    What is compared: the value without nulls, empty lists, and what differs between two answers to one request.

    An empty `content` beside tool calls, and the tool calls' `index` (Ollama's unstreamed ones have it), are nothing, too.
    """
    if isinstance(value, dict):
        value = {
            name: canon(item, name) for name, item in value.items() if name not in ("id", "created", "metrics") or key
        }
        if value.get("tool_calls") and value.get("content") == "":
            value["content"] = None
        return {name: item for name, item in value.items() if item is not None and item != []}
    if isinstance(value, list):
        items = [canon(item, key) for item in value]
        return [{k: v for k, v in item.items() if k != "index"} for item in items] if key == "tool_calls" else items
    return value
