"""Unpacking: the same whatever the pieces, and never more of it at once than a bound."""

import gzip
import zlib
from collections.abc import Callable, Iterable

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.backends.http.coding import PIECE_BYTES, decoder_for
from worker.errors import BackendError
from worker.policy.model import Fault


def deflate(body: bytes, bits: int) -> bytes:
    packer = zlib.compressobj(wbits=bits)
    return packer.compress(body) + packer.flush()


PACKERS: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "gzip": ("gzip", gzip.compress),
    "gzip by its old name": ("X-GZip", gzip.compress),
    "gzip in members": ("gzip", lambda body: gzip.compress(body[:7]) + gzip.compress(b"") + gzip.compress(body[7:])),
    "gzip with padding": ("gzip", lambda body: gzip.compress(body) + bytes(9)),
    "deflate": ("deflate", lambda body: deflate(body, 15)),
    "raw deflate": ("deflate", lambda body: deflate(body, -15)),
    "zstd": ("zstd", zstandard.compress),
    "zstd in frames": ("zstd", lambda body: zstandard.compress(body[:7]) + zstandard.compress(body[7:])),
    "zstd of unknown size": ("zstd", lambda body: zstandard.ZstdCompressor(write_content_size=False).compress(body)),
}
BODIES = [b"", b"{}", b'{"a": 1}' * 9, bytes(range(256)) * 300, b"a" * 5 * PIECE_BYTES]


def unpack(coding: str, pieces: Iterable[bytes]) -> bytes:
    decoder = decoder_for(coding)
    assert decoder is not None
    unpacked = b"".join(piece for data in pieces for piece in decoder.feed(data))
    decoder.close()
    return unpacked


@pytest.mark.parametrize(("coding", "pack"), PACKERS.values(), ids=PACKERS)
@pytest.mark.parametrize("body", BODIES, ids=lambda body: f"{len(body)} bytes")
@pytest.mark.parametrize("size", [1, 7, 1 << 30])
def test_a_body_comes_out_as_it_was_packed(coding: str, pack: Callable[[bytes], bytes], body: bytes, size: int) -> None:
    """Whatever the pieces."""
    packed = pack(body)
    assert unpack(coding, (packed[at : at + size] for at in range(0, len(packed), size))) == body


@pytest.mark.parametrize("coding", ["gzip", "deflate", "zstd"])
def test_no_bytes_are_an_empty_body(coding: str) -> None:
    """Servers label answers that have no body."""
    assert unpack(coding, []) == b""


@pytest.mark.parametrize(("coding", "pack"), PACKERS.values(), ids=PACKERS)
def test_a_cut_body_says_so(coding: str, pack: Callable[[bytes], bytes]) -> None:
    """At any byte: what came is a beginning, and the end is missing."""
    body = b'{"a": [1, 2, 3]}' * 20
    packed = pack(body)
    whole, said = 0, set()
    for end in range(1, len(packed)):
        decoder = decoder_for(coding)
        assert decoder is not None
        came = b"".join(decoder.feed(packed[:end]))
        assert body.startswith(came)
        try:
            decoder.close()
        except BackendError as error:
            said.add((error.fault, "ended early" in error.detail))
        else:
            whole += 1  # a border of members or frames, or inside of padding
    assert said == {(Fault.DECODING, True)}
    assert whole <= 9


@pytest.mark.parametrize("coding", ["gzip", "deflate", "zstd"])
def test_what_is_not_packed_says_so(coding: str) -> None:
    """In the words of the library, with the name of the coding."""
    with pytest.raises(BackendError, match=f"Content-Encoding {coding}: .{{9,}}") as caught:
        unpack(coding, [b"\xff\xff no such thing \xff\xff"])
    assert caught.value.fault is Fault.DECODING


@pytest.mark.parametrize("coding", ["br", "BR ", "gzip, br", "compress"])
def test_what_cannot_be_unpacked_says_so(coding: str) -> None:
    """It was not asked for."""
    with pytest.raises(BackendError, match="was not asked for"):
        decoder_for(coding)


@pytest.mark.parametrize("coding", ["", "identity", "utf-8", "none"])
def test_what_is_no_coding_changes_nothing(coding: str) -> None:
    """Some servers write there what they like."""
    assert decoder_for(coding) is None


@pytest.mark.parametrize(
    ("coding", "pack", "bound"),
    [("gzip", gzip.compress, PIECE_BYTES), ("zstd", zstandard.compress, 4_000_000)],
)
def test_a_bomb_comes_in_pieces(coding: str, pack: Callable[[bytes], bytes], bound: int) -> None:
    """A few bytes become a gigabyte only one piece after the other, and only if all of them are asked for."""
    packed = pack(bytes(50_000_000)) * 20
    decoder = decoder_for(coding)
    assert decoder is not None
    seen = 0
    for piece in decoder.feed(packed):
        assert len(piece) <= bound
        seen += len(piece)
        if seen > 100_000_000:
            break
    assert seen < 100_000_000 + bound + 1


@settings(max_examples=200)
@given(st.sampled_from(["gzip", "deflate", "zstd"]), st.binary(max_size=200), st.binary(max_size=20))
def test_garbage_is_an_error_or_a_body(coding: str, body: bytes, garbage: bytes) -> None:
    """Nothing else comes out of a decoder."""
    packed = {"gzip": gzip.compress, "deflate": zlib.compress, "zstd": zstandard.compress}[coding](body)
    faults = set()
    for data in (garbage, packed + garbage, packed[: len(packed) // 2] + garbage):
        try:
            unpack(coding, [data])
        except BackendError as error:
            faults.add(error.fault)
    assert faults <= {Fault.DECODING}
