"""JSON objects whose bytes are not ours: what is not changed keeps its bytes, and what is embedded is JSON."""

import json
import tracemalloc
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from worker.wire.body import KEYS, BodyRules, RequestBody, is_json_object

ODD = b'{ "n" : 12345678901234567890 ,"x":"\\u00e9\xc3\xa9", "f":1.50e2,\n"o" :{"b":1, "a":2},"l": [ ] }'

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.text(max_size=3) | st.sampled_from(["stream", "stream_options", "n"]), JSON, max_size=6)


CHANGES = st.dictionaries(st.sampled_from(["stream", "stream_options", "n", "prompt"]), JSON, max_size=4)


def changed(body: bytes, **changes: bytes | None) -> bytes:
    return RequestBody(body).with_changes(changes)


def test_new_keys_stand_in_front_and_every_byte_stays() -> None:
    """Spaces, big numbers, escapes and the order of keys are as they were."""
    assert changed(ODD, stream=b"true", input=b"{}") == b'{"stream":true,"input":{},' + ODD[1:]


def test_an_empty_object_gets_no_comma() -> None:
    """Neither before nor behind the new key."""
    assert changed(b"{}", n=b"1") == b'{"n":1}'
    assert changed(b" { } ", n=b"1") == b' {"n":1 } '


def test_a_replaced_key_keeps_its_place_and_the_others_their_bytes() -> None:
    """Only what stands between the values is written anew."""
    assert changed(ODD, n=b"false") == (b'{"n":false,"x":"\\u00e9\xc3\xa9","f":1.50e2,"o":{"b":1, "a":2},"l":[ ]}')


def test_a_key_is_removed_and_one_that_is_not_there_is_no_change() -> None:
    """Nothing to do leaves the very bytes."""
    assert changed(b'{"a": 1 , "n":2}', n=None) == b'{"a":1}'
    assert changed(b'{"n": 1}', n=None) == b"{}"
    assert changed(ODD, stream=None) is ODD
    assert changed(ODD) is ODD


def test_of_a_key_given_twice_the_last_one_counts() -> None:
    """As in every server's parser."""
    assert changed(b'{"stream":true,"stream":false}', stream=b"true") == b'{"stream":true}'


@pytest.mark.parametrize("body", [b"", b"[]", b"1", b'"x"', b'{"a":}', b'{"a":1', b"\xff", b'{"a":' * 2000 + b"1"])
def test_what_is_no_object_has_no_fields(body: bytes) -> None:
    """The backend will say what is wrong with it."""
    seen = RequestBody(body)
    assert (seen.is_object, seen.raw("n"), seen.is_set("n")) == (False, b"", False)


@given(OBJECTS, CHANGES, st.booleans())
def test_the_result_is_the_object_with_the_changes(body: dict, more: dict, ascii_only: bool) -> None:
    """Whatever the keys and values: decoded, it is what changing the decoded object gives."""
    data = json.dumps(body, ensure_ascii=ascii_only, indent=1).encode("utf-8", "surrogatepass")
    before = RequestBody(data)
    if not before.is_object:  # half a surrogate pair
        return
    drop = next(iter(more), None)
    changes = {key: None if key == drop else json.dumps(value).encode() for key, value in more.items()}
    after = RequestBody(before.with_changes(changes))
    got = json.loads(after.data)
    assert got == {key: value for key, value in {**body, **more}.items() if key != drop}
    assert all(after.raw(key) == before.raw(key) for key in KEYS if key not in changes)


def test_what_is_set() -> None:
    """Null, false, zero and emptiness ask for nothing."""
    body = RequestBody(
        b'{"n":null,"echo":false,"tools":[],"regex":{},"model":"","logprobs":0,"stream":true,"input":[0]}'
    )
    assert [key for key in KEYS if body.is_set(key)] == ["input", "stream"]
    assert (body.raw("input"), body.raw("prompt")) == (b"[0]", b"")


