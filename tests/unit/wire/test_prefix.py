"""Which prompts begin alike."""

import json
from typing import Any

import pytest

from worker.wire.body import RequestBody
from worker.wire.prefix import prompt_prefix

TEXT = "a long document " * 20


def prefix(length: int = 200, **body: Any) -> int | None:
    return prompt_prefix(RequestBody(json.dumps(body).encode()), length)


def chat(question: str, text: str = TEXT, **more: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": text + question}], **more}


@pytest.mark.parametrize("key", ["prompt", "input"])
def test_prompts_of_every_api_are_compared(key: str) -> None:
    """Where they stand does not matter, and neither does what else the body has."""
    assert prefix(**chat("one")) == prefix(**chat("two", temperature=1)) is not None
    assert prefix(**{key: TEXT + "one"}) == prefix(**{key: TEXT + "two"}) is not None
    assert prefix(**{key: TEXT}) != prefix(**{key: TEXT.upper()})


def test_another_beginning_or_other_tools_are_another_prefix() -> None:
    """Templates write tools in front of the messages."""
    assert prefix(**chat("one")) != prefix(**chat("one", text="another " * 40))
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert prefix(**chat("one")) != prefix(**chat("one", tools=tools))
    assert prefix(**chat("one", tools=tools)) == prefix(**chat("two", tools=tools))


@pytest.mark.parametrize("body", [b"{}", b"[]", b"no JSON", b'{"messages": []}', b'{"prompt": "short"}'])
def test_a_prompt_that_is_too_short_is_in_no_group(body: bytes) -> None:
    """Its beginning would save nothing; and what is no body has none."""
    assert prompt_prefix(RequestBody(body), 20) is None


def test_the_length_says_how_much_has_to_be_alike() -> None:
    """What comes behind it is not looked at."""
    one, two = chat("", text="a" * 300 + "b" * 300), chat("", text="a" * 300 + "c" * 300)
    assert prefix(200, **one) == prefix(200, **two)
    assert prefix(500, **one) != prefix(500, **two)
