"""Changing keys of a body: what is not changed keeps its bytes."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.backends.request.body import is_set, raw, read_fields, value_of, with_changes

ODD = b'{ "n" : 12345678901234567890 ,"x":"\\u00e9\xc3\xa9", "f":1.50e2,\n"o" :{"b":1, "a":2},"l": [ ] }'

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.text(max_size=3) | st.sampled_from(["stream", "stream_options"]), JSON, max_size=6)


def changed(body: bytes, **changes: bytes | None) -> bytes:
    fields = read_fields(body)
    assert fields is not None
    return with_changes(body, fields, changes)


def test_new_keys_stand_in_front_and_every_byte_stays() -> None:
    """Spaces, big numbers, escapes and the order of keys are as they were."""
    assert changed(ODD, stream=b"true", s=b"{}") == b'{"stream":true,"s":{},' + ODD[1:]


def test_an_empty_object_gets_no_comma() -> None:
    """Neither before nor behind the new key."""
    assert changed(b"{}", a=b"1") == b'{"a":1}'
    assert changed(b" { } ", a=b"1") == b' {"a":1 } '


def test_a_replaced_key_keeps_its_place_and_the_others_their_bytes() -> None:
    """Only what stands between the values is written anew."""
    assert changed(ODD, x=b"false") == (b'{"n":12345678901234567890,"x":false,"f":1.50e2,"o":{"b":1, "a":2},"l":[ ]}')


def test_a_key_is_removed_and_one_that_is_not_there_is_no_change() -> None:
    """Nothing to do leaves the very bytes."""
    assert changed(b'{"a": 1 , "b":2}', b=None) == b'{"a":1}'
    assert changed(b'{"a": 1}', a=None) == b"{}"
    assert changed(ODD, stream=None) is ODD
    assert changed(ODD) is ODD


def test_of_a_key_given_twice_the_last_one_counts() -> None:
    """As in every server's parser."""
    assert changed(b'{"stream":true,"stream":false}', stream=b"true") == b'{"stream":true}'


@pytest.mark.parametrize("body", [b"", b"[]", b"1", b'"x"', b'{"a":}', b'{"a":1', b"\xff", b'{"a":' * 2000 + b"1"])
def test_what_is_no_object_has_no_fields(body: bytes) -> None:
    """The backend will say what is wrong with it."""
    assert read_fields(body) is None


@given(OBJECTS, OBJECTS, st.booleans())
def test_the_result_is_the_object_with_the_changes(body: dict, more: dict, ascii_only: bool) -> None:
    """Whatever the keys and values: decoded, it is what changing the decoded object gives."""
    data = json.dumps(body, ensure_ascii=ascii_only, indent=1).encode("utf-8", "surrogatepass")
    fields = read_fields(data)
    if fields is None:  # half a surrogate pair
        return
    drop = next(iter(more), None)
    changes = {key: None if key == drop else json.dumps(value).encode() for key, value in more.items()}
    got = json.loads(with_changes(data, fields, changes))
    assert got == {key: value for key, value in {**body, **more}.items() if key != drop}
    kept = read_fields(with_changes(data, fields, changes))
    assert kept is not None
    assert all(raw(kept, key) == raw(fields, key) for key in fields if key not in changes)


def test_what_is_set() -> None:
    """Null, false, zero and emptiness ask for nothing."""
    fields = read_fields(b'{"a":null,"b":false,"c":[],"d":{},"e":"","f":0,"g":true,"h":[0]}')
    assert fields is not None
    assert [key for key in [*"abcdefgh", "z"] if is_set(fields, key)] == ["g", "h"]
    assert (value_of(fields, "h"), value_of(fields, "z"), raw(fields, "z")) == ([0], None, b"")
