"""A disk that is really full: a small file system in memory, where this user may mount one."""

import errno
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

import pytest

DISK_BYTES = 64 << 20
BLOCK = 4096


class Disk:
    """
    A file system in memory.

    Args:
        folder: Where it is mounted.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ballast = folder / "ballast"

    def fill(self, leave_bytes: int = 0) -> None:
        """Take all of its space but so much, rounded to blocks."""
        with self._ballast.open("ab", buffering=0) as file:
            while not self._refuses(file):
                continue
            file.truncate(max(0, self._ballast.stat().st_size - leave_bytes))

    @staticmethod
    def _refuses(file: FileIO) -> bool:
        """Write a block; return whether there is no space for one."""
        try:
            return file.write(bytes(BLOCK)) < BLOCK
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            return True

    def free(self) -> None:
        """Give the space back."""
        self._ballast.unlink()

    def files(self) -> dict[str, int]:
        """What stands in the storage of files, drafts included: path and bytes."""
        root = self.folder / "files"
        return {str(path.relative_to(root)): path.stat().st_size for path in root.rglob("*") if path.is_file()}


@contextmanager
def mounted(folder: Path) -> Iterator[Disk]:
    """A disk of 64 MiB; skips where this user may not mount one."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount here")
    except subprocess.CalledProcessError as refused:
        pytest.skip(f"this user may not mount a file system: {refused.stderr.strip()}")
    try:
        yield Disk(folder)
    finally:
        subprocess.run(["umount", str(folder)], check=True)
