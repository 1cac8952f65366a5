"""
Turns an unstreamed answer into the stream that a server of a given dialect would have sent for it.

The other half of every round trip: `body -> stream_of(body) -> accumulate -> body`.  Written from the servers' sources and
documents, not from the accumulator: it shares no code with it.
"""

import json
import random
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from tests.support.random_bodies import Body, Dialect


def pieces_of(rng: random.Random, value: str) -> list[str]:
    """The string in random pieces, empty ones among them; of an empty string, none."""
    pieces = []
    while value:
        size = rng.randint(0, 4)
        pieces.append(value[:size])
        value = value[size:]
    return pieces


def interleaved(rng: random.Random, sequences: list[list[Any]]) -> Iterator[Any]:
    """Items of all sequences, each sequence in its order."""
    waiting = [list(reversed(sequence)) for sequence in sequences if sequence]
    while waiting:
        sequence = rng.choice(waiting)
        yield sequence.pop()
        waiting = [each for each in waiting if each]


def chunks_of(body: Body, dialect: Dialect, rng: random.Random) -> list[Body]:
    """The chunks of a chat completion or completion, in the order a server might send them."""
    is_chat = body["object"] == "chat.completion"
    parts = _chat_parts if is_chat else _text_parts
    sequences = [_with_fields(choice, parts(choice, dialect, rng), dialect, rng) for choice in body["choices"]]
    kind = "chat.completion.chunk" if is_chat else "text_completion"
    chunks = [_chunk(body, dialect, rng, kind, [part]) for part in interleaved(rng, sequences)]
    _place_usage(body, chunks, dialect, rng, kind)
    _place_fingerprint(body, chunks, dialect)
    return _with_annotations(body, chunks, dialect, rng)


def _chunk(body: Body, dialect: Dialect, rng: random.Random, kind: str, parts: list[Body]) -> Body:
    chunk: Body = {
        "id": body["id"],
        "object": kind,
        "created": body["created"],
        "model": body["model"],
        "choices": parts,
    }
    if dialect.created_changes:
        chunk["created"] += rng.randint(0, 2)
    if dialect.obfuscation:
        chunk["obfuscation"] = "x" * rng.randint(0, 9)
    if dialect.null_usage:
        chunk["usage"] = None
    return chunk


def _chat_parts(choice: Body, dialect: Dialect, rng: random.Random) -> list[Body]:
    message = choice["message"]
    parts: list[Body] = [{"delta": {"role": "assistant"}}]
    if dialect.first_content is not ...:
        parts[0]["delta"]["content"] = dialect.first_content
    for key in (dialect.reasoning, "refusal", "content"):
        parts += [{"delta": {key: piece}} for piece in pieces_of(rng, message.get(key) or "")]
    if message.get("content") == "":
        parts.append({"delta": {"content": ""}})
    parts += [
        {"delta": {"tool_calls": [delta]}} for delta in _tool_deltas(message.get("tool_calls") or [], dialect, rng)
    ]
    if dialect.role_in_every_delta:
        for part in parts:
            part["delta"]["role"] = "assistant"
    if dialect.finish == "own_chunk":
        parts.append({"delta": {}})
    return parts


def _tool_deltas(calls: list[Body], dialect: Dialect, rng: random.Random) -> list[Body]:
    if dialect.tools == "index_0":
        return [{"index": 0, **call} for call in calls]
    sequences = []
    for index, call in enumerate(calls):
        head: Body = {"index": index, **call, "function": {"name": call["function"]["name"], "arguments": ""}}
        deltas = [head]
        for piece in pieces_of(rng, call["function"]["arguments"]):
            delta: Body = {"index": index, "function": {"arguments": piece}}
            if dialect.tools == "repeated":
                delta = {**head, "function": {"name": call["function"]["name"], "arguments": piece}}
            deltas.append(delta)
        sequences.append(deltas)
    if dialect.tools != "no_index":
        return list(interleaved(rng, sequences))
    return [{k: v for k, v in delta.items() if k != "index"} for deltas in sequences for delta in deltas]


