"""Answers of every API: unary bodies, and streams that add up to them in every dialect."""

import zlib
from base64 import b64decode
from struct import unpack, unpack_from
from typing import Any

import pytest

from tests.support.simulated_openai import ME, events_of, generated, read, stream_call, unary_call, written
from worker.emulators.openai.answers import (
    chat_body,
    chunk_events,
    completion_body,
    embedding_body,
    moderation_body,
)
from worker.emulators.openai.dialects import DIALECTS, Dialect
from worker.emulators.openai.generation import Generation
from worker.emulators.openai.images import image_body
from worker.emulators.openai.options import SimOptions
from worker.emulators.openai.responses import response_body, response_events
from worker.emulators.openai.seeded import split_tokens
from worker.emulators.openai.sse import stream_steps
from worker.emulators.openai.validation import Endpoint, check

TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"properties": {"q": {"type": "string"}}}}}
    for name in "ab"
]


def add(old: Any, new: Any) -> Any:
    """Merge a delta's value into what came before: texts and lists append, objects recurse, otherwise the last wins."""
    if isinstance(old, dict) and isinstance(new, dict):
        merged = dict(old)
        for key, value in new.items():
            if value is None and key in merged:
                continue
            once = key in {"role", "id", "type", "name", "finish_reason"}
            merged[key] = value if once or key not in merged else add(merged[key], value)
        return merged
    if isinstance(old, list) and isinstance(new, list):
        if all(isinstance(item, dict) and "index" in item for item in old + new):
            by_index = {item["index"]: item for item in old}
            for item in new:
                by_index[item["index"]] = add(by_index.get(item["index"], {}), item)
            return [by_index[index] for index in sorted(by_index)]
        return old + new
    return old + new if isinstance(old, str) and isinstance(new, str) else (old if new is None else new)


def assembled(chunks: list[Any], kind: str) -> dict[str, Any]:
    """Return the body that chunks add up to."""
    body: dict[str, Any] = {}
    choices: list[Any] = []
    for chunk in chunks:
        if chunk == "[DONE]":
            continue
        choices = add(choices, chunk["choices"])
        body |= {key: value for key, value in chunk.items() if value not in (None, "", 0) and key != "choices"}
    for choice in choices:
        if "delta" in choice:
            choice["message"] = choice.pop("delta")
    return {**body, "object": kind, "choices": choices}


def canon(value: Any) -> Any:
    """Return JSON without what a stream cannot or need not repeat: nulls, empty texts and lists, padding, indexes."""
    if isinstance(value, dict):
        dropped = {"obfuscation", "index"}
        kept = {key: canon(inner) for key, inner in value.items() if key not in dropped}
        return {key: inner for key, inner in kept.items() if inner not in (None, "", [], {})}
    return [canon(inner) for inner in value] if isinstance(value, list) else value


