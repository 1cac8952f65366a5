"""Frames of an event stream: read however they are cut, and noticed when one bit of them is wrong."""

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.event_stream import HeaderValue, error, exception, frame, part, parts
from worker.backends.streams.eventstream import FrameReader, Part, ServiceError
from worker.errors import BackendError

# The examples of the specification, as its implementations have them in their tests: headers, payload, bytes.
EXAMPLES: dict[str, tuple[dict[str, HeaderValue], bytes, bytes]] = {
    "nothing": ({}, b"", b"\x00\x00\x00\x10\x00\x00\x00\x00\x05\xc2H\xeb}\x98\xc8\xff"),
    "a number": (
        {"event-id": 40972},
        b"{'foo':'bar'}",
        b"\x00\x00\x00+\x00\x00\x00\x0e4\x8b\xec{\x08event-id\x04\x00\x00\xa0\x0c{'foo':'bar'}\xd3\x89\x02\x85",
    ),
    "a payload": ({}, b"{'foo':'bar'}", b"\x00\x00\x00\x1d\x00\x00\x00\x00\xfdR\x8cZ{'foo':'bar'}\xc3e96"),
    "a text": (
        {"content-type": "application/json"},
        b"{'foo':'bar'}",
        b"\x00\x00\x00=\x00\x00\x00 \x07\xfd\x83\x96\x0ccontent-type\x07\x00\x10application/json{'foo':'bar'}\x8d\x9c\x08\xb1",
    ),
    "an error": (
        {":message-type": "error", ":error-code": "code", ":error-message": "message"},
        b"",
        b"\x00\x00\x00R\x00\x00\x00B\xbf#c~\r:message-type\x07\x00\x05error\x0b:error-code\x07\x00\x04code\x0e:error-message\x07\x00\x07messagekl\xea=",
    ),
}


@pytest.mark.parametrize(("headers", "payload", "data"), EXAMPLES.values(), ids=EXAMPLES)
def test_the_tests_encoder_writes_what_the_specification_says(
    headers: dict[str, HeaderValue], payload: bytes, data: bytes
) -> None:
    """So that the reader is tested against something that does not come from it."""
    assert frame(headers, payload) == data


def read(*pieces: bytes) -> list[Part | ServiceError]:
    """Everything that whole frames hold."""
    reader = FrameReader()
    found = [item for piece in pieces for item in reader.feed(piece)]
    reader.close()
    return found


SEVERAL = part(b"Hel") + part(b"lo") + exception("ModelStreamError", ErrorCode="StreamBroken", Message="gone")


def test_frames_are_the_same_wherever_they_are_cut() -> None:
    """At every byte: into two pieces, and into pieces of that size."""
    whole = read(SEVERAL)
    assert [type(item) for item in whole] == [Part, Part, ServiceError]
    for cut in range(1, len(SEVERAL)):
        assert read(SEVERAL[:cut], SEVERAL[cut:]) == whole
        assert read(*(SEVERAL[at : at + cut] for at in range(0, len(SEVERAL), cut))) == whole


def test_an_end_inside_a_frame_is_noticed() -> None:
    """What HTTP calls a whole body may be half a frame; between two frames it is not for this reader to say."""
    boundaries = {len(part(b"Hel")), len(part(b"Hel") + part(b"lo"))}
    for end in range(1, len(SEVERAL)):
        reader = FrameReader()
        list(reader.feed(SEVERAL[:end]))
        if end in boundaries:
            reader.close()
            continue
        with pytest.raises(BackendError, match="stream_broken: the response ended inside a frame"):
            reader.close()


def test_a_flipped_bit_is_never_an_answer() -> None:
    """At every byte: a sum is wrong, or the frame never ends."""
    for at in range(len(SEVERAL)):
        spoilt = SEVERAL[:at] + bytes((SEVERAL[at] ^ 0x10,)) + SEVERAL[at + 1 :]
        with pytest.raises(BackendError, match="stream_broken"):
            read(spoilt)


@given(st.binary(max_size=300), st.integers(1, 40))
def test_any_payload_in_parts_of_any_size(data: bytes, size: int) -> None:
    """No byte of an answer is special."""
    assert b"".join(item.payload for item in read(parts(data, size)) if isinstance(item, Part)) == data


@given(st.binary(max_size=200))
def test_whatever_comes_only_one_error_is_raised(data: bytes) -> None:
    """A server that speaks another protocol inside the frames' content type is a broken stream."""
    with contextlib.suppress(BackendError):
        read(data)


def test_lengths_that_make_no_sense() -> None:
    """With sums that are right: no endless loop, no other exception."""
    import struct
    from zlib import crc32

    for total, headers in ((0, 0), (4, 0), (12, 0), (16, 5), (30, 200), (0x7FFFFFFF, 0), (40, 0x7FFFFFFF)):
        prelude = struct.pack(">II", total, headers)
        with pytest.raises(BackendError, match="stream_broken"):
            read(prelude + struct.pack(">I", crc32(prelude)) + bytes(64))


def test_what_an_exception_says() -> None:
    """Its name, its code and its text, in the shape that errors of the service have elsewhere."""
    (found,) = read(exception("ModelStreamError", ErrorCode="ModelInvocationTimeExceeded", Message="too long"))
    assert isinstance(found, ServiceError)
    assert found.name == "ModelStreamError"
    assert json.loads(found.body) == {"ErrorCode": "ModelInvocationTimeExceeded", "Message": "too long"}
    (found,) = read(exception("InternalStreamFailure", Message="x"))
    assert isinstance(found, ServiceError)
    assert json.loads(found.body) == {"ErrorCode": "InternalStreamFailure", "Message": "x"}
    (found,) = read(error("Throttled", "slow down"))
    assert isinstance(found, ServiceError)
    assert (found.name, json.loads(found.body)) == ("Throttled", {"ErrorCode": "Throttled", "Message": "slow down"})


@pytest.mark.parametrize("payload", [b"", b"no JSON", b"[]", b"\xff", b'{"Message": 5}'])
def test_an_exception_without_a_usable_body(payload: bytes) -> None:
    """Is one all the same."""
    (found,) = read(frame({":message-type": "exception", ":exception-type": "ModelStreamError"}, payload))
    assert isinstance(found, ServiceError)
    assert json.loads(found.body)["ErrorCode"] == "ModelStreamError"


def test_unknown_events_and_empty_parts_are_passed_over() -> None:
    """A kind of event that a later version of the service may send is no part of the answer."""
    other = frame({":message-type": "event", ":event-type": "Heartbeat"}, b"x")
    assert read(other + part(b"") + part(b"a")) == [Part(b"a")]
