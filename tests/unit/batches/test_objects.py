"""Contents of files, in a folder and in a bucket."""

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from obstore.store import MemoryStore

from worker.batches.objects import ObjectWriter, is_missing, open_objects
from worker.errors import PayloadError, SettingsError
from worker.payloads.files import FileStore
from worker.payloads.objects import BucketStore
from worker.settings.schema import PayloadSettings


@pytest.fixture(params=["folder", "bucket"])
def objects(request, tmp_path):
    return FileStore(tmp_path) if request.param == "folder" else BucketStore(MemoryStore(), timeout_s=10)


async def pieces(*data: bytes) -> AsyncIterator[bytes]:
    for piece in data:
        yield piece


async def whole(objects, key, **span) -> bytes:
    return b"".join([part async for part in objects.read(key, **span)])


async def test_an_object_is_read_as_it_was_written(objects):
    content = os.urandom(9_000_001)
    parts = [content[at : at + 700_000] for at in range(0, len(content), 700_000)]
    assert await objects.write_stream("files/a", pieces(*parts)) == len(content)
    assert await whole(objects, "files/a") == content
    assert await whole(objects, "files/a", start=8_999_000) == content[8_999_000:]
    assert await whole(objects, "files/a", start=5, length=8_500_000) == content[5:8_500_005]
    assert await whole(objects, "files/a", start=9_000_000, length=50) == content[-1:]
    assert await whole(objects, "files/a", start=9_000_001, length=50) == b""
    assert await whole(objects, "files/a", start=3, length=0) == b""


async def test_an_object_without_content(objects):
    assert await objects.write_stream("a", pieces()) == 0
    assert await whole(objects, "a") == b""


async def test_a_missing_object_is_told_apart(objects):
    with pytest.raises(PayloadError) as missing:
        await whole(objects, "files/none")
    assert is_missing(missing.value)


async def test_an_object_is_deleted_once_or_twice(objects):
    await objects.write_stream("files/a", pieces(b"x"))
    await objects.delete("files/a")
    await objects.delete("files/a")
    await objects.delete("other/none")
    with pytest.raises(PayloadError):
        await whole(objects, "files/a")


async def test_a_source_that_fails_leaves_nothing(objects, tmp_path):
    async def broken():
        yield b"x" * 1000
        raise ValueError("cut")

    with pytest.raises(ValueError, match="cut"):
        await objects.write_stream("files/a", broken())
    with pytest.raises(PayloadError):
        await whole(objects, "files/a")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


async def test_a_cancelled_write_leaves_nothing(objects, tmp_path):
    begun = asyncio.Event()

    async def endless():
        yield b"x" * 1000
        begun.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(objects.write_stream("files/a", endless()))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    with pytest.raises(PayloadError):
        await whole(objects, "files/a")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


async def test_a_writer_takes_pieces(objects):
    writer = ObjectWriter(objects, "a")
    lines = [b"%d\n" % number * 1000 for number in range(1000)]
    for line in lines:
        await writer.write(line)
    assert await writer.commit() == sum(map(len, lines))
    assert writer.lines == 1000
    assert await whole(objects, "a") == b"".join(lines)


async def test_a_writer_without_pieces_writes_nothing(objects):
    assert await ObjectWriter(objects, "a").commit() == 0
    with pytest.raises(PayloadError):
        await whole(objects, "a")


async def test_an_abandoned_writer_leaves_nothing(objects, tmp_path):
    writer = ObjectWriter(objects, "a")
    await writer.write(b"x" * 2_000_000)
    await writer.abandon()
    await writer.abandon()
    with pytest.raises(PayloadError):
        await whole(objects, "a")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


async def test_a_writer_tells_that_the_storage_gave_up(tmp_path):
    class Full(FileStore):
        async def write_stream(self, key, chunks):
            async for _ in chunks:
                raise PayloadError("payload_unavailable", "No space left on device")
            return 0

    writer = ObjectWriter(Full(tmp_path), "a")

    async def write():
        for _ in range(10):
            await writer.write(b"x" * 2_000_000)

    with pytest.raises(PayloadError, match="space"):
        await write()
    await writer.abandon()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
async def test_a_full_disk_is_told(tmp_path, monkeypatch):
    real = os.open
    monkeypatch.setattr(
        os,
        "open",
        lambda path, *a, **k: real("/dev/full", os.O_WRONLY) if ".draft" in str(path) else real(path, *a, **k),
    )
    with pytest.raises(PayloadError, match="No space left"):
        await FileStore(tmp_path).write_stream("a", pieces(b"x" * 100_000))


def test_drafts_of_killed_processes_are_removed(tmp_path):
    (tmp_path / "files").mkdir()
    old, new = tmp_path / "files" / ".a.1.draft", tmp_path / "files" / ".b.2.draft"
    for path in (old, new):
        path.write_bytes(b"x")
    os.utime(old, (1, 1))
    assert FileStore(tmp_path).remove_drafts(3600) == 1
    assert [path.name for path in (tmp_path / "files").iterdir()] == [".b.2.draft"]


def test_a_place_is_a_folder_or_a_prefix(tmp_path):
    folder = tmp_path / "new" / "folder"
    assert isinstance(open_objects(str(folder), PayloadSettings()), FileStore)
    assert folder.is_dir()
    assert isinstance(open_objects(f"file://{folder}", PayloadSettings()), FileStore)
    assert isinstance(open_objects("s3://bucket/folder", PayloadSettings()), BucketStore)
    for wrong in ("ftp://x/y", "gs://"):
        with pytest.raises(SettingsError, match=r"batches\.files"):
            open_objects(wrong, PayloadSettings())
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(SettingsError, match=r"batches\.files"):
        open_objects(str(tmp_path / "file"), PayloadSettings())