REQUESTS: list[dict[str, Any]] = [
    {},
    {"n": 3},
    {"logprobs": True, "max_tokens": 4},
    {"tools": TOOLS, "tool_choice": "required"},
    {"reasoning_effort": "low"},
    {"reasoning_effort": "low", "max_tokens": 5, "n": 2},
    {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
]


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("request_body", REQUESTS, ids=lambda body: ",".join(body) or "plain")
def test_chat_chunks_add_up_to_the_unary_body(dialect: str, request_body: dict[str, Any]) -> None:
    """In every dialect the merged chunks equal the body that the same request gets without a stream."""
    call = stream_call(**request_body)
    row: Dialect = DIALECTS[dialect]
    for body in (b"1", b"2", b"3"):
        generation = generated(call, body)
        chunks = read(written(stream_steps(chunk_events(call, generation, row, ME))))
        assert chunks[-1] == "[DONE]"
        assert canon(assembled(chunks, "chat.completion")) == canon(chat_body(call, generation, row, ME))


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("request_body", [{}, {"n": 2}, {"logprobs": 1}, {"echo": True, "max_tokens": 2}])
def test_text_chunks_add_up_to_the_unary_body(dialect: str, request_body: dict[str, Any]) -> None:
    """Text completions too."""
    call = stream_call(Endpoint.COMPLETIONS, **request_body)
    generation = generated(call)
    chunks = read(written(stream_steps(chunk_events(call, generation, DIALECTS[dialect], ME))))
    whole = completion_body(call, generation, DIALECTS[dialect], ME)
    assert canon(assembled(chunks, "text_completion")) == canon(whole)


@pytest.mark.parametrize(
    "body",
    [{}, {"max_output_tokens": 2}, {"reasoning": {"effort": "low"}}, {"tools": TOOLS, "tool_choice": "required"}],
)
def test_a_streamed_response_ends_with_the_unary_body(body: dict[str, Any]) -> None:
    """The terminal event carries the unary body, deltas add up to its text, and events are numbered."""
    call = stream_call(Endpoint.RESPONSES, **body)
    generation = generated(call)
    events = read(written(stream_steps(response_events(call, generation, DIALECTS["vllm"], ME))))
    whole = response_body(call, generation, DIALECTS["vllm"], ME)
    assert events[-1]["response"] == whole
    assert events[-1]["type"] == f"response.{whole['status']}"
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    deltas = "".join(event["delta"] for event in events if event["type"].endswith(".delta"))
    inside = [item.get("arguments") or item["content"][0]["text"] for item in whole["output"]]
    assert deltas == "".join(inside)


def test_azure_begins_with_an_empty_chunk() -> None:
    """Azure's first chunk has no choices but the filter results of the prompt."""
    first = events_of(stream_call(), "azure")[0].payload
    assert first is not None
    assert (first["choices"], "prompt_filter_results" in first) == ([], True)


def test_tgi_and_ollama_repeat_the_role() -> None:
    """Every delta of TGI and Ollama has the role; OpenAI's first only."""
    for dialect, count in (("tgi", 24), ("ollama", 24), ("openai", 1)):
        payloads = [
            event.payload for event in events_of(stream_call(), dialect) if event.payload and event.payload["choices"]
        ]
        roles = sum("role" in payload["choices"][0]["delta"] for payload in payloads)
        assert (roles == count) if dialect == "openai" else (roles == len(payloads))


@pytest.mark.parametrize("place", ["own_chunk", "empty_delta", "finish_chunk", "first_chunk"])
def test_usage_can_stand_anywhere(place: Any) -> None:
    """Usage is sent once with the whole count, wherever it is wanted."""
    call = stream_call()
    events = chunk_events(call, generated(call), DIALECTS["vllm"], ME, place)
    counted = [event.payload["usage"] for event in events if event.payload and event.payload.get("usage")]
    assert [usage["completion_tokens"] for usage in counted] == [generated(call).completion_tokens]


def test_usage_is_sent_only_when_asked_for() -> None:
    """Without `include_usage` no chunk has usage."""
    call = check(
        Endpoint.CHAT, {"model": "m", "stream": True, "messages": [{"role": "user", "content": "x"}]}, SimOptions()
    )
    assert not any("usage" in (event.payload or {}) for event in events_of(call))


def test_usage_and_fingerprint_stand_where_the_dialect_puts_them() -> None:
    """OpenAI says `"usage": null` on every other chunk; vLLM's last chunk alone has a fingerprint."""
    payloads = [event.payload for event in events_of(stream_call(), "openai") if event.payload]
    assert [payload["usage"] for payload in payloads[:-1]] == [None] * (len(payloads) - 1)
    payloads = [event.payload for event in events_of(stream_call(), "vllm") if event.payload]
    assert ["system_fingerprint" in payload for payload in payloads] == [False] * (len(payloads) - 1) + [True]
    assert not any("usage" in payload for payload in payloads[:-1])


def test_no_choices_still_make_a_stream() -> None:
    """An answer without choices is one chunk that has none."""
    call = stream_call()
    events = chunk_events(call, Generation([], 3), DIALECTS["vllm"], ME)
    assert [event.payload["choices"] for event in events if event.payload] == [[], []]


def test_a_chat_body_has_openais_shape() -> None:
    """Ids, usage, logprobs and nulls stand where OpenAI's clients look for them."""
    call = unary_call(logprobs=True, max_tokens=2)
    body = chat_body(call, generated(call), DIALECTS["openai"], ME)
    choice = body["choices"][0]
    assert (body["id"], body["object"], body["created"]) == ("chatcmpl-job-1", "chat.completion", ME.created)
    assert [entry["token"] for entry in choice["logprobs"]["content"]] == split_tokens(choice["message"]["content"])
    assert body["usage"]["total_tokens"] == body["usage"]["prompt_tokens"] + 2


def test_dialects_put_reasoning_where_they_do() -> None:
    """vLLM and Ollama say `reasoning`, SGLang and llama.cpp `reasoning_content`, OpenAI only counts it."""
    call = unary_call()
    bodies = {name: chat_body(call, generated(call, reasoning_tokens=3), row, ME) for name, row in DIALECTS.items()}
    found = {
        name: body["choices"][0]["message"].keys() & {"reasoning", "reasoning_content"} for name, body in bodies.items()
    }
    assert found["vllm"] == found["ollama"] == {"reasoning"}
    assert found["sglang"] == found["llamacpp"] == {"reasoning_content"}
    assert found["openai"] == set()
    assert bodies["openai"]["usage"]["completion_tokens_details"]["reasoning_tokens"] == 3
    assert bodies["azure"]["prompt_filter_results"]


def test_completions_of_several_prompts_are_in_order() -> None:
    """Each prompt has its n choices, and `echo` repeats it before each."""
    call = unary_call(Endpoint.COMPLETIONS, prompt=["one", "two"], n=2, echo=True, logprobs=1, max_tokens=3)
    body = completion_body(call, generated(call), DIALECTS["openai"], ME)
    texts = [choice["text"] for choice in body["choices"]]
    assert [text[:3] for text in texts] == ["one", "one", "two", "two"]
    assert body["choices"][0]["logprobs"]["text_offset"][0] == 0


def test_a_response_that_was_cut_is_incomplete() -> None:
    """The Responses API says why it stopped in its status."""
    call = unary_call(Endpoint.RESPONSES, max_output_tokens=2)
    body = response_body(call, generated(call), DIALECTS["openai"], ME)
    assert (body["status"], body["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    whole = response_body(call, generated(unary_call(Endpoint.RESPONSES)), DIALECTS["openai"], ME)
    assert (whole["status"], whole["incomplete_details"]) == ("completed", None)


def test_embeddings_are_unit_vectors_of_the_text() -> None:
    """The same text has the same vector in any request, in both encodings, with the wanted length."""
    one = embedding_body(unary_call(Endpoint.EMBEDDINGS, input=["cat", "dog"], dimensions=64), 0)
    two = embedding_body(unary_call(Endpoint.EMBEDDINGS, input="cat", dimensions=64, encoding_format="base64"), 0)
    vector = one["data"][0]["embedding"]
    assert len(vector) == 64
    assert sum(number * number for number in vector) == pytest.approx(1, abs=1e-4)
    assert unpack("<64f", b64decode(two["data"][0]["embedding"])) == pytest.approx(vector, abs=1e-6)
    assert one["data"][1]["embedding"] != vector
    assert embedding_body(unary_call(Endpoint.EMBEDDINGS, dimensions=64), 1) != embedding_body(
        unary_call(Endpoint.EMBEDDINGS, dimensions=64), 0
    )


def test_one_input_in_ten_is_flagged_and_always_the_same_one() -> None:
    """In the category whose score is high; each input by itself."""
    texts = [f"text {number}" for number in range(1_000)]
    results = moderation_body(unary_call(Endpoint.MODERATIONS, input=texts), 0, ME)["results"]
    flagged = [result for result in results if result["flagged"]]
    assert 70 <= len(flagged) <= 130
    assert all(sum(result["categories"].values()) == 1 for result in flagged)
    assert not any(any(result["categories"].values()) for result in results if not result["flagged"])
    alone = moderation_body(unary_call(Endpoint.MODERATIONS, input="text 7"), 0, ME)
    assert alone["results"] == results[7:8]


def test_parts_of_a_moderation_are_one_input() -> None:
    """Only some categories are about images."""
    parts = [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": "https://example.com/x.png"}}]
    (both,) = moderation_body(unary_call(Endpoint.MODERATIONS, input=parts), 0, ME)["results"]
    assert both["category_applied_input_types"]["violence"] == ["image", "text"]
    assert both["category_applied_input_types"]["hate"] == ["text"]
    (image,) = moderation_body(unary_call(Endpoint.MODERATIONS, input=parts[1:]), 0, ME)["results"]
    assert image["category_applied_input_types"]["hate"] == []


def chunks_of_png(data: bytes) -> dict[bytes, bytes]:
    """Return the chunks of a PNG, whose checksums are right."""
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    chunks, at = dict[bytes, bytes](), 8
    while at < len(data):
        (length,) = unpack_from(">I", data, at)
        name, content = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        assert unpack_from(">I", data, at + 8 + length) == (zlib.crc32(name + content),)
        chunks[name] = content
        at += 12 + length
    return chunks


def test_images_have_the_size_that_was_asked_for() -> None:
    """Each is a PNG of a colour of its own, the same for the same request."""
    call = unary_call(Endpoint.IMAGES, prompt="a cat", n=2, size="300x20")
    body = image_body(call, 0, ME)
    pictures = [chunks_of_png(b64decode(each["b64_json"])) for each in body["data"]]
    for picture in pictures:
        assert list(picture) == [b"IHDR", b"PLTE", b"IDAT", b"IEND"]
        assert unpack(">IIBBBBB", picture[b"IHDR"]) == (300, 20, 1, 3, 0, 0, 0)
        assert zlib.decompress(picture[b"IDAT"]) == bytes(20 * (1 + 38))  # 38 bytes hold the bits of 300 pixels
    assert len({picture[b"PLTE"] for picture in pictures}) == 2
    assert image_body(call, 0, ME)["data"] == body["data"]
    assert image_body(call, 1, ME)["data"] != body["data"]


def test_an_edit_counts_its_images() -> None:
    """As tokens of images; without a size the image is square."""
    call = unary_call(Endpoint.EDITS, prompt="a hat", images=[{"file_id": "file-1"}, {"file_id": "file-2"}])
    body = image_body(call, 0, ME)
    assert body["size"] == "1024x1024"
    assert body["usage"]["input_tokens_details"] == {"text_tokens": 2, "image_tokens": 2 * 765}
    assert body["usage"]["output_tokens"] == 272
