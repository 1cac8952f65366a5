"""Compressed streams: parts, flushes, bounds."""

import gzip
import struct

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from worker.client.errors import DamagedStreamError
from worker.client.io.codecs import MAX_PIECE_BYTES, Codec, Decoder, Encoder, codec_of

COMPRESSED = [Codec.GZIP, Codec.ZSTD]


def decode(codec, data, step=1 << 16):
    decoder = Decoder(codec)
    out = [piece for at in range(0, len(data), step) for piece in decoder.feed(data[at : at + step])]
    return b"".join(out), decoder


@pytest.mark.parametrize(
    ("path", "codec"),
    [
        ("-", "plain"),
        ("a.jsonl", "plain"),
        ("a.jsonl.gz", "gzip"),
        ("A.GZ", "gzip"),
        ("a.zst", "zstd"),
        ("gz", "plain"),
    ],
)
def test_codec_comes_from_the_ending(path, codec):
    """The file name's ending decides."""
    assert codec_of(path) == codec


@given(
    st.sampled_from(list(Codec)), st.lists(st.lists(st.binary(max_size=50), max_size=4), max_size=4), st.integers(1, 40)
)
def test_round_trip_over_parts_and_cuts(codec, parts, step):
    """What was encoded in any number of parts comes back, however the compressed bytes are cut."""
    encoder = Encoder(codec)
    data = b""
    for part in parts:
        data += b"".join(encoder.encode(piece) for piece in part) + encoder.end()
    out, decoder = decode(codec, data, step)
    assert out == b"".join(piece for part in parts for piece in part)
    assert not decoder.is_torn


@pytest.mark.parametrize("codec", COMPRESSED)
def test_every_encode_can_be_read_back_from_a_torn_part(codec):
    """After each call of `encode`, everything given so far can be decompressed although the part has no end."""
    encoder = Encoder(codec)
    written, given_so_far = b"", b""
    for number in range(20):
        given_so_far += b"line %d\n" % number
        written += encoder.encode(b"line %d\n" % number)
        out, decoder = decode(codec, written)
        assert out == given_so_far
        assert decoder.is_torn
        assert decoder.part_start == 0


@pytest.mark.parametrize("codec", COMPRESSED)
def test_part_start_is_where_the_torn_part_begins(codec):
    """A torn part is located exactly, so that what stands before it can be kept."""
    encoder = Encoder(codec)
    first = encoder.encode(b"a" * 5000) + encoder.end()
    second = encoder.encode(b"b" * 5000) + encoder.end()
    for size in range(1, len(second)):
        _, decoder = decode(codec, first + second[:size], 7)
        assert decoder.is_torn
        assert decoder.part_start == len(first)
    _, decoder = decode(codec, first + second, 7)
    assert (decoder.is_torn, decoder.part_start) == (False, len(first + second))


@pytest.mark.parametrize(
    ("codec", "data"),
    [
        (Codec.GZIP, gzip.compress(b"hello", mtime=0) + gzip.compress(b" world", mtime=0) + b"\0" * 512),
        (
            Codec.ZSTD,
            zstandard.compress(b"hello") + struct.pack("<II", 0x184D2A50, 3) + b"xyz" + zstandard.compress(b" world"),
        ),
    ],
    ids=["gzip-with-padding", "zstd-with-skippable-frame"],
)
def test_files_of_other_tools_are_read(codec, data):
    """Several members or frames, zero padding and skippable frames are part of the formats."""
    out, decoder = decode(codec, data, 5)
    assert out == b"hello world"
    assert not decoder.is_torn


def test_our_gzip_is_read_by_other_tools():
    """A flushed and continued file is an ordinary gzip file."""
    encoder = Encoder(Codec.GZIP)
    data = encoder.encode(b"a\n") + encoder.encode(b"b\n") + encoder.end() + encoder.encode(b"c\n") + encoder.end()
    assert gzip.decompress(data) == b"a\nb\nc\n"


def test_a_zstd_bomb_comes_out_in_bounded_pieces():
    """A few bytes that expand to 48 MB never make a piece larger than the limit."""
    size = 48 * 1024 * 1024
    sizes = [len(piece) for piece in Decoder(Codec.ZSTD).feed(zstandard.compress(b"\0" * size))]
    assert sum(sizes) == size
    assert max(sizes) <= MAX_PIECE_BYTES


@pytest.mark.parametrize("limit", [1, 100, 258, 1000, 100_000])
@pytest.mark.parametrize("step", [1, 3, 1000])
def test_a_gzip_bomb_comes_out_in_bounded_pieces(limit, step):
    """No piece is larger than the limit, and none is left inside when one input byte makes more than that."""
    data = gzip.compress(b"\0" * 100_000, mtime=0)
    decoder = Decoder(Codec.GZIP, max_piece_bytes=limit)
    sizes = [len(piece) for at in range(0, len(data), step) for piece in decoder.feed(data[at : at + step])]
    assert sum(sizes) == 100_000
    assert max(sizes) <= limit
    assert not decoder.is_torn


@pytest.mark.parametrize("codec", COMPRESSED)
def test_damage_is_named_with_its_place(codec):
    """Bytes that do not belong there raise, with the offset of the part."""
    encoder = Encoder(codec)
    first = encoder.encode(b"a" * 100) + encoder.end()
    with pytest.raises(DamagedStreamError, match=f"byte {len(first)}") as failure:
        decode(codec, first + b"this is no header at all")
    assert failure.value.offset == len(first)


def test_the_limit_of_a_piece_holds_nothing_back():
    """Of a torn gzip part as much comes out in small pieces as in one."""
    data = gzip.compress(b"\0" * 3000 + b"abc" * 500, mtime=0)
    for size in range(1, len(data)):
        small = b"".join(Decoder(Codec.GZIP, max_piece_bytes=1).feed(data[:size]))
        assert small == b"".join(Decoder(Codec.GZIP).feed(data[:size]))
