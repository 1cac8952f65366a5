"""Reading and writing lines of files and pipes."""

import gzip
import os
import resource
import subprocess
import sys
import threading

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.client.errors import InputError, OutputError, describe_os_error
from worker.client.io.codecs import Codec
from worker.client.io.files import CHUNK_BYTES, LineWriter, check_creatable, open_input, open_output

ENDINGS = ["jsonl", "jsonl.gz", "jsonl.zst"]
PACK = {"jsonl": bytes, "jsonl.gz": gzip.compress, "jsonl.zst": zstandard.compress}


def read_all(path, **options):
    reader = open_input(str(path), **options)
    try:
        lines = []
        while some := reader.read_lines():
            lines += some
        return lines
    finally:
        reader.close()


def unpack(path):
    data = path.read_bytes()
    if path.suffix == ".gz":
        return gzip.decompress(data)
    if path.suffix == ".zst":
        with zstandard.ZstdDecompressor().stream_reader(data, read_across_frames=True) as stream:
            return stream.read()
    return data


@pytest.mark.parametrize("ending", ENDINGS)
def test_lines_are_read_however_they_are_compressed(tmp_path, ending):
    """CRLF, a byte order mark, blank lines and a last line without its end are read alike in every format."""
    path = tmp_path / f"in.{ending}"
    path.write_bytes(PACK[ending](b"\xef\xbb\xbfa\r\n\n \t\nb\n" + b"c" * 10))
    assert [(line.number, line.data) for line in read_all(path)] == [(1, b"a"), (4, b"b"), (5, b"c" * 10)]


@pytest.mark.parametrize("ending", ENDINGS)
def test_files_larger_than_a_chunk(tmp_path, ending):
    """Lines that span chunks are returned whole, and the reader counts lines and bytes."""
    path = tmp_path / f"in.{ending}"
    lines = [os.urandom(50).hex().encode() * 40 for _ in range(200)]
    path.write_bytes(PACK[ending](b"\n".join(lines)))
    reader = open_input(str(path))
    first = reader.read_lines()
    assert 0 < len(first) == reader.lines_read < 200
    assert 0 < reader.bytes_read <= reader.bytes_total == path.stat().st_size
    rest = []
    while some := reader.read_lines():
        rest += some
    assert [line.data for line in [*first, *rest]] == lines
    assert reader.lines_read == 200
    assert reader.bytes_read == reader.bytes_total
    assert reader.read_lines() == []
    reader.close()
    reader.close()


def test_line_over_the_limit_is_not_kept(tmp_path):
    """A line over the limit is given out without its bytes; its neighbours are whole."""
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"a\n" + b"x" * (3 * CHUNK_BYTES) + b"\nb\n")
    lines = read_all(path, limit_bytes=CHUNK_BYTES)
    assert [(line.number, line.data, line.size) for line in lines] == [
        (1, b"a", 1),
        (2, b"", 3 * CHUNK_BYTES),
        (3, b"b", 1),
    ]


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_empty_input_has_no_lines(tmp_path, ending, content):
    """An empty file, and one of blank lines, has no lines and is no error."""
    path = tmp_path / f"in.{ending}"
    path.write_bytes(PACK[ending](content))
    assert read_all(path) == []


@pytest.mark.parametrize("name", ["in.jsonl", "in.jsonl.gz", "in.jsonl.zst"])
def test_zero_bytes_are_an_empty_input(tmp_path, name):
    """A file of no bytes is empty in every format."""
    (tmp_path / name).touch()
    assert read_all(tmp_path / name) == []


@pytest.mark.parametrize("ending", ENDINGS[1:])
def test_truncated_input_is_an_error_after_its_whole_lines(tmp_path, ending):
    """What can be read of a truncated file is given out first; its torn last line never is; the failure persists."""
    lines = [os.urandom(40).hex().encode() for _ in range(5000)]
    path = tmp_path / f"in.{ending}"
    path.write_bytes(PACK[ending](b"\n".join(lines))[:-20])
    reader = open_input(str(path))
    seen = list(reader.read_lines())
    while reader.bytes_read < reader.bytes_total:
        seen += reader.read_lines()
    assert seen
    assert [line.data for line in seen] == lines[: len(seen)]
    for _ in range(2):
        with pytest.raises(InputError, match="ends in the middle"):
            reader.read_lines()
    reader.close()


