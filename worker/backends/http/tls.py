"""TLS to one backend: which certificates are trusted and shown, read again when their files change."""

import os
import ssl
from pathlib import Path

from worker.errors import SettingsError
from worker.settings.conflicts import section_of
from worker.settings.schema import Settings, TlsSettings
from worker.telemetry.logs import get_logger

_log = get_logger("backends")

Stamp = tuple[tuple[int, int, int], ...]
"""Inode, size and time of each file."""


class Tls:
    """
    What new connections use.  Certificates live for days or hours, the worker for months.

    Args:
        settings: The route's.

    Raises:
        SettingsError: A file cannot be read, or does not hold what it should; permanent until an operator acts.
    """

    def __init__(self, settings: TlsSettings) -> None:
        self._settings = settings
        self._files = files_of(settings)
        self._stamp = self._look()
        self._context = self._load()

    def context(self) -> ssl.SSLContext:
        """Return the context for a new connection; files that cannot be used, half written ones say, change nothing."""
        if self._files and (stamp := self._look()) != self._stamp:
            self._stamp = stamp
            try:
                self._context = self._load()
            except SettingsError as error:
                _log.warning("certificates_not_read", error=error.one_line)
        return self._context

    def _look(self) -> Stamp:
        stamp = []
        for path in self._files:
            try:
                seen = os.stat(path)  # noqa: PTH116 - three numbers of it
                stamp.append((seen.st_ino, seen.st_size, seen.st_mtime_ns))
            except OSError:
                stamp.append((0, 0, 0))
        return tuple(stamp)

    def _load(self) -> ssl.SSLContext:
        settings = self._settings
        try:
            context = ssl.create_default_context(cafile=settings.ca_file)
        except OSError as error:
            raise SettingsError([f"tls.ca_file: {settings.ca_file}: {_words(error)}"]) from None
        context.set_alpn_protocols(["http/1.1"])
        if settings.cert_file is not None:
            try:
                # Without an answer OpenSSL would ask the terminal for the key's password.
                context.load_cert_chain(settings.cert_file, settings.key_file, password=lambda: "")
            except (OSError, ValueError) as error:
                raise SettingsError([f"tls.cert_file: {settings.cert_file}: {_words(error)}"]) from None
        return context


def files_of(settings: TlsSettings) -> list[str]:
    """Return the files that the settings name."""
    return [path for path in (settings.ca_file, settings.cert_file, settings.key_file) if path is not None]


def _words(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def check_tls_files(settings: Settings) -> None:
    """
    Check the certificates that are on this machine; what is not may be where the worker runs.

    Raises:
        SettingsError: The worker could not start with one of them; every fault is named.
    """
    faults: list[str] = []
    for route in settings.all_routes():
        where = section_of(route, settings)
        for section, tls in ((where, route.tls), (f"{where}.metric_gate", route.metric_gate.tls)):
            files = files_of(tls)
            if files and all(Path(path).exists() for path in files):
                try:
                    Tls(tls)
                except SettingsError as error:
                    faults += [f"{section}.{fault}" for fault in error.faults]
    if faults:
        raise SettingsError(faults)
