"""
Makes `requests.jsonl` and `batch.jsonl`: varied, realistic requests, and a few that deserve a 400.

The same bytes every time, on every machine and Python: all chance comes from `random.random` with a fixed seed, and
images are stored, not compressed.  Words, schemas and the unusual cases stand in `texts.json`.  A line's metadata says
which status its answer must have (`"expect": 200`); where it cannot (no metadata, or none that can be read) `build`
knows.

Run it to write both files; with `--check` it exits with 1 when they differ from what would be written.
"""

import argparse
import base64
import json
import random
import struct
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

SEED = 20_240_917
HERE = Path(__file__).parent
TEXTS: dict[str, Any] = json.loads((HERE / "texts.json").read_text("utf-8"))
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
EMBEDDINGS, RESPONSES = "/v1/embeddings", "/v1/responses"
MODERATIONS, IMAGES, EDITS = "/v1/moderations", "/v1/images/generations", "/v1/images/edits"
MODELS = ("llama-3.1-8b-instruct", "qwen2.5-7b-instruct", "mistral-small-24b", "gemma-2-9b-it")
EMBEDDERS = ("bge-m3", "e5-mistral-7b-instruct", "nomic-embed-text-v1.5")
ORDINARY: dict[str, tuple[float, ...]] = {
    "temperature": (0, 0.2, 0.7, 1.0, 1.5),
    "max_tokens": (16, 32, 64, 128),
    "seed": (7, 42),
}
Body = dict[str, Any]


class Example(NamedTuple):
    """One line, without its line end, and what must come of it."""

    line: str
    expect: int
    """Status code of the answer."""
    metadata: Body
    """Of the answer: that of the line, as far as anybody can read it."""


