"""Going on where a run stopped."""

import gzip
import os
import shutil

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.client.errors import OutputError
from worker.client.io.codecs import Encoder, codec_of
from worker.client.io.files import open_output
from worker.client.io.lines import parse_line_id
from worker.client.resume import (
    _MAX_GAP,
    RECOVERING_SUFFIX,
    AnsweredLines,
    drop_answers,
    number_of,
    refuse_same_file,
    resume_output,
)

NAMES = ["out.jsonl", "out.jsonl.gz", "out.jsonl.zst"]
LINES = [
    b'{"id":"line-1-00000001","body":"\xc3\xa9"}\n',
    b'{"id":"batch_req_line-2-00000002","custom_id":"x"}\n',
    b'{"id":"line-3-00000003","status_code":400}\n',
]
IDS = ["line-1-00000001", "line-2-00000002", "line-3-00000003"]

numbers = st.integers(1, 30) | st.integers(1, 10**17) | st.integers(_MAX_GAP - 3, _MAX_GAP + 40)
ids = st.builds(
    lambda number, digest: f"line-{number}-{digest:08x}", numbers, st.sampled_from([0, 1, 2**31, 2**32 - 1])
)


def unpack(path):
    data = path.read_bytes()
    if path.suffix == ".gz":
        return gzip.decompress(data)
    if path.suffix == ".zst":
        with zstandard.ZstdDecompressor().stream_reader(data, read_across_frames=True) as stream:
            return stream.read()
    return data


def pack(name, *parts):
    """Return a file of several runs, each with one write per line."""
    encoder = Encoder(codec_of(name))
    return b"".join(b"".join(map(encoder.encode, part)) + encoder.end() for part in parts)


def continue_run(path):
    """Resume and answer every line without an answer, as a run would; return the removed bytes."""
    resumed = resume_output(str(path))
    for line, line_id in zip(LINES, IDS, strict=True):
        if line_id not in resumed.answered:
            resumed.writer.write(line)
    resumed.writer.close()
    return resumed.dropped_bytes


@pytest.mark.parametrize("name", NAMES)
def test_missing_output_is_created(tmp_path, name):
    """Without an output there is nothing answered, and the file is made."""
    resumed = resume_output(str(tmp_path / name))
    assert (len(resumed.answered), resumed.dropped_bytes) == (0, 0)
    resumed.writer.close()
    assert (tmp_path / name).read_bytes() == b""


