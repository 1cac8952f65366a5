"""
The key of a backend: from the settings, or from a file that is read again when it changes.

Kubernetes replaces a mounted Secret by swapping a symbolic link, so the file is recognised as new by inode, size and
time together.  The key is never logged and never part of an exception's text.
"""

import os
import time
from collections.abc import Callable

from pydantic import SecretStr

from worker.errors import SettingsError

CHECK_EVERY_S = 1.0
"""How often the file is looked at, at most: kubelet itself takes up to a minute to deliver a change."""


class ApiKey:
    """
    The bearer token of one backend.

    Args:
        key: A fixed key, or `None`.
        path: A file that holds it; wins over `key`.
        clock: Monotonic seconds.

    Raises:
        SettingsError: The file cannot be read or is empty; permanent until an operator acts.
    """

    def __init__(self, key: SecretStr | None, path: str | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._checked_at = clock()
        self._stamp: tuple[int, int, int] | None = None
        self._value = key.get_secret_value() if key is not None else None
        if path is not None:
            try:
                self._read(path)
            except OSError as error:
                raise SettingsError([f"api_key_file: {path}: {error.strerror}"]) from None
            if not self._value:
                raise SettingsError([f"api_key_file: {path}: is empty"])

    def __repr__(self) -> str:
        return f"ApiKey(path={self._path!r}, is_set={self._value is not None})"

    def _read(self, path: str) -> None:
        found = os.stat(path)  # noqa: PTH116 - on the hot path once a second
        stamp = (found.st_ino, found.st_size, found.st_mtime_ns)
        if stamp == self._stamp:
            return
        with open(path, encoding="utf-8") as file:  # noqa: PTH123
            value = file.read().strip()
        if value:  # a half-written file keeps the old key
            self._value, self._stamp = value, stamp

    def current(self) -> str | None:
        """Return the key now in force; looks at the file at most once a second and keeps the old key if it is gone."""
        if self._path is not None and self._clock() - self._checked_at >= CHECK_EVERY_S:
            self._checked_at = self._clock()
            try:
                self._read(self._path)
            except (OSError, UnicodeDecodeError):
                return self._value
        return self._value