class Dice:
    """Chance that is the same everywhere: only `random.random` is promised to be stable across Python versions."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed).random

    def below(self, limit: int) -> int:
        """Return 0 to limit - 1."""
        return int(self._random() * limit)

    def pick(self, options: Sequence[Any] | str) -> Any:
        """Return one of the options, or of the texts of that name."""
        options = TEXTS[options] if isinstance(options, str) else options
        return options[self.below(len(options))]

    def shuffle(self, items: list[Any]) -> None:
        """Reorder in place."""
        for last in range(len(items) - 1, 0, -1):
            other = self.below(last + 1)
            items[last], items[other] = items[other], items[last]

    def sentence(self) -> str:
        """Return a sentence without its full stop."""
        return f"{self.pick('subjects')} {self.pick('verbs')} {self.pick('objects')}"

    def task(self) -> str:
        """Return something to ask."""
        return str(self.pick("tasks")).format(self.sentence())

    def text(self, size: int) -> str:
        """Return paragraphs of about `size` characters."""
        text = ""
        while len(text) < size:
            text += self.sentence().capitalize() + str(self.pick((". ", ". ", "; meanwhile, ", ".\n\n")))
        return text


def png(dice: Dice, width: int, height: int) -> str:
    """Return a small picture, a gradient with a square on it, as a data URL."""
    red, left, top = dice.below(256), dice.below(width // 2), dice.below(height // 2)
    rows = b""
    for y in range(height):
        rows += b"\0"  # no filter
        for x in range(width):
            is_inside = left <= x < left + width // 3 and top <= y < top + height // 3
            rows += bytes((255 - red, 40, 40) if is_inside else (red, x * 255 // width, y * 255 // height))
    stored = b"\x78\x01" + struct.pack("<BHH", 1, len(rows), 0xFFFF - len(rows)) + rows
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n"
    for kind, part in ((b"IHDR", header), (b"IDAT", stored + struct.pack(">I", zlib.adler32(rows))), (b"IEND", b"")):
        data += struct.pack(">I", len(part)) + kind + part + struct.pack(">I", zlib.crc32(kind + part))
    return "data:image/png;base64," + base64.b64encode(data).decode()


def user(content: Any) -> Body:
    """Return a message of the user."""
    return {"role": "user", "content": content}


def chat(dice: Dice, *messages: Body, **more: Any) -> Body:
    """Return a chat body with a few ordinary parameters; without messages it asks something."""
    body: Body = {"model": dice.pick(MODELS), "messages": list(messages) or [user(dice.task())]}
    body |= {name: dice.pick(values) for name, values in ORDINARY.items() if dice.below(2)}
    return {**body, **more}


def tool(name: str, **flat: Any) -> Body:
    """Return a function tool; nested as chat has it, or flat as the Responses API does."""
    schema = TEXTS["lookup_schema" if name == "get_weather" else "ticket_schema"]
    function = {"name": name, "description": f"Call {name}.", "parameters": schema}
    return {"type": "function", **function, **flat} if flat else {"type": "function", "function": function}


def plain_chats(dice: Dice) -> Iterator[Body]:
    """Yield single questions in many scripts, and conversations."""
    yield from (chat(dice) for _ in range(44))
    yield from (chat(dice, user(text)) for text in TEXTS["world"])
    for text in TEXTS["world"][:6]:
        yield chat(dice, {"role": "developer", "content": text}, user(dice.task()), user=f"用户-{dice.below(99)}")
    for number in range(20):
        turns: list[Body] = [{"role": "system", "content": "You are a terse assistant of a public library."}]
        for _ in range(1 + number % 4):
            turns += [user(dice.task()), {"role": "assistant", "content": dice.sentence().capitalize() + "."}]
        yield chat(dice, *turns, user(dice.task()))


def tool_chats(dice: Dice) -> Iterator[Body]:
    """Yield chats that may call tools, that answer a call, and that must answer in JSON."""
    tools = [tool("get_weather"), tool("open_ticket")]
    for number in range(12):
        choice: Any = ("auto", "required", {"type": "function", "function": {"name": "get_weather"}})[number % 3]
        yield chat(dice, user("How cold is it in Oslo?"), tools=tools, tool_choice=choice)
    for city in ("Oslo", "Zürich", "札幌", "Cape Town", "القاهرة"):
        call = {"id": f"call_{dice.below(10**6):06d}", "type": "function"}
        called: Body = {**call, "function": {"name": "get_weather", "arguments": dump({"city": city, "unit": "C"})}}
        yield chat(
            dice,
            user("What should I wear today?"),
            {"role": "assistant", "content": None, "tool_calls": [called]},
            {"role": "tool", "tool_call_id": call["id"], "content": '{"temperature": -3, "sky": "snow"}'},
            tools=tools,
        )
    schema = {"name": "ticket", "strict": True, "schema": TEXTS["ticket_schema"]}
    for number in range(11):
        wanted: Body = {"type": "json_schema", "json_schema": schema} if number % 4 else {"type": "json_object"}
        yield chat(dice, user("File a ticket as JSON: " + dice.sentence()), response_format=wanted)


def rich_chats(dice: Dice) -> Iterator[Body]:
    """Yield chats with pictures, long prompts, several choices, logprobs, and streams."""
    for number in range(9):
        picture = {"url": png(dice, 16 + 4 * dice.below(5), 16 + 4 * dice.below(5))}
        picture |= {"detail": "low"} if number % 2 else {}
        parts = [{"type": "text", "text": "What is in this picture?"}, {"type": "image_url", "image_url": picture}]
        yield chat(dice, user(parts * (1 + number % 2)))
    for size in (20_000, 25_000, 30_000, 35_000, 40_000, 45_000, 52_000, 60_000):
        yield chat(dice, user("Summarise this report.\n\n" + dice.text(size)), max_tokens=200)
    for number in range(2, 6):
        yield chat(dice, n=number)
        yield chat(dice, logprobs=True, top_logprobs=number, stop=["\n\n", "END"])
    for number in range(12):
        yield chat(dice, stream=True, **({} if number % 3 else {"stream_options": {"include_usage": True}}))
    yield chat(dice, stream=True, n=2)
    yield chat(dice, user("How cold is it?"), stream=True, tools=[tool("get_weather")], tool_choice="required")


def completions(dice: Dice) -> Iterator[Body]:
    """Yield completion bodies: one prompt or several, with logprobs, choices, stops and streams."""
    options: tuple[Body, ...] = ({}, {"logprobs": 3}, {"n": 2, "temperature": 0.9}, {"stop": "."}, {"stream": True})
    for number in range(14):
        prompt: Any = dice.sentence().capitalize() + ", and then"
        if number % 4 == 3:
            prompt = [prompt, dice.pick("world"), dice.sentence()]
        yield {"model": dice.pick(MODELS), "prompt": prompt, "max_tokens": 8 + 8 * dice.below(6), **options[number % 5]}


def embeddings(dice: Dice) -> Iterator[Body]:
    """Yield embedding bodies: one text, many, tokens, with dimensions, as base64."""
    options: tuple[Body, ...] = ({}, {"encoding_format": "base64"}, {"dimensions": 64})
    for number in range(20):
        inputs: Any = [dice.sentence() for _ in range(1 + dice.below(6))]
        if number % 4 == 0:
            inputs = dice.pick("world")
        elif number % 4 == 3:
            inputs = [[dice.below(30_000) for _ in range(12)] for _ in range(3)]
        yield {"model": dice.pick(EMBEDDERS), "input": inputs, **options[number % 3]}


def responses(dice: Dice) -> Iterator[Body]:
    """Yield bodies of the Responses API: text, items, tools, a picture, streams."""
    for number in range(16):
        picture = {"type": "input_image", "image_url": png(dice, 16, 16)}
        kinds: tuple[Body, ...] = (
            {"input": dice.task(), "instructions": "Answer in one sentence."},
            {"input": [user(dice.task()), {"role": "assistant", "content": "Yes."}, user("Why?")]},
            {"input": [user([{"type": "input_text", "text": dice.pick("world")}, picture])]},
            {"input": dice.task(), "tools": [tool("get_weather", strict=True)], "tool_choice": "auto"},
            {"input": dice.task(), "stream": True, "max_output_tokens": 64},
        )
        yield {"model": dice.pick(MODELS), **kinds[number % len(kinds)]}


def moderations(dice: Dice) -> Iterator[Body]:
    """Yield moderation bodies: one text, many, text with a picture; with a model and without."""
    for number in range(6):
        parts = [{"type": "text", "text": dice.task()}, {"type": "image_url", "image_url": {"url": png(dice, 16, 16)}}]
        kinds = (dice.pick("world"), [dice.task() for _ in range(3)], parts)
        yield {**({"model": "omni-moderation-latest"} if number % 2 else {}), "input": kinds[number % 3]}


def images(dice: Dice) -> Iterator[Body]:
    """Yield bodies that ask for pictures: one or several, of several sizes."""
    options: tuple[Body, ...] = ({}, {"n": 2, "size": "512x512"}, {"quality": "low", "size": "1024x1024"})
    for number in range(6):
        yield {"model": "flux.1-schnell", "prompt": dice.sentence().capitalize() + ".", **options[number % 3]}


def edits(dice: Dice) -> Iterator[Body]:
    """Yield bodies that change pictures, which they hold or name."""
    for number in range(4):
        given = [{"image_url": png(dice, 16, 16)}] if number % 2 else [{"file_id": f"file-{dice.below(10**6):06d}"}]
        yield {"model": "flux.1-kontext", "prompt": "Replace the sky by " + dice.sentence() + ".", "images": given}


def request(path: Any, body: Any, metadata: Body | None, **more: Any) -> Example:
    """Return a line; its metadata, where there is any, says which answer is expected."""
    message = {"path": path, **({} if metadata is None else {"metadata": metadata}), "body": body, **more}
    return Example(dump(message), (metadata or {}).get("expect", 200), metadata or {})


def good(dice: Dice) -> Iterator[Example]:
    """Yield every request that a server answers with a 200."""
    makers: tuple[tuple[str, Callable[[Dice], Iterator[Body]]], ...] = (
        (CHAT, plain_chats),
        (CHAT, tool_chats),
        (CHAT, rich_chats),
        (COMPLETIONS, completions),
        (EMBEDDINGS, embeddings),
        (RESPONSES, responses),
        (MODERATIONS, moderations),
        (IMAGES, images),
        (EDITS, edits),
    )
    bodies = [(path, body) for path, maker in makers for body in maker(dice)]
    for row, (path, body) in enumerate(bodies, 1):
        yield request(path, body, {"expect": 200, "row": row})
    for metadata in ({}, None, *({"expect": 200, **extra} for extra in TEXTS["metadata"])):
        yield request(CHAT, chat(dice), metadata)
    for priority in (-5, 0, 1, 10, 1_000_000):
        yield request(CHAT, chat(dice), {"expect": 200}, priority=priority)
    for deadline in ("2099-12-31T23:59:59Z", 4_102_444_800):
        yield request(EMBEDDINGS, {"model": "bge-m3", "input": "in time"}, {"expect": 200}, deadline=deadline)
    yield from (Example(line, 200, json.loads(line)["metadata"]) for line in TEXTS["unusual_spellings"])


def bad(dice: Dice) -> Iterator[Example]:
    """Yield what must be answered with a 400: by the worker, or by the model server."""
    body = chat(dice, user("Hello"))
    meta = {"expect": 400}
    for line in TEXTS["unreadable"]:  # what stands before the fault can be read
        yield Example(line, 400, meta if '"metadata":{"expect":400}' in line else {})
    yield Example(dump({"path": CHAT, "metadata": ["not", "an", "object"], "body": body}), 400, {})
    yield Example(dump({"metadata": meta, "body": body}), 400, meta)
    yield Example(dump({"path": CHAT, "metadata": meta}), 400, meta)
    for path in TEXTS["bad_paths"]:
        yield request(path, body, {"expect": 400, "why": "path"})
    for wrong in TEXTS["bad_bodies"]:
        yield request(CHAT, wrong, {"expect": 400, "why": "body is no object"})
    for keys in TEXTS["bad_keys"]:
        yield request(CHAT, body, {"expect": 400, "why": "a key of the message"}, **keys)
    for change in TEXTS["refused_by_the_server"]:
        yield request(CHAT, {**body, **change}, {"expect": 400, "why": "the server refuses it"})
    yield request(CHAT, {"messages": [user("Hello")]}, {"expect": 400, "why": "no model"})
    yield request(EMBEDDINGS, {"model": "bge-m3", "input": []}, {"expect": 400, "why": "nothing to embed"})
    yield request(MODERATIONS, {"model": "omni-moderation-latest"}, {"expect": 400, "why": "nothing to judge"})
    yield request(EDITS, {"prompt": "Add a cat."}, {"expect": 400, "why": "no picture to change"})


def dump(value: Any) -> str:
    """Return JSON on one line, unescaped where JSON allows."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def build() -> list[Example]:
    """Return the lines of `requests.jsonl`, in their order."""
    dice = Dice(SEED)
    examples = [*good(dice), *bad(dice)]
    dice.shuffle(examples)
    return examples


def build_batch() -> list[str]:
    """Return the lines of `batch.jsonl`: OpenAI batch lines for one endpoint and one model."""
    dice = Dice(SEED + 1)
    lines = []
    for number in range(1, 21):
        prompt = dice.task() if number % 4 else dice.pick("world")
        body = {"model": MODELS[0], "messages": [user(prompt)], "max_tokens": 16 + dice.below(64)}
        custom_id = f"request-{number}" if number % 10 else f"行-{number}"
        lines.append(dump({"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body}))
    return lines


def main() -> int:
    """Write the files, or check them; return the exit code."""
    parser = argparse.ArgumentParser(description="Make the example requests.")
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    is_check = parser.parse_args().check
    for name, lines in (("requests.jsonl", [example.line for example in build()]), ("batch.jsonl", build_batch())):
        data = "".join(line + "\n" for line in lines).encode()
        if not is_check:
            (HERE / name).write_bytes(data)
        elif not (HERE / name).exists() or (HERE / name).read_bytes() != data:
            print(f"{name} is stale; run python examples/make_requests.py", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