def test_no_object_is_built_of_what_is_not_looked_at() -> None:
    """Ten megabytes of keys or of empty lists cost time and memory of nothing but a scan."""
    many = b",".join(b'"k%d":[]' % number for number in range(400_000))
    nested = b'"n":[' + b"[]," * 2_000_000 + b"[]]"
    for data in (b"{" + many + b"}", b"{" + nested + b"}", b'{"stream":false,' + many + b"}"):
        body = RequestBody(data)
        tracemalloc.start()
        try:
            assert body.is_object
            body.with_changes({"stream": b"true"})
            assert tracemalloc.get_traced_memory()[1] < 4 * len(data)
        finally:
            tracemalloc.stop()


def test_a_body_shows_its_size_and_not_its_words() -> None:
    """A representation ends up in logs; two bodies are equal when their bytes are."""
    assert repr(RequestBody(b'{"a":"secret"}')) == "RequestBody(14 bytes)"
    assert len({RequestBody(b"{}"), RequestBody(b"{}"), RequestBody(b"{ }")}) == 2


# Testing for an object

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


@pytest.mark.parametrize(
    ("data", "verdict"),
    [
        *[(b"{}", True), (b' {"a":[]}\n', True), (b"[]", False), (b"", False), (b'{"a":NaN}', False), (b"{", False)],
        *[(b'{"a":"\xff"}', False), (b'{"\xff":1}', False), (b'{"a":' + b"[" * 5000, False), (b"<html>", False)],
    ],
)
def test_json_objects_are_recognised(data: bytes, verdict: bool) -> None:
    """Only a valid JSON object in UTF-8 may be embedded in an answer."""
    assert is_json_object(data) is verdict


# Changes that an operator declared


@pytest.mark.parametrize(
    ("body", "defaults", "overrides", "expected"),
    [
        (b'{"n": 1}', {}, {}, b'{"n": 1}'),
        (b'{"n": 1}', {"t": 0.5}, {}, b'{"t":0.5,"n": 1}'),
        (b"{ }", {"t": None}, {"u": [1]}, b'{"t":null,"u":[1] }'),
        (b'{"t": null, "n": 1}', {"t": 0.5}, {}, b'{"t": null, "n": 1}'),
        (b'{"t": 2}', {}, {"t": 2}, b'{"t": 2}'),
        (b'{"a": 1e2, "t": 2}', {"d": "x"}, {"t": 3}, b'{"d":"x","a":1e2,"t":3}'),
        (b'{"\\u0074": 2}', {}, {"t": 3}, b'{"t":3}'),
        (b'{"t": 1, "t": 2}', {}, {"t": 3}, b'{"t":3}'),
    ],
)
def test_declared_changes(body: bytes, defaults: dict[str, Any], overrides: dict[str, Any], expected: bytes) -> None:
    """Defaults fill, overrides win, and what neither names stays byte for byte, whatever its key."""
    assert BodyRules(defaults, overrides).apply(RequestBody(body)).data == expected


def test_a_body_that_needs_no_change_is_the_same_object() -> None:
    """Nothing is copied."""
    body = RequestBody(b'{"t":1}')
    assert BodyRules({"t": 2}, {}).apply(body) is body
    assert not BodyRules({}, {})
    assert BodyRules({}, {"t": 1})


@pytest.mark.parametrize("body", [b'{"a":"\\ud800"}', b"[]", b'{"a":' + b"[" * 5000])
def test_a_body_that_cannot_be_changed_is_told(body: bytes) -> None:
    """An override that silently did not apply would let a requester go round it."""
    with pytest.raises(ValueError, match=r"surrogate|no JSON"):
        BodyRules({}, {"t": 1}).apply(RequestBody(body))


def test_a_body_of_too_many_keys_is_told() -> None:
    """Replacing one of them would build an object of each."""
    body = b'{"t":1,' + b",".join(b'"%d":0' % number for number in range(200_001)) + b"}"
    with pytest.raises(ValueError, match="too many keys"):
        BodyRules({}, {"t": 2}).apply(RequestBody(body))
