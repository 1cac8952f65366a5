"""What is an answer among 2xx bodies, and what is none."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.policy.answers import Flaw, asks_about_nothing, find_flaw
from worker.wire.body import RequestBody


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
    assert asks_about_nothing(path, RequestBody(body)) is expected


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/embeddings", "/v1/responses"])
def test_a_query_changes_nothing_about_what_an_answer_must_hold(path):
    """Azure's paths carry the version of the API."""
    assert find_flaw(f"{path}?api-version=2024-10-21&x=a/b", b"{}") is find_flaw(path, b"{}") is Flaw.EMPTY


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", b'{"choices":[' + b"{}," * 3_000_000 + b"{}]}"),
        ("/v1/embeddings", b'{"data":[' + b"{}," * 3_000_000 + b"{}]}"),
        ("/v1/responses", b'{"output":[' + b"{}," * 3_000_000 + b"{}]}"),
        ("/v1/chat/completions", rb'{"x":"\ud800","choices":[' + b"[]," * 3_000_000 + b"[]]}"),
        ("/v1/chat/completions", rb'{"\ud800":[' + b"[]," * 3_000_000 + b"[]]}"),
    ],
    ids=["choices", "data", "output", "half a pair", "half a pair as key"],
)
def test_an_answer_that_holds_too_much_costs_no_time(path: str, body: bytes) -> None:
    """It is none, and nothing is built of it."""
    start = time.process_time()
    assert find_flaw(path, body) is Flaw.MALFORMED
    assert time.process_time() - start < 0.5


def test_a_long_answer_is_not_too_much() -> None:
    """Log probabilities of a hundred thousand tokens, and a text of brackets."""
    entries = b",".join([b'{"token":"a","logprob":-1,"top_logprobs":[]}'] * 100_000)
    head = b'{"choices":[{"finish_reason":"stop","logprobs":{"content":['
    assert find_flaw("/v1/chat/completions", head + entries + b"]}}]}") is None
    text = b'{"choices":[{"message":{"content":"' + b"{" * 300_000 + b'"}}]}'
    assert find_flaw("/v1/chat/completions", text) is None