def _text_parts(choice: Body, dialect: Dialect, rng: random.Random) -> list[Body]:
    parts: list[Body] = [{"text": piece} for piece in pieces_of(rng, choice["text"])]
    return parts if parts and dialect.finish == "with_last" else [*parts, {"text": ""}]


def _with_fields(choice: Body, parts: list[Body], dialect: Dialect, rng: random.Random) -> list[Body]:
    """Spread the rest of a choice over its parts."""
    for part in parts:
        part["index"] = choice["index"]
        if dialect.null_fields:
            part |= {"logprobs": None, "finish_reason": None}
        if dialect.filters == "default":
            part["content_filter_results"] = rng.choice([{}, choice["content_filter_results"]])
    for where in ("logprobs", "token_ids"):
        for at, value in _slices(choice.get(where), len(parts), rng):
            parts[at][where] = value
    last = parts[-1]
    last["finish_reason"] = choice["finish_reason"]
    last |= {key: choice[key] for key in ("stop_reason", "matched_stop") if key in choice}
    if dialect.filters == "default":
        last["content_filter_results"] = {}
        parts[max(0, len(parts) - 2)]["content_filter_results"] = choice["content_filter_results"]
    return parts


def _slices(value: Any, count: int, rng: random.Random) -> Iterator[tuple[int, Any]]:
    """Cut a list, or each list of an object, at the same random places; yields (part, slice)."""
    if not value:
        return
    length = len(value) if isinstance(value, list) else len(next(iter(value.values())))
    at, start = 0, 0
    while start < length:
        end = length if at == count - 1 else rng.randint(start, length)
        if end > start:
            yield (
                at,
                value[start:end] if isinstance(value, list) else {key: each[start:end] for key, each in value.items()},
            )
        start, at = end, at + 1


def _place_usage(body: Body, chunks: list[Body], dialect: Dialect, rng: random.Random, kind: str) -> None:
    usage = body["usage"]
    if dialect.usage in ("last", "zeros_before"):
        chunks.append(_chunk(body, dialect, rng, kind, []))
        if dialect.usage == "zeros_before":
            for chunk in chunks:
                chunk["usage"] = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
        chunks[-1]["usage"] = usage
    elif dialect.usage == "first":
        chunks[0]["usage"] = usage
        for chunk in chunks[1:]:
            chunk["usage"] = None
    elif dialect.usage == "with_finish":
        chunks[-1]["usage"] = usage
    else:
        for count, chunk in enumerate(chunks):
            chunk["usage"] = {"prompt_tokens": usage["prompt_tokens"], "completion_tokens": count}
        chunks[-1]["usage"] = usage
    if dialect.timings:
        chunks[-1]["timings"] = body["timings"]


def _place_fingerprint(body: Body, chunks: list[Body], dialect: Dialect) -> None:
    if dialect.fingerprint == "none":
        return
    for chunk in chunks if dialect.fingerprint == "everywhere" else chunks[-1:]:
        chunk["system_fingerprint"] = body["system_fingerprint"]


def _with_annotations(body: Body, chunks: list[Body], dialect: Dialect, rng: random.Random) -> list[Body]:
    """Azure's chunks about the filter: one for the prompt first; with the asynchronous filter, more in between."""
    if not dialect.filters:
        return chunks
    nothing = {"id": "", "object": "", "created": 0, "model": "", "usage": None}
    chunks = [{**nothing, "prompt_filter_results": body["prompt_filter_results"], "choices": []}, *chunks]
    if dialect.filters == "async":
        for choice in body["choices"]:
            for name, result in choice["content_filter_results"].items():
                part = {"index": choice["index"], "finish_reason": None, "content_filter_results": {name: result}}
                part |= {"content_filter_offsets": {"check_offset": 44, "start_offset": 44, "end_offset": 198}}
                chunks.insert(rng.randint(2, len(chunks)), {**nothing, "choices": [part]})
    return chunks