@pytest.mark.parametrize("name", ["in.jsonl.gz", "in.jsonl.zst"])
def test_plain_text_under_a_compressed_name(tmp_path, name):
    """A name that promises compression over text that is none is one clear error."""
    (tmp_path / name).write_bytes(b'{"path":"/v1/x"}\n')
    with pytest.raises(InputError, match="is damaged in the part that begins at byte 0"):
        read_all(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (gzip.compress(b"a\n"), "name end in .gz"),
        (zstandard.compress(b"a\n"), "name end in .zst"),
        ("a\n".encode("utf-16"), "UTF-16"),
    ],
    ids=["gzip", "zstd", "UTF-16"],
)
def test_foreign_encodings_are_recognised(tmp_path, content, text):
    """Compressed or UTF-16 input under a plain name is one clear error instead of one a line."""
    (tmp_path / "in.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=text):
        read_all(tmp_path / "in.jsonl")


def test_input_that_cannot_be_opened(tmp_path):
    """A missing file and a directory are named with what is wrong."""
    with pytest.raises(InputError, match=r"nothing\.jsonl: does not exist"):
        open_input(str(tmp_path / "nothing.jsonl"))
    with pytest.raises(InputError, match="is a directory"):
        open_input(str(tmp_path))


def test_output_that_cannot_be_opened(tmp_path):
    """A missing directory, a directory and a file in the place of a directory are named with what is wrong."""
    with pytest.raises(OutputError, match="its directory does not exist"):
        open_output(str(tmp_path / "nowhere" / "out.jsonl"))
    with pytest.raises(OutputError, match="is a directory"):
        open_output(str(tmp_path))
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="not a directory"):
        open_output(str(tmp_path / "file" / "out.jsonl"))


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (PermissionError(13, "x"), "permission denied"),
        (BrokenPipeError(32, "x"), "closed by its reader"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (OSError("odd"), "odd"),
    ],
)
def test_errors_of_the_system_are_put_into_words(error, text):
    """An error of the system becomes a phrase that follows a file's name."""
    assert text in describe_os_error(error)


@pytest.mark.parametrize("ending", ENDINGS)
@settings(max_examples=25)
@given(
    batches=st.lists(
        st.lists(st.binary(max_size=30).map(lambda data: data.replace(b"\n", b"")), max_size=4), max_size=4
    )
)
def test_what_is_written_is_read_back(tmp_path_factory, ending, batches):
    """Lines written in any batches, the file closed and continued between them, come back."""
    path = tmp_path_factory.mktemp("out") / f"out.{ending}"
    for batch in batches:
        writer = open_output(str(path))
        for line in batch:
            writer.write(line + b"\n")
        writer.close()
    if batches:
        assert unpack(path) == b"".join(line + b"\n" for batch in batches for line in batch)


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_write_is_with_the_system_when_it_returns(tmp_path, ending):
    """What was written can be read by others before the file is closed, so that SIGKILL does not lose it."""
    path = tmp_path / f"out.{ending}"
    writer = open_output(str(path))
    writer.write(b'{"id":"line-1-00000000"}\n')
    reader = open_input(str(path))
    assert [line.data for line in reader.read_lines()] == [b'{"id":"line-1-00000000"}']
    reader.close()
    writer.close()
    writer.close()


def test_full_disk_ends_writing():
    """A write that fails raises, and so does every later one, so that no line follows a torn one."""
    writer = open_output("/dev/full")
    for _ in range(2):
        with pytest.raises(OutputError, match="/dev/full"):
            writer.write(b"a\n")
    writer.close()


def test_torn_write_is_the_last(tmp_path):
    """After a write that stopped half way nothing is appended to the torn line, although there is room again."""
    path = tmp_path / "out.jsonl"
    writer = open_output(str(path))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))  # the disk is full after ten bytes
    try:
        with pytest.raises(OutputError):
            writer.write(b"a line of more than ten bytes\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with pytest.raises(OutputError, match="an earlier write failed"):
        writer.write(b"another\n")
    writer.close()
    assert path.read_bytes() == b"a line of "


def test_output_that_does_not_block_is_waited_for():
    """A pipe that another process has made non-blocking still takes every byte."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    writer = LineWriter("pipe", writing, Codec.PLAIN)
    data = os.urandom(1_000_000)
    received = []

    def read():
        while chunk := os.read(reading, 65_536):
            received.append(chunk)

    thread = threading.Thread(target=read)
    thread.start()
    try:
        writer.write(data)
    finally:
        writer.close()
        thread.join()
        os.close(reading)
    assert b"".join(received) == data


@pytest.mark.slow
def test_closed_pipe_is_an_output_error():
    """A reader of standard output that goes away (`| head`) is an error with words."""
    program = (
        "import sys\n"
        "from worker.client.errors import OutputError\n"
        "from worker.client.io.files import open_output\n"
        "writer = open_output('-')\n"
        "sys.stdin.read()\n"
        "try:\n"
        "    writer.write(b'x')\n"
        "except OutputError as error:\n"
        "    sys.stderr.write(str(error))\n"
    )
    child = subprocess.Popen([sys.executable, "-c", program], stdin=-1, stdout=-1, stderr=-1)
    child.stdout.close()
    child.stdin.close()
    assert child.stderr.read() == b"standard output: was closed by its reader"
    child.stderr.close()
    assert child.wait() == 0


def test_standard_streams_are_pipes_through(monkeypatch):
    """`-` reads standard input, gives lines out before the pipe ends, and has no size."""
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        reader = open_input("-")
        os.write(writing, b"a\nb")
        assert [line.data for line in reader.read_lines()] == [b"a"]
        assert reader.bytes_total is None
        os.close(writing)
        assert [line.data for line in reader.read_lines()] == [b"b"]
        reader.close()
        assert not stdin.closed


def test_whether_an_output_can_be_made_is_looked_at_without_making_it(tmp_path):
    """A folder that is missing is told; one that is there is fine, and stays empty."""
    check_creatable(str(tmp_path / "out.jsonl"))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OutputError, match="its directory does not exist"):
        check_creatable(str(tmp_path / "none" / "out.jsonl"))
    if os.geteuid():  # root may write everywhere
        tmp_path.chmod(0o500)
        with pytest.raises(OutputError, match="permission denied"):
            check_creatable(str(tmp_path / "out.jsonl"))
