"""A folder as object storage: what is in it is served, and nothing that only looks as if it were."""

import os
from pathlib import Path

import pytest

from worker.errors import PayloadError
from worker.payloads.files import FileStore


async def content(store: FileStore, key: str) -> bytes:
    """The bytes of an object, whose size is told before they come."""
    async with store.open(key) as payload:
        data = b"".join([chunk async for chunk in payload.chunks])
    assert len(data) == payload.size
    return data


async def fault(store: FileStore, key: str) -> str:
    """Why an object cannot be opened."""
    with pytest.raises(PayloadError) as caught:
        await content(store, key)
    return caught.value.fault


async def test_what_was_written_is_read(tmp_path: Path) -> None:
    """In folders that are made, more than one chunk long, and again under the same name."""
    store, data = FileStore(tmp_path), b'{"a":"' + b"x" * 3_000_000 + b'"}'
    await store.write("a/b/1.json", b"{}")
    await store.write("a/b/1.json", data)
    assert await content(store, "a/b/1.json") == data
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["1.json"]


async def test_a_root_that_is_a_link_is_the_operators(tmp_path: Path) -> None:
    """Volumes are often mounted so."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    await FileStore(tmp_path / "link").write("1.json", b"{}")
    assert (tmp_path / "real" / "1.json").read_bytes() == b"{}"


async def test_no_link_below_the_root_is_followed(tmp_path: Path) -> None:
    """Neither a file nor a folder, wherever it points, for reading or writing."""
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    (outside / "secret").write_text("s")
    (root / "file").symlink_to(outside / "secret")
    (root / "folder").symlink_to(outside)
    (root / "inside").write_text("{}")
    (root / "same").symlink_to(root / "inside")
    store = FileStore(root)
    for key in ("file", "folder/secret", "same"):
        assert await fault(store, key) == "payload_not_found"
    with pytest.raises(PayloadError):
        await store.write("folder/new", b"{}")
    await store.write("file", b"{}")
    assert (outside / "secret").read_text() == "s", "the link was replaced, not what it points to"
    assert sorted(path.name for path in outside.iterdir()) == ["secret"]


async def test_what_is_no_regular_file_is_not_there(tmp_path: Path) -> None:
    """A folder, a named pipe that would block, a folder that is a file, and nothing at all."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("{}")
    os.mkfifo(tmp_path / "pipe")
    for key in ("folder", "pipe", "file/below", "absent", "absent/below"):
        assert await fault(FileStore(tmp_path), key) == "payload_not_found"


async def test_a_root_that_is_away_is_an_outage(tmp_path: Path) -> None:
    """A volume that is not mounted is no requester's fault."""
    store = FileStore(tmp_path / "absent")
    assert await fault(store, "1.json") == "payload_unavailable"
    with pytest.raises(PayloadError, match="payload_unavailable"):
        await store.write("1.json", b"{}")


async def test_the_rest_of_a_killed_process_is_in_no_ones_way(tmp_path: Path) -> None:
    """A draft of the same process id, as in every pod."""
    (tmp_path / f".1.json.{os.getpid()}").write_text("half")
    await FileStore(tmp_path).write("1.json", b"{}")
    assert os.listdir(tmp_path) == ["1.json"]  # noqa: PTH208 - a small folder of the test


async def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's own word; root may read everything, so it is told by a system call that says so."""
    (tmp_path / "1.json").write_text("{}")
    real = os.open

    def refusing(path: str, *args: int, **more: int) -> int:
        if path == "1.json":
            raise PermissionError(13, "Permission denied")
        return real(path, *args, **more)

    monkeypatch.setattr(os, "open", refusing)
    assert await fault(FileStore(tmp_path), "1.json") == "payload_refused"
