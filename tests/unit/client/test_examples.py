"""The example requests are what their generator makes, and deserve the answers they expect."""

import base64
import json
import struct
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from examples import make_requests
from worker.client.io.files import open_input
from worker.client.io.lines import Shape, prepare
from worker.emulators.openai.dialects import SimError
from worker.emulators.openai.options import SimOptions
from worker.emulators.openai.validation import Endpoint, check, decode
from worker.errors import MessageError
from worker.settings.schema import INFERENCE_PATHS
from worker.wire.message import decode_request

EXAMPLES = make_requests.build()
FOLDER = Path(make_requests.__file__).parent


def read(name):
    reader = open_input(str(FOLDER / name))
    lines = []
    while some := reader.read_lines():
        lines += some
    reader.close()
    return lines


def status_of(line):
    """Return the status that worker and model server give a line, by their own rules."""
    try:
        request = decode_request(line)
    except MessageError as error:
        return 400, error.metadata
    if urlsplit(request.path).path not in INFERENCE_PATHS or request.headers:
        return 400, request.metadata
    try:
        check(Endpoint(request.path), decode(request.body.data), SimOptions())
    except SimError as error:
        return error.in_dialect("openai").status, request.metadata
    return 200, request.metadata


def test_files_are_what_the_generator_makes():
    """The committed files are up to date, line for line."""
    assert [line.data.decode() for line in read("requests.jsonl")] == [example.line.strip("\n") for example in EXAMPLES]
    assert [line.data.decode() for line in read("batch.jsonl")] == make_requests.build_batch()


@pytest.mark.slow
def test_check_compares_every_byte(tmp_path):
    """The script's own check passes on the committed files, and fails on others."""
    for path in FOLDER.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    script = [sys.executable, str(tmp_path / "make_requests.py"), "--check"]
    assert subprocess.run(script, check=False).returncode == 0
    (tmp_path / "batch.jsonl").write_bytes(b"stale\n")
    stale = subprocess.run(script, check=False, capture_output=True, text=True)
    assert (stale.returncode, "batch.jsonl is stale" in stale.stderr) == (1, True)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_every_line_deserves_what_it_expects(number):
    """By the rules of the worker and of the simulated server, each line gets the status and the metadata it expects."""
    example = EXAMPLES[number]
    status, metadata = status_of(example.line.encode())
    assert status == example.expect
    assert json.loads(metadata) == example.metadata
    assert example.metadata.get("expect", example.expect) == example.expect


def test_there_is_some_of_everything():
    """The examples are many, and cover every endpoint and feature they are meant to show."""
    assert len(EXAMPLES) >= 200
    assert Counter(example.expect for example in EXAMPLES)[400] >= 20
    good = [json.loads(example.line) for example in EXAMPLES if example.expect == 200]
    assert {line["path"] for line in good} == {*Endpoint, "v1/embeddings"}
    bodies = [line["body"] for line in good]
    for key in ("tools", "response_format", "logprobs", "stream", "n", "stop", "dimensions", "encoding_format"):
        assert any(body.get(key) for body in bodies), key
    assert sum(20_000 <= len(json.dumps(body)) <= 80_000 for body in bodies) >= 8
    assert any(line.get("priority") for line in good)
    assert any(line.get("deadline") for line in good)
    assert any("metadata" not in line for line in good)
    assert any(line.get("metadata") == {} for line in good)
    integers = [value for line in good for value in line.get("metadata", {}).values() if isinstance(value, int)]
    assert max(integers) > 2**64


def pictures(value):
    if isinstance(value, dict):
        for inner in value.values():
            yield from pictures(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from pictures(inner)
    elif isinstance(value, str) and value.startswith("data:image/png;base64,"):
        yield base64.b64decode(value.partition(",")[2], validate=True)


def test_pictures_are_real():
    """Every data URL is a PNG whose checksums and pixel data are right."""
    found = [data for example in EXAMPLES if example.expect == 200 for data in pictures(json.loads(example.line))]
    assert len(found) >= 10
    for data in found:
        assert data.startswith(b"\x89PNG\r\n\x1a\n")
        at, parts = 8, {}
        while at < len(data):
            size, kind = struct.unpack(">I4s", data[at : at + 8])
            part = data[at + 8 : at + 8 + size]
            assert struct.unpack(">I", data[at + 8 + size : at + 12 + size])[0] == zlib.crc32(kind + part)
            parts[kind] = part
            at += 12 + size
        assert list(parts) == [b"IHDR", b"IDAT", b"IEND"]
        width, height = struct.unpack(">II", parts[b"IHDR"][:8])
        assert len(zlib.decompress(parts[b"IDAT"])) == height * (1 + 3 * width)


def test_batch_lines_are_a_valid_batch():
    """The batch file has twenty good lines with distinct ids, one endpoint and one model."""
    lines = read("batch.jsonl")
    prepared = [prepare(line) for line in lines]
    assert [(one.shape, one.refusal) for one in prepared] == [(Shape.BATCH, None)] * 20
    assert [status_of(one.data)[0] for one in prepared] == [200] * 20
    records = [json.loads(line.data) for line in lines]
    assert len({record["custom_id"] for record in records}) == 20
    assert {(record["url"], record["body"]["model"]) for record in records} == {
        ("/v1/chat/completions", "llama-3.1-8b-instruct")
    }


def test_texts_have_the_right_numbers():
    """The counts in the README and in what `make run` prints are those of the files."""
    text = (FOLDER / "README.md").read_text("utf-8")
    bad = sum(example.expect == 400 for example in EXAMPLES)
    assert f"| {len(EXAMPLES)} request messages" in text
    assert f"{bad} of the {len(EXAMPLES)} are bad on purpose" in text
    makefile = (FOLDER.parent / "Makefile").read_text("utf-8")
    assert f"{bad} of the {len(EXAMPLES)} lines are wrong on purpose" in makefile
