"""What is invented from a seed: draws, words, and values that fit a schema."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.emulators.openai.seeded import WORDS, Draws, schema_value, split_tokens, tokens_from


@given(st.integers(), st.text(), st.integers(1, 50))
def test_draws_depend_on_seed_and_label_alone(seed: int, label: str, high: int) -> None:
    """The same key and label give the same draw, and every draw lies in its range."""
    draws = Draws(seed, b"body")
    assert 0 < draws.uniform("x" + label.encode("utf-8", "ignore").decode()) < 1
    assert 1 <= draws.between("y", 1, high) <= high
    assert Draws(seed, b"body").data("z", 9) == draws.data("z", 20)[:9]
    assert Draws(seed, "a", "b").hex("id") != Draws(seed, "ab", "").hex("id")


def test_the_vocabulary_is_one_word_per_byte() -> None:
    """256 different words; a sixteenth of them is not ASCII, up to four UTF-8 bytes a character."""
    assert len(WORDS) == len(set(WORDS)) == 256
    assert {len(char.encode()) for word in WORDS for char in word} == {1, 2, 3, 4}
    assert sum(not word.isascii() for word in WORDS) == 16


@pytest.mark.parametrize("text", ["", "one", "Two words.", '{"a": [1, "ß"]}', "a\n\n  b 🙂!", "\u2028x"])
def test_any_text_is_cut_into_tokens_without_loss(text: str) -> None:
    """Tokens joined are the text again."""
    assert "".join(split_tokens(text)) == text


def test_recursive_and_odd_schemas_end() -> None:
    """A schema that refers to itself, or is none at all, still gives a value."""
    tree = {"$ref": "#/$defs/n", "$defs": {"n": {"type": "object", "properties": {"next": {"$ref": "#/$defs/n"}}}}}
    assert json.dumps(schema_value(tree, Draws(0))).count("next") > 3
    odd: list[Any] = [True, None, {"type": "what"}, {"enum": []}, {"type": ["null", "boolean"]}, {"anyOf": [{"const": 1}]},
                      {"type": "array", "items": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 2}, "minItems": 2}]  # fmt: skip
    values = [schema_value(schema, Draws(0)) for schema in odd]
    assert isinstance(values[4], bool)
    assert values[5:] == [1, [1.0, 1.0]]


def test_words_make_sentences() -> None:
    """Capitals and full stops stand where sentences begin and end."""
    text = "".join(tokens_from(bytes(range(20))))
    assert (text[0].isupper(), text.endswith("."), text.count(".")) == (True, True, 3)
