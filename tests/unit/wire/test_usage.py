"""Token usage as answers report it."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.wire.usage import Usage, read_usage


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        (
            {
                "prompt_tokens": 7,
                "completion_tokens": 9,
                "total_tokens": 16,
                "prompt_tokens_details": {"cached_tokens": 4, "audio_tokens": 0},
                "completion_tokens_details": {"reasoning_tokens": 5},
            },
            Usage(7, 9, 4, 5),
        ),
        (
            {
                "input_tokens": 7,
                "output_tokens": 0,
                "input_tokens_details": {"cached_tokens": 0},
                "output_tokens_details": {"reasoning_tokens": 0},
            },
            Usage(7, 0, 0, 0),
        ),
        ({"prompt_tokens": 8, "total_tokens": 8}, Usage(8)),
        ({"prompt_tokens": 7, "completion_tokens": None, "prompt_tokens_details": None}, Usage(7)),
        ({"prompt_tokens": -1, "completion_tokens": 3}, Usage(None, 3)),
        ({"prompt_tokens": -1, "input_tokens": 3}, Usage(3)),
        ({}, Usage()),
    ],
    ids=["chat", "responses", "embeddings", "nulls", "unknown as -1", "both names", "empty"],
)
def test_usage_is_read_by_either_name(usage: dict[str, object], expected: Usage) -> None:
    """Chat completions and the Responses API name the same counts differently; absent is not zero."""
    assert read_usage(json.dumps({"id": "x", "usage": usage}).encode()) == expected


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"nonsense",
        b"[]",
        b'{"usage":null}',
        b'{"id":1}',
        b'{"usage":"many"}',
        b'{"usage":{"prompt_tokens":"12"}}',
        b'{"usage":{"prompt_tokens":1e999}}',
        b'{"usage":{"prompt_tokens":%d}}' % 10**30,
        b'{"usage":{"prompt_tokens":%s}}' % (b"9" * 5000),
        b"\xff",
        b'{"a":' * 5000,
    ],
    ids=lambda body: repr(body[:30]),
)
def test_what_cannot_be_read_is_no_usage(body: bytes) -> None:
    """Nonsense in an answer is no error: there is just no count."""
    assert read_usage(body) is None


@given(st.binary(max_size=64) | st.text().map(str.encode))
def test_reading_never_raises(body: bytes) -> None:
    """The answer is out already when it is read: nothing may go wrong then."""
    read_usage(body)
    read_usage(b'{"usage":{"prompt_tokens":' + body + b"}}")


def test_kinds_are_those_that_are_known() -> None:
    """A count that the backend did not give is no metric, a zero is."""
    assert list(Usage(3, 0).kinds()) == [("input", 3), ("output", 0)]
