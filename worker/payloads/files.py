"""
A folder as object storage: `file://`, for a mounted volume and for trying things out.

Below the folder no symbolic link is followed, at no level: each segment is opened from the one above it, so that
nothing can be exchanged between a check and the opening.  The folder itself is the operator's and may be a link.
System calls run in threads: a network volume may block.
"""

import asyncio
import errno
import os
import secrets
import stat
import time
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from worker.errors import PayloadError
from worker.policy.model import Fault
from worker.ports import OpenPayload

_CHUNK_BYTES = 1 << 20
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_BELOW = os.O_NOFOLLOW | os.O_CLOEXEC
_MODE = 0o666
"""As the umask leaves it."""
_DRAFT_END = ".draft"
_T = TypeVar("_T")
_ABSENT = (FileNotFoundError, NotADirectoryError)


class FileStore:
    """
    The files below one folder.

    Args:
        root: The folder.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    @asynccontextmanager
    async def open(self, key: str) -> AsyncIterator[OpenPayload]:
        """Open a regular file; see `worker.ports.Payloads.open`."""
        descriptor = await asyncio.to_thread(self._open, key)
        try:
            async with aclosing(_chunks(descriptor)) as chunks:
                yield OpenPayload(size=os.fstat(descriptor).st_size, chunks=chunks)
        finally:
            os.close(descriptor)

    async def write(self, key: str, data: bytes) -> None:
        """
        Write a file in a folder that is made where it is missing; a reader sees the old file or the new one.

        Raises:
            PayloadError: As `worker.ports.Payloads.write`.

        Cancellation: the file is written all the same.
        """
        await asyncio.to_thread(self._write, key, data)

    async def write_stream(self, key: str, chunks: AsyncIterable[bytes]) -> int:
        """
        Write a file of any length as its content comes; return its bytes.

        A reader sees the old file or the new one; what is returned for is on the disk.

        Raises:
            PayloadError: As `worker.ports.Payloads.write`.

        Cancellation: nothing is written, as after an exception of `chunks`.
        """
        draft = _Draft(self._root, key, self._folder)
        try:
            await _to_its_end(draft.begin)
            async for chunk in chunks:
                await _to_its_end(draft.write, chunk)
            return await _to_its_end(draft.commit)
        finally:
            draft.close()

    async def read(self, key: str, *, start: int = 0, length: int | None = None) -> AsyncGenerator[bytes, None]:
        """
        Yield a part of a file.

        Args:
            key: Of the file.
            start: First byte, from 0.
            length: Bytes at most; `None`: to the end.

        Raises:
            PayloadError: As `worker.ports.Payloads.open`.
        """
        descriptor = await asyncio.to_thread(self._open, key)
        try:
            position, end = start, None if length is None else start + length
            while end is None or position < end:
                wanted = _CHUNK_BYTES if end is None else min(_CHUNK_BYTES, end - position)
                try:
                    chunk = await asyncio.to_thread(os.pread, descriptor, wanted, position)
                except OSError as error:
                    raise _fault(error) from None
                if not chunk:
                    return
                yield chunk
                position += len(chunk)
        finally:
            os.close(descriptor)

    async def delete(self, key: str) -> None:
        """
        Delete a file; one that is not there is deleted already.

        Raises:
            PayloadError: The folder cannot be reached or written.

        Cancellation: the file is deleted all the same.
        """
        await asyncio.to_thread(self._delete, key)

    def _delete(self, key: str) -> None:
        try:
            folder = self._folder(key, make=False)
        except PayloadError as error:
            if error.fault == Fault.PAYLOAD_NOT_FOUND:
                return
            raise
        try:
            os.unlink(_name(key), dir_fd=folder)
        except OSError as error:
            if not isinstance(error, _ABSENT):
                raise _fault(error) from None
        finally:
            os.close(folder)

    def remove_drafts(self, older_than_s: float) -> int:
        """Delete what killed processes left of unfinished writes; blocks; return how many files."""
        count, oldest = 0, time.time() - older_than_s
        for draft in self._root.rglob(f".*{_DRAFT_END}"):
            with suppress(OSError):  # another process may do the same
                if draft.lstat().st_mtime < oldest:
                    draft.unlink()
                    count += 1
        return count

    def _open(self, key: str) -> int:
        folder = self._folder(key, make=False)
        try:
            # NONBLOCK: a named pipe without a writer would block the thread for ever.
            descriptor = os.open(_name(key), os.O_RDONLY | os.O_NONBLOCK | _BELOW, dir_fd=folder)
        except OSError as error:
            raise _fault(error) from None
        finally:
            os.close(folder)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise PayloadError(Fault.PAYLOAD_NOT_FOUND, "it is not a regular file")
        return descriptor

    def _write(self, key: str, data: bytes) -> None:
        folder = self._folder(key, make=True)
        name, draft = _name(key), f".{_name(key)}.{os.getpid()}"
        try:
            with suppress(FileNotFoundError):  # of a process that was killed
                os.unlink(draft, dir_fd=folder)
            with open(  # noqa: PTH123 - relative to an open folder
                os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _BELOW, _MODE, dir_fd=folder), "wb"
            ) as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, name, src_dir_fd=folder, dst_dir_fd=folder)
        except OSError as error:
            raise PayloadError(Fault.PAYLOAD_UNAVAILABLE, f"{self._root}: {error.strerror}") from None
        finally:
            os.close(folder)

    def _folder(self, key: str, *, make: bool) -> int:
        """Return a descriptor of the folder that a key stands in."""
        try:
            folder = os.open(self._root, _FOLDER)
        except OSError as error:  # a volume that is not mounted
            raise PayloadError(Fault.PAYLOAD_UNAVAILABLE, f"{self._root}: {error.strerror}") from None
        try:
            for segment in key.split("/")[:-1]:
                if make:
                    with suppress(FileExistsError):
                        os.mkdir(segment, dir_fd=folder)
                inner = os.open(segment, _FOLDER | _BELOW, dir_fd=folder)
                os.close(folder)
                folder = inner
        except OSError as error:
            os.close(folder)
            raise _fault(error) from None
        return folder


async def _to_its_end(function: Callable[..., _T], *args: Any) -> _T:
    """Call a function in a thread; a cancellation waits for its end, since it uses descriptors that are then closed."""
    call = asyncio.ensure_future(asyncio.to_thread(function, *args))
    try:
        return await asyncio.shield(call)
    except asyncio.CancelledError:
        await asyncio.wait({call})
        raise


class _Draft:
    """A file that is being written, under a name of its own beside its place."""

    def __init__(self, root: Path, key: str, folder_of: Callable[..., int]) -> None:
        self._root = root
        self._key = key
        self._folder_of = folder_of
        self._name = _name(key)
        self._draft = f".{self._name}.{secrets.token_hex(8)}{_DRAFT_END}"
        self._folder = -1
        self._file = -1
        self._bytes = 0
        self._is_committed = False

    def _explained(self, error: OSError) -> PayloadError:
        return PayloadError(Fault.PAYLOAD_UNAVAILABLE, f"{self._root}: {error.strerror}")

    def begin(self) -> None:
        self._folder = self._folder_of(self._key, make=True)
        try:
            self._file = os.open(self._draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _BELOW, _MODE, dir_fd=self._folder)
        except OSError as error:
            raise self._explained(error) from None

    def write(self, data: bytes) -> None:
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except OSError as error:
            raise self._explained(error) from None
        self._bytes += len(data)

    def commit(self) -> int:
        try:
            os.fsync(self._file)
            os.replace(self._draft, self._name, src_dir_fd=self._folder, dst_dir_fd=self._folder)
            self._is_committed = True
            os.fsync(self._folder)  # the name as well
        except OSError as error:
            raise self._explained(error) from None
        return self._bytes

    def close(self) -> None:
        """Close everything; without a commit nothing is left."""
        if self._file >= 0:
            os.close(self._file)
            if not self._is_committed:
                with suppress(OSError):
                    os.unlink(self._draft, dir_fd=self._folder)
        if self._folder >= 0:
            os.close(self._folder)


async def _chunks(descriptor: int) -> AsyncGenerator[bytes, None]:
    try:
        while chunk := await asyncio.to_thread(os.read, descriptor, _CHUNK_BYTES):
            yield chunk
    except OSError as error:
        raise _fault(error) from None


def _name(key: str) -> str:
    return key.rpartition("/")[2]


def _fault(error: OSError) -> PayloadError:
    """Return what an error of the file system means for one file; a link is not there (ELOOP, or ENOTDIR)."""
    if isinstance(error, _ABSENT):
        return PayloadError(Fault.PAYLOAD_NOT_FOUND)
    if error.errno == errno.ELOOP:
        return PayloadError(Fault.PAYLOAD_NOT_FOUND, "a symbolic link is not followed")
    if isinstance(error, PermissionError):
        return PayloadError(Fault.PAYLOAD_REFUSED, error.strerror or "")
    return PayloadError(Fault.PAYLOAD_UNAVAILABLE, error.strerror or "")
