"""Control messages: what they say, and what is none."""

import pytest

from worker.errors import MessageError
from worker.wire.control import MAX_IDS, decode_control, encode_cancel


def test_what_is_written_is_read() -> None:
    """Ids, attributes and the time at which it was published."""
    request = decode_control(encode_cancel(["1", "2"], {"run_id": "r"}), 7.0)
    assert (request.message_ids, dict(request.attributes), request.published_at) == ({"1", "2"}, {"run_id": "r"}, 7.0)


def test_running_attempts_may_be_spared() -> None:
    """Only where it is asked for, and then it is on the wire."""
    spared = encode_cancel([], {"run_id": "r"}, let_running_finish=True)
    assert decode_control(spared, 0.0).let_running_finish
    assert not decode_control(encode_cancel([], {"run_id": "r"}), 0.0).let_running_finish
    assert encode_cancel(["1"], {}) == b'{"cancel":{"message_ids":["1"]}}'


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "cannot be read"),
        (b"{}", "cannot be read"),
        (b'{"cancel":{"messageids":["1"]}}', "unknown field"),
        (b'{"cancel":{"message_ids":[1]}}', "cannot be read"),
        (b'{"cancel":{}}', "cancels nothing"),
        (b"\xff", "cannot be read"),
        (encode_cancel(["1"] * (MAX_IDS + 1), {}), "more than"),
    ],
)
def test_what_is_none_is_told(data: bytes, words: str) -> None:
    """A mistake must not cancel everything, nor pass for a cancellation."""
    with pytest.raises(MessageError, match=words):
        decode_control(data, 0.0)
