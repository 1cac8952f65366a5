"""The judgement of 2xx bodies agrees with the grammar of JSON, on both of its ways."""

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from worker.policy.answers import Flaw, asks_about_nothing, find_flaw, is_json_object

GOOD = (
    b'{"id":"x","choices":[{"index":0,"finish_reason":"stop","message":{"content":"a\\u00e4\\n"}}],"usage":{"n":1.5e3}}'
)


def refuse(name: str) -> Any:
    """NaN and Infinity are Python's, not JSON's."""
    raise ValueError(name)


def is_object_by_the_standard_library(body: bytes) -> bool:
    """The slow and certain answer."""
    try:
        return isinstance(json.loads(body.decode("utf-8"), parse_constant=refuse), dict)
    except (ValueError, RecursionError):
        return False


@given(st.integers(0, len(GOOD) - 1), st.binary(max_size=3), st.integers(0, 3))
@example(1, b"\\", 1)
def test_what_is_accepted_is_json(at, insert, drop):
    """However a good body is damaged, it passes exactly when the standard library would read an object."""
    body = GOOD[:at] + insert + GOOD[at + drop :]
    assert is_json_object(body) == is_object_by_the_standard_library(body)


json_texts = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=10,
).map(lambda value: json.dumps(value).encode())


@given(json_texts)
def test_values_of_any_kind(body):
    """Lone surrogates pass, NaN does not, and only objects do."""
    assert is_json_object(body) == is_object_by_the_standard_library(body)


@given(st.binary(max_size=40))
def test_no_bytes_break_it(body):
    """Anything at all is judged, on every path."""
    for path in ("/v1/chat/completions", "/v1/embeddings", "/v1/responses", "/v1/other", ""):
        find_flaw(path, body)


def test_both_ways_find_the_same_flaws():
    """A lone surrogate sends a body the slow way; what is wrong with it is found there too."""
    for finish, flaw in (("stop", None), ("abort", Flaw.ABORTED)):
        for text in (b"plain", rb"\ud800"):
            body = b'{"choices":[{"finish_reason":"' + finish.encode() + b'","text":"' + text + b'"}]}'
            assert find_flaw("/v1/completions", body) is flaw
    assert find_flaw("/v1/completions", rb'{"x":"\ud800","choices":[]}') is Flaw.EMPTY
    assert find_flaw("/v1/completions", rb'{"x":"\ud800","choices":7}') is Flaw.MALFORMED


def test_a_deep_document_is_refused_not_fatal():
    """Nesting beyond what consumers parse is malformed, with and without a surrogate in it."""
    for text in (b"1", rb'"\ud800"'):
        assert find_flaw("/v1/other", b'{"a":' + b"[" * 5000 + text + b"]" * 5000 + b"}") is Flaw.MALFORMED


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        ("/v1/embeddings", b'{"input":[],"model":"m"}', True),
        ("/v1/embeddings?api-version=1", b'{"model":"m","input": [ \n]}', True),
        ("/v1/embeddings", b'{"input":[""]}', False),
        ("/v1/embeddings", b'{"input":[[]]}', False),
        ("/v1/embeddings", b'{"input":""}', False),
        ("/v1/embeddings", b'{"input":{}}', False),
        ("/v1/embeddings", b'{"input":null}', False),
        ("/v1/embeddings", b"{}", False),
        ("/v1/embeddings", b"[]", False),
        ("/v1/embeddings", b"nonsense", False),
        ("/v1/responses", b'{"input":[]}', False),
    ],
)
def test_only_an_empty_list_of_texts_asks_about_nothing(path, body, expected):
    """An empty text is a text, and nowhere else is an empty input a question."""
    assert asks_about_nothing(path, body) is expected


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/embeddings", "/v1/responses"])
def test_a_query_changes_nothing_about_what_an_answer_must_hold(path):
    """Azure's paths carry the version of the API."""
    assert find_flaw(f"{path}?api-version=2024-10-21&x=a/b", b"{}") is find_flaw(path, b"{}") is Flaw.EMPTY
