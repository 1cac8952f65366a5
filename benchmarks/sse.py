"""
Megabytes of stream per second on one core: the parser alone, the accumulator alone, both together.

One stream per dialect, as a server would send it for a chat of some thousand tokens, one chunk a token.  Run it with
`python benchmarks/sse.py`, or `--tokens`, `--read` (bytes per network read), `--repeat`; `--json` for machines.

The target is 50 MB/s for parser and accumulator together on the commonest chunks (`vllm`, `openai`): at 250 bytes a
token that is 200,000 tokens a second, a hundred times what a GPU writes, so that one worker can follow hundreds of
streams with a few per cent of a core.
"""

import argparse
import json
import time
from collections.abc import Callable

from worker.backends.streams.reading import accumulator_for
from worker.backends.streams.sse import Event, SSEParser
from worker.wire.endpoints import endpoint_of

CHAT = "/v1/chat/completions"
SAFE = {name: {"filtered": False, "severity": "safe"} for name in ("hate", "self_harm", "sexual", "violence")}
TOP = {
    "id": "chatcmpl-0123456789abcdef0123456789abcdef",
    "created": 1_760_000_000,
    "model": "meta-llama/Llama-3.1-8B-Instruct",
}
WORDS = [" the", " of", " worker", "ing", ", ", " and", " 42", "\n", "ü", " straße"]


def chat(delta: dict, top: dict | None = None, **fields) -> dict:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None, **fields}
    return {**TOP, "object": "chat.completion.chunk", **(top or {}), "choices": [choice]}


def logprob(token: str) -> dict:
    entry = {"token": token, "logprob": -0.31725305, "bytes": list(token.encode())}
    return {"content": [{**entry, "top_logprobs": [entry] * 5}]}


def tool(piece: str) -> dict:
    return {"tool_calls": [{"index": 0, "function": {"arguments": piece}}]}


CHUNKS: dict[str, Callable[[str, int], dict]] = {
    "vllm": lambda word, _: chat({"content": word}),
    "openai": lambda word, i: chat(
        {"content": word},
        {
            "service_tier": "default",
            "system_fingerprint": "fp_44709d6fcb",
            "usage": None,
            "obfuscation": "aB3xYz9q"[: i % 9],
        },
    ),
    "vllm reasoning": lambda word, _: chat({"reasoning": word}),
    "ollama": lambda word, i: chat({"role": "assistant", "content": word}, {"created": 1_760_000_000 + i // 50}),
    "azure": lambda word, _: chat({"content": word}, content_filter_results=SAFE),
    "tool calls": lambda word, _: chat(tool(word)),
    "logprobs": lambda word, _: chat({"content": word}, logprobs=logprob(word)),
}


def a_stream(kind: str, tokens: int) -> bytes:
    """A whole stream: the role, the tokens, the finish reason, the usage, `[DONE]`."""
    make = CHUNKS[kind]
    head = chat({"role": "assistant", "content": "", "reasoning": ""})
    if kind == "tool calls":
        head = chat(
            {
                "tool_calls": [
                    {"index": 0, "id": "call_1", "type": "function", "function": {"name": "f", "arguments": ""}}
                ]
            }
        )
    chunks = [head, *(make(WORDS[i % len(WORDS)], i) for i in range(tokens)), chat({}, finish_reason="stop")]
    chunks.append(
        {
            **TOP,
            "object": "chat.completion.chunk",
            "choices": [],
            "usage": {"prompt_tokens": 9, "completion_tokens": tokens},
        }
    )
    lines = [json.dumps(chunk, separators=(",", ":"), ensure_ascii=False) for chunk in chunks]
    return "".join(f"data: {line}\n\n" for line in [*lines, "[DONE]"]).encode()


def responses_stream(tokens: int) -> bytes:
    """The same for the Responses API."""
    at = {"item_id": "msg_0123456789abcdef", "output_index": 0, "content_index": 0}
    text = "".join(WORDS[i % len(WORDS)] for i in range(tokens))
    item = {"id": "msg_1", "type": "message", "role": "assistant", "content": [{"type": "output_text", "text": text}]}
    events: list[dict] = [{"type": "response.output_item.added", "output_index": 0, "item": {**item, "content": []}}]
    kind = "response.output_text.delta"
    events += [{"type": kind, **at, "delta": WORDS[i % len(WORDS)], "logprobs": []} for i in range(tokens)]
    events.append(
        {"type": "response.completed", "response": {"id": "r", "object": "response", "output": [item], "usage": None}}
    )
    numbered = [{**event, "sequence_number": i} for i, event in enumerate(events)]
    lines = [(event["type"], json.dumps(event, separators=(",", ":"), ensure_ascii=False)) for event in numbered]
    return "".join(f"event: {name}\ndata: {line}\n\n" for name, line in lines).encode()


def parse(reads: list[bytes]) -> list[Event]:
    parser = SSEParser()
    return [event for read in reads for event in parser.feed(read)] + parser.close()


def best_of(repeat: int, work: Callable[[], object]) -> float:
    """The fastest run, in seconds of this process: the others were disturbed."""
    times = []
    for _ in range(repeat):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def measure(stream: bytes, path: str, read_bytes: int, repeat: int) -> dict[str, float]:
    """MB/s of each part, after checking that the answer is whole."""
    reads = [stream[start : start + read_bytes] for start in range(0, len(stream), read_bytes)]
    events = parse(reads)

    def accumulate() -> bytes:
        accumulator = accumulator_for(endpoint_of(path))
        for each in events:
            accumulator.feed(each)
        return accumulator.result()

    def both() -> bytes:
        accumulator, parser = accumulator_for(endpoint_of(path)), SSEParser()
        for read in reads:
            for each in parser.feed(read):
                accumulator.feed(each)
        for each in parser.close():
            accumulator.feed(each)
        return accumulator.result()

    assert both() == accumulate()
    seconds = {"parser": lambda: parse(reads), "accumulator": accumulate, "both": both}
    speeds = {name: len(stream) / best_of(repeat, work) / 1e6 for name, work in seconds.items()}
    return {
        **speeds,
        "us_per_event": len(stream) / speeds["both"] / len(events),
        "bytes_per_event": len(stream) / len(events),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--read", type=int, default=16_384, help="bytes per network read")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    streams = {kind: (a_stream(kind, arguments.tokens), CHAT) for kind in CHUNKS}
    streams["responses"] = (responses_stream(arguments.tokens), "/v1/responses")
    results = {
        kind: measure(stream, path, arguments.read, arguments.repeat) for kind, (stream, path) in streams.items()
    }
    if arguments.json:
        print(json.dumps(results))
        return
    print(f"{'MB/s':16}{'parser':>10}{'accum.':>10}{'both':>10}{'us/event':>10}{'B/event':>10}")
    for kind, row in results.items():
        print(f"{kind:16}" + "".join(f"{value:10.1f}" for value in row.values()))


if __name__ == "__main__":
    main()
