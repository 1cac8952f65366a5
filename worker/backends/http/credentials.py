"""
The key of a backend: from the settings, or from a file that is read again when it changes.

Kubernetes replaces a mounted Secret by swapping a symbolic link, so the file is recognised as new by inode, size and
time together.  The key is never logged and never part of an exception's text.
"""

import contextlib
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
        SettingsError: The file cannot be read, or the key is empty or no visible ASCII; permanent until an operator
            acts.  White space around the key is taken off: most ways of making a Secret add a line break.
    """

    def __init__(self, key: SecretStr | None, path: str | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._checked_at = clock()
        self._stamp: tuple[int, int, int] | None = None
        self._value = key.get_secret_value().strip() if key is not None else None
        if self._value is not None and not is_usable(self._value):
            raise SettingsError(["api_key: is empty, or holds characters that cannot stand in a header"])
        if path is not None:
            try:
                self._read(path)
            except OSError as error:
                raise SettingsError([f"api_key_file: {path}: {error.strerror}"]) from None
            if self._stamp is None:
                raise SettingsError([f"api_key_file: {path}: is empty, or no text that can stand in a header"])

    def __repr__(self) -> str:
        return f"ApiKey(path={self._path!r}, is_set={self._value is not None})"

    def _read(self, path: str) -> None:
        found = os.stat(path)  # noqa: PTH116 - on the hot path once a second
        stamp = (found.st_ino, found.st_size, found.st_mtime_ns)
        if stamp == self._stamp:
            return
        with open(path, "rb") as file:  # noqa: PTH123
            value = file.read().decode("ascii", "replace").strip()
        if is_usable(value):  # a half-written file keeps the old key
            self._value, self._stamp = value, stamp

    def current(self) -> str | None:
        """Return the key now in force; looks at the file at most once a second and keeps the old key if it is gone."""
        if self._path is not None and self._clock() - self._checked_at >= CHECK_EVERY_S:
            self._checked_at = self._clock()
            with contextlib.suppress(OSError):
                self._read(self._path)
        return self._value


def is_usable(key: str) -> bool:
    """Whether the key can be sent: visible ASCII, at least one character."""
    return bool(key) and all("!" <= char <= "~" for char in key)