@pytest.mark.parametrize("name", NAMES)
def test_finished_output_is_left_alone(tmp_path, name):
    """A complete output has every line answered, and continuing adds nothing."""
    path = tmp_path / name
    path.write_bytes(pack(name, LINES[:2], LINES[2:]))
    before = path.read_bytes()
    assert continue_run(path) == 0
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", NAMES)
def test_torn_at_every_byte(tmp_path, name):
    """Wherever a kill cut the file, resuming leaves exactly one whole answer per line, and keeps every whole one."""
    whole = pack(name, LINES[:2], LINES[2:])
    path = tmp_path / name
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        continue_run(path)
        assert sorted(unpack(path).splitlines(keepends=True)) == sorted(LINES), size
        assert [entry.name for entry in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", NAMES)
def test_torn_again_while_continuing(tmp_path, name):
    """A file that is torn, continued and torn again is still whole in the end."""
    path = tmp_path / name
    path.write_bytes(pack(name, LINES[:1]))
    resumed = resume_output(str(path))
    resumed.writer.write(LINES[1])
    resumed.writer.write(LINES[2][:20])
    shutil.copy(path, tmp_path / ("copy-" + name))  # as SIGKILL leaves it: no end of the part
    resumed.writer.close()
    assert continue_run(tmp_path / ("copy-" + name)) == 20
    assert unpack(tmp_path / ("copy-" + name)) == b"".join(LINES)


def test_nothing_whole_is_dropped(tmp_path):
    """Of a torn file only the torn line goes; an answer that only lacks its newline is kept."""
    path = tmp_path / "out.jsonl"
    path.write_bytes(LINES[0] + LINES[1][:-1])
    resumed = resume_output(str(path))
    assert (len(resumed.answered), resumed.dropped_bytes) == (2, 0)
    resumed.writer.close()
    assert path.read_bytes() == LINES[0] + LINES[1]
    path.write_bytes(LINES[0] + LINES[1][:30])
    resumed = resume_output(str(path))
    assert (len(resumed.answered), resumed.dropped_bytes) == (1, 30)
    resumed.writer.close()
    assert path.read_bytes() == LINES[0]


@pytest.mark.parametrize("name", NAMES[1:])
def test_large_torn_part_is_rewritten(tmp_path, name):
    """A torn part of several chunks keeps all of its whole lines, in order, behind the untouched parts before it."""
    lines = [b'{"id":"line-%d-%08x","body":"%s"}\n' % (n, n, os.urandom(200).hex().encode()) for n in range(1, 3001)]
    first = pack(name, lines[:1000])
    path = tmp_path / name
    path.write_bytes((first + pack(name, lines[1000:]))[:-30])
    path.chmod(0o640)
    resumed = resume_output(str(path))
    resumed.writer.close()
    kept = unpack(path).splitlines(keepends=True)
    assert len(kept) == len(resumed.answered) >= 2990
    assert kept == lines[: len(kept)]
    assert path.read_bytes().startswith(first)
    assert path.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("name", NAMES[1:])
def test_leftover_of_an_interrupted_repair(tmp_path, name):
    """A repair that was killed itself left a file beside the output; it does no harm."""
    path = tmp_path / name
    path.write_bytes(pack(name, LINES)[:-3])
    (tmp_path / (name + RECOVERING_SUFFIX)).write_bytes(b"half of something")
    continue_run(path)
    assert unpack(path) == b"".join(LINES)
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", NAMES[1:])
def test_repair_goes_through_a_symbolic_link(tmp_path, name):
    """Repairing an output that is a link repairs the file behind it; the link stays."""
    (tmp_path / "data").mkdir()
    target = tmp_path / "data" / name
    target.write_bytes(pack(name, LINES)[:-3])
    (tmp_path / name).symlink_to(target)
    continue_run(tmp_path / name)
    assert (tmp_path / name).is_symlink()
    assert unpack(target) == b"".join(LINES)


FOREIGN = [
    b'{"path":"/v1/x","body":{}}\n',
    b"precious notes\n",
    b"precious notes without a newline",
    b'{"one": "JSON document",\n "without": "answers"}',
    b'{"id":"chatcmpl-1"}\n',
    b'{"id":"chatcmpl-1"}',
    LINES[0] + b"a comment\n" + LINES[1],
    LINES[0] + b"a comment",
    b"\0\0\0\0",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("content", FOREIGN)
def test_file_with_other_data_is_refused_untouched(tmp_path, name, content):
    """An output that holds anything but answers is refused, and not a byte of it changes."""
    path = tmp_path / name
    path.write_bytes(pack(name, [content]))
    before = path.read_bytes()
    with pytest.raises(OutputError, match="not an answer of a run"):
        resume_output(str(path))
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", NAMES[1:])
def test_plain_text_under_a_compressed_name_is_refused(tmp_path, name):
    """A compressed output that is damaged, not torn, is refused and not touched."""
    path = tmp_path / name
    content = pack(name, LINES[:2]) + b"junk that is no header"
    path.write_bytes(content)
    with pytest.raises(OutputError, match="is damaged"):
        resume_output(str(path))
    assert path.read_bytes() == content


def test_two_runs_cannot_share_an_output(tmp_path):
    """A second run into a file that is being written is refused; once the first has ended it may go on."""
    path = str(tmp_path / "out.jsonl")
    first = resume_output(path)
    with pytest.raises(OutputError, match="another run"):
        resume_output(path)
    first.writer.close()
    resume_output(path).writer.close()


def test_lock_holds_after_a_repair(tmp_path):
    """The lock is on the file that took the torn one's place, too."""
    path = tmp_path / "out.jsonl.gz"
    path.write_bytes(pack("out.gz", LINES)[:-3])
    resumed = resume_output(str(path))
    with pytest.raises(OutputError, match="another run"):
        resume_output(str(path))
    resumed.writer.close()


def test_edited_line_has_no_answer(tmp_path):
    """An answer belongs to a number and a hash: the same number with other text is answered again."""
    path = tmp_path / "out.jsonl"
    path.write_bytes(LINES[0])
    resumed = resume_output(str(path))
    assert "line-1-00000001" in resumed.answered
    assert "line-1-0000000f" not in resumed.answered
    resumed.writer.close()


def test_devices_are_only_written_to(tmp_path):
    """A device or pipe is no journal: nothing is read from it."""
    resumed = resume_output("/dev/null")
    assert len(resumed.answered) == 0
    resumed.writer.write(LINES[0])
    resumed.writer.close()


def test_input_and_output_must_differ(tmp_path):
    """The input is not taken for the output, under any name."""
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"path":"/v1/x","body":{}}\n')
    (tmp_path / "link.jsonl").symlink_to(path)
    with pytest.raises(OutputError, match="is the input"):
        refuse_same_file(str(path), str(tmp_path / "link.jsonl"))
    refuse_same_file(str(path), str(tmp_path / "other.jsonl"))
    refuse_same_file("-", "-")


@pytest.mark.parametrize("number", [1, _MAX_GAP + 5])
def test_another_line_of_the_same_number_is_noticed(number):
    """An edited line has another hash: it is not answered, but its number is known."""
    answered = AnsweredLines()
    answered.add(f"line-{number}-0a1b2c3d")
    assert answered.has_other(f"line-{number}-00000001")
    assert not answered.has_other(f"line-{number}-0a1b2c3d")
    assert not answered.has_other(f"line-{number + 1}-0a1b2c3d")
    assert not answered.has_other("something else")


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_taken_out(tmp_path, name):
    """By id or by content; the others stay as they are, and the file can be continued."""
    path = tmp_path / name
    continue_run(path)
    assert drop_answers(str(path), lambda line_id, line: number_of(line_id) == 2 or b"400" in line) == 2
    assert unpack(path) == LINES[0]
    assert [file.name for file in tmp_path.iterdir()] == [name]
    continue_run(path)
    assert sorted(unpack(path).splitlines(keepends=True)) == sorted(LINES)
    assert drop_answers(str(path), lambda *_: False) == 0


def test_an_output_that_is_being_written_keeps_its_answers(tmp_path):
    """Two processes would answer a line twice."""
    path = tmp_path / "out.jsonl"
    continue_run(path)
    resumed = resume_output(str(path))
    with pytest.raises(OutputError, match="is being written by another run"):
        drop_answers(str(path), lambda *_: True)
    resumed.writer.close()
    assert unpack(path).splitlines(keepends=True) == LINES


@settings(max_examples=50)
@given(st.sampled_from(NAMES), st.lists(st.integers(0, 400), max_size=4))
def test_any_number_of_kills(tmp_path_factory, name, cuts):
    """However often a run is killed, and wherever, the answers are in the end complete and without repeats."""
    path = tmp_path_factory.mktemp("kills") / name
    for cut in cuts:
        resumed = resume_output(str(path))
        for line, line_id in zip(LINES, IDS, strict=True):
            if line_id not in resumed.answered:
                resumed.writer.write(line)
        os.dup2(os.open(os.devnull, os.O_WRONLY), resumed.writer.descriptor)  # SIGKILL: the end is never written
        resumed.writer.close()
        os.truncate(path, min(cut, path.stat().st_size))
    continue_run(path)
    assert sorted(unpack(path).splitlines(keepends=True)) == sorted(LINES)


def test_open_output_does_not_lock(tmp_path):
    """The plain opening is for files that no run continues."""
    first, second = open_output(str(tmp_path / "a")), open_output(str(tmp_path / "a"))
    first.close()
    second.close()


@given(st.lists(ids), st.lists(ids))
def test_answered_lines_are_a_set(added, asked):
    """`AnsweredLines` holds what was added and nothing else, for any numbers and hashes."""
    lines, model = AnsweredLines(), set()
    for line_id in added:
        assert lines.add(line_id)
        model.add(line_id)
        assert len(lines) == len(model)
    assert all(line_id in lines for line_id in added)
    assert [line_id in lines for line_id in asked] == [line_id in model for line_id in asked]


def test_batch_ids_are_the_same_lines():
    """A line that was answered in the batch shape needs no answer in either."""
    lines = AnsweredLines()
    lines.add("batch_req_line-1-0a1b2c3d")
    assert "line-1-0a1b2c3d" in lines


@pytest.mark.parametrize(
    "text", ["", "line-0-0a1b2c3d", "line-1-0A1B2C3D", "line-1-0a1b2c3", "x-1-0a1b2c3d", "line-01-0a1b2c3d"]
)
def test_other_texts_are_no_ids(text):
    """Only ids of this program's form are taken."""
    lines = AnsweredLines()
    assert not lines.add(text)
    assert text not in lines
    assert parse_line_id(text) is None
    assert len(lines) == 0


def test_four_bytes_a_line():
    """Lines in about their order take four bytes each, a far one does not stretch the array."""
    lines = AnsweredLines()
    for number in range(2, 50_002):
        lines.add(f"line-{number ^ 1}-{number:08x}")
    lines.add("line-900000000000-00000001")
    assert len(lines) == 50_001
    assert len(lines._hashes) * lines._hashes.itemsize <= 4 * 50_003
    assert len(lines._others) == 1
