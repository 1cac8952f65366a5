"""
A folder as object storage: `file://`, for a mounted volume and for trying things out.

Below the folder no symbolic link is followed, at no level: each segment is opened from the one above it, so that
nothing can be exchanged between a check and the opening.  The folder itself is the operator's and may be a link.
System calls run in threads: a network volume may block.
"""

import asyncio
import errno
import os
import stat
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from pathlib import Path

from worker.errors import PayloadError
from worker.policy.model import Fault
from worker.ports import OpenPayload

_CHUNK_BYTES = 1 << 20
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_BELOW = os.O_NOFOLLOW | os.O_CLOEXEC
_MODE = 0o666
"""As the umask leaves it."""
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
