"""The simulated server goes on from a text as vLLM and SGLang do."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.emulators.openai.dialects import DIALECTS, SimError
from worker.emulators.openai.generation import generate, subject, tokens_after
from worker.emulators.openai.options import SimOptions
from worker.emulators.openai.seeded import Draws
from worker.emulators.openai.validation import Endpoint, check, split_continuation

USER = {"role": "user", "content": "hello"}
BODY: dict[str, Any] = {"model": "m", "messages": [USER]}
FLAGS = {"continue_final_message": True, "add_generation_prompt": False}


def opened(text: str) -> dict[str, Any]:
    return {**BODY, **FLAGS, "messages": [USER, {"role": "assistant", "content": text}]}


def generated_tokens(body: dict[str, Any], dialect: str = "vllm", **options: Any) -> list[str]:
    """The tokens of the answer to a body."""
    settings = SimOptions.of(**options)
    about, prefix = split_continuation(body, DIALECTS[dialect])
    call = check(Endpoint.CHAT, body, settings)
    call.prefix = prefix
    return generate(call, Draws(0, subject(about)), settings).choices[0].tokens


@pytest.mark.parametrize("dialect", ["vllm", "sglang"])
@pytest.mark.parametrize("tokens", [1, 5, 9])
def test_the_rest_is_said(dialect: str, tokens: int) -> None:
    """The beginning and the rest are the whole answer."""
    whole = generated_tokens(BODY, dialect)
    assert generated_tokens(opened("".join(whole[:tokens])), dialect) == whole[tokens:]


def test_a_limit_of_tokens_cuts_the_rest() -> None:
    """It is that of the continuation, and does not change what is said."""
    whole = generated_tokens({**BODY, "max_tokens": 50})
    assert generated_tokens({**opened("".join(whole[:4])), "max_tokens": 2}) == whole[4:6]


def test_a_text_that_was_never_said_is_followed_by_an_answer() -> None:
    """A model goes on from anything."""
    assert generated_tokens(opened("Something else entirely")) == generated_tokens(BODY)


@given(st.lists(st.text(min_size=1, max_size=4), max_size=6), st.integers(0, 24))
def test_a_beginning_and_its_rest_are_the_whole(tokens: list[str], length: int) -> None:
    """Wherever the cut falls, also inside a token."""
    whole = "".join(tokens)
    assert whole[:length] + "".join(tokens_after(tokens, whole[:length])) == whole


@pytest.mark.parametrize("dialect", ["openai", "azure"])
def test_unknown_arguments_are_refused(dialect: str) -> None:
    """As OpenAI does."""
    with pytest.raises(SimError, match="Unrecognized request argument supplied: continue_final_message"):
        split_continuation(opened("a"), DIALECTS[dialect])


@pytest.mark.parametrize("dialect", ["tgi", "llamacpp", "ollama", "litellm"])
def test_others_ignore_it(dialect: str) -> None:
    """They answer anew."""
    body = opened("a")
    assert split_continuation(body, DIALECTS[dialect]) == (body, "")


def test_both_keys_exclude_each_other() -> None:
    """As in vLLM."""
    with pytest.raises(SimError, match="Cannot set both"):
        split_continuation({**opened("a"), "add_generation_prompt": True}, DIALECTS["vllm"])


@pytest.mark.parametrize(
    "body", [BODY, {**BODY, **FLAGS}, {**opened("a"), "continue_final_message": False}, {**opened("a"), "messages": []}]
)
def test_nothing_is_opened_without_a_beginning(body: dict[str, Any]) -> None:
    """Both the key and an assistant's last message are needed."""
    assert split_continuation(body, DIALECTS["vllm"]) == (body, "")
