"""
The key of a backend: from the settings, or from a file that is read again when it changes.

Kubernetes replaces a mounted Secret by swapping a symbolic link, so the file is recognised as new by inode, size and
time together.  The key is never logged and never part of an exception's text.
"""

import contextlib
import html
import json
import os
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from urllib.parse import quote

from pydantic import SecretStr

from worker.errors import SettingsError
from worker.settings.conflicts import section_of
from worker.settings.schema import Settings
from worker.wire.http import is_usable_key

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
        if self._value is not None and not is_usable_key(self._value):
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
        if is_usable_key(value):  # a half-written file keeps the old key
            self._value, self._stamp = value, stamp

    def current(self) -> str | None:
        """Return the key now in force; looks at the file at most once a second and keeps the old key if it is gone."""
        if self._path is not None and self._clock() - self._checked_at >= CHECK_EVERY_S:
            self._checked_at = self._clock()
            with contextlib.suppress(OSError):
                self._read(self._path)
        return self._value


def check_key_files(settings: Settings) -> None:
    """
    Check every key file that is on this machine; one that is not may be where the worker runs.

    Raises:
        SettingsError: The worker could not start with one of them; every fault is named.
    """
    faults: list[str] = []
    for route in settings.all_routes():
        where = section_of(route, settings)
        for section, path in ((where, route.api_key_file), (f"{where}.metric_gate", route.metric_gate.api_key_file)):
            if path is not None and Path(path).exists():
                try:
                    ApiKey(None, path)
                except SettingsError as error:
                    faults += [f"{section}.{fault}" for fault in error.faults]
    if faults:
        raise SettingsError(faults)


MIN_SECRET_CHARS = 4
"""Shorter values are no secrets, and replacing them would spoil the words around them."""
MIN_SECRET_CHARS_IN_ANSWER = 8
MIN_HEADER_CHARS_IN_ANSWER = 16
"""In a good answer a word that a key or a header happens to have (`EMPTY`, the name of a team) must stay."""
REDACTED = "[redacted]"
_KEPT_KEYS = 4


class Redactor:
    """
    Replaces what the worker sent as credentials in what a backend sends back.

    Servers, gateways and debug pages repeat the key or the headers of a request in errors and in headers of their own;
    none of it may reach a requester or a log.  A text is replaced as it stands, and as JSON, HTML and URLs write it.

    Args:
        headers: The values of the operator's headers.
    """

    def __init__(self, headers: Iterable[str]) -> None:
        self._headers = tuple(headers)
        self._keys: tuple[str, ...] = ()
        self._prepare()

    def add_key(self, key: str) -> None:
        """Replace this key from now on, and those before it that answers may still be under way for."""
        if key not in self._keys:
            self._keys = (*self._keys, key)[-_KEPT_KEYS:]
            self._prepare()

    def _prepare(self) -> None:
        values = [*self._headers, *(value.split()[-1] for value in self._headers if value.split())]
        self._texts = _spellings([*self._keys, *values], MIN_SECRET_CHARS)
        self._errors = tuple(text.encode() for text in self._texts)
        answers = [
            *_spellings(self._keys, MIN_SECRET_CHARS_IN_ANSWER),
            *_spellings(values, MIN_HEADER_CHARS_IN_ANSWER),
        ]
        self._answers = tuple(text.encode() for text in answers)
        self._patterns: dict[bytes, re.Pattern[bytes]] = {}

    def text(self, text: str) -> str:
        """Return a header, or an exception's words, without credentials."""
        for secret in self._texts:
            if secret in text:
                text = text.replace(secret, REDACTED)
        return text

    def headers(self, headers: dict[str, str]) -> dict[str, str]:
        """Return response headers without credentials."""
        everything = "\n".join(headers.values())
        if not any(secret in everything for secret in self._texts):
            return headers
        return {name: self.text(value) for name, value in headers.items()}

    def body(self, body: bytes, *, is_answer: bool) -> bytes:
        """
        Return a body without credentials.

        Args:
            body: As it came.
            is_answer: It is an object under a success status.
        """
        secrets = self._answers if is_answer else self._errors
        for secret in secrets:
            if secret in body:
                body = body.replace(secret, REDACTED.encode())
        if _ESCAPED_ASCII.search(body):
            for secret in secrets:
                pattern = self._patterns.setdefault(secret, _with_escapes(secret))
                body = pattern.sub(REDACTED.encode(), body)
        return body


_ESCAPED_ASCII = re.compile(rb"\\u00[2-7]")
"""JSON may write any character so; encoders that are careful about HTML write `&`, `+` and `/` so."""


def _with_escapes(secret: bytes) -> re.Pattern[bytes]:
    """Return a pattern for a secret any of whose characters JSON has escaped."""
    return re.compile(b"".join(b"(?:%b|(?i:\\\\u00%02x))" % (re.escape(bytes((code,))), code) for code in secret))


def _spellings(secrets: Iterable[str], min_chars: int) -> list[str]:
    """Return every way to write the secrets, the longest first: one may be a part of another."""
    texts: set[str] = set()
    for secret in secrets:
        if len(secret) >= min_chars:
            escaped = json.dumps(secret)[1:-1]
            texts |= {secret, escaped, escaped.replace("/", "\\/"), html.escape(secret), quote(secret, safe="")}
    return sorted(texts, key=len, reverse=True)