def responses_events(body: Body, rng: random.Random) -> list[Body]:
    """The events of an answer of the Responses API."""
    shell = {**body, "status": "in_progress", "output": [], "usage": None, "incomplete_details": None}
    events: list[Body] = [
        {"type": "response.created", "response": shell},
        {"type": "response.in_progress", "response": shell},
    ]
    for index, item in enumerate(body["output"]):
        at = {"output_index": index}
        growing = {key: {"content": [], "summary": [], "arguments": ""}.get(key, value) for key, value in item.items()}
        events.append({"type": "response.output_item.added", **at, "item": growing})
        if "arguments" in item:
            kind = "response.function_call_arguments"
            events += [{"type": f"{kind}.delta", **at, "delta": piece} for piece in pieces_of(rng, item["arguments"])]
            events.append({"type": f"{kind}.done", **at, "arguments": item["arguments"]})
        for part_index, part in enumerate(item.get("content") or item.get("summary") or []):
            events += _part_events(item, {**at, "item_id": item["id"]}, part_index, part, rng)
        events.append({"type": "response.output_item.done", **at, "item": item})
    events.append({"type": f"response.{body['status']}", "response": body})
    return [{**event, "sequence_number": number} for number, event in enumerate(events)]


def _part_events(item: Body, at: Body, index: int, part: Body, rng: random.Random) -> list[Body]:
    is_summary = "summary" in item
    at = {**at, "summary_index" if is_summary else "content_index": index}
    added = "response.reasoning_summary_part" if is_summary else "response.content_part"
    kind = "response.reasoning_summary_text" if is_summary else f"response.{part['type']}"
    field = "refusal" if part["type"] == "refusal" else "text"
    return [
        {"type": f"{added}.added", **at, "part": {**part, field: ""}},
        *({"type": f"{kind}.delta", **at, "delta": piece, "logprobs": []} for piece in pieces_of(rng, part[field])),
        {"type": f"{kind}.done", **at, field: part[field]},
        {"type": f"{added}.done", **at, "part": part},
    ]


def to_sse(
    events: list[Body], rng: random.Random, *, names: bool = False, done: bool = True, tidy: bool = False
) -> bytes:
    """Write events as a server might: any line end, comments, a forgotten last blank line.  `tidy` writes them plainly."""
    end = "\n" if tidy else rng.choice(["\n", "\n", "\r\n", "\r"])
    space = " " if tidy or rng.random() < 0.8 else ""
    ascii_only = not tidy and rng.random() < 0.5
    out = ["\ufeff"] if not tidy and rng.random() < 0.1 else []
    for event in [*events, "[DONE]"] if done else events:
        if not tidy and rng.random() < 0.1:
            out.append(rng.choice([f": keep-alive{end}{end}", f":{end}", f": \u2028 x{end}"]))
        if names and isinstance(event, dict):
            out.append(f"event:{space}{event['type']}{end}")
        data = event if isinstance(event, str) else json.dumps(event, ensure_ascii=ascii_only)
        out.append(f"data:{space}{data}{end}{end}")
    if not tidy and rng.random() < 0.2:
        out[-1] = out[-1][: -len(end) * rng.randint(1, 2)]
    return "".join(out).encode()


def stream_of(body: Body, dialect: Dialect, rng: random.Random) -> bytes:
    """The whole stream of a chat completion or completion."""
    return to_sse(chunks_of(body, dialect, rng), rng)


def cut(stream: bytes, rng: random.Random) -> list[bytes]:
    """The stream in pieces of any size, empty ones among them."""
    count = rng.choice([0, 1, 5, 50, 300, len(stream) // 2])
    cuts = sorted(rng.choices(range(len(stream) + 1), k=min(count, 2000)))
    return [stream[start:end] for start, end in pairwise([0, *cuts, len(stream)])]
