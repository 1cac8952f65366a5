"""A PostgreSQL server of the machine's own binaries, on a folder and a port of its own, for tests and benchmarks."""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg

from tests.support.waiting import until

PLACES = "/usr/lib/postgresql"


def find_binaries() -> Path | None:
    """The folder with `initdb` and `postgres`, the newest version first; `None` where there is none."""
    found = shutil.which("initdb")
    if found is not None and shutil.which("postgres") is not None:
        return Path(found).parent
    versions = sorted(Path(PLACES).glob("*/bin/initdb"), key=lambda path: float(path.parts[-3]), reverse=True)
    return versions[0].parent if versions else None


def _account() -> str | None:
    """Root may not run the server: the account that does."""
    if os.geteuid() != 0:
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in names else "nobody"


class PostgreSQL:
    """One server; may be stopped, killed and started again on the same data."""

    def __init__(self, binaries: Path, folder: Path, *, fsync: bool) -> None:
        self._binaries = binaries
        self._folder = folder
        self._account = _account()
        # Not Popen's own `user`: with it Python forks, which the threads of gRPC in this process may not survive.
        ids = ["--reuid", self._account, "--regid", self._account, "--clear-groups"] if self._account else []
        self._as_account = ["setpriv", *ids] if ids else []
        self._options = [] if fsync else ["-c", "fsync=off", "-c", "full_page_writes=off"]
        self._process: subprocess.Popen[bytes] | None = None
        self._count = 0
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]

    @property
    def log(self) -> Path:
        return self._folder / "log"

    def initialise(self) -> None:
        if self._account is not None:
            shutil.chown(self._folder, self._account)
        command = [self._binaries / "initdb", "-D", self._folder / "data", "-U", "test", "-A", "trust", "-E", "UTF8"]
        subprocess.run(
            [*self._as_account, *command, "--locale=C.UTF-8", "-N"], check=True, capture_output=True, cwd=self._folder
        )

    def start(self) -> None:
        assert self._process is None
        options = ["-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=", "-c", "max_connections=200"]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *self._as_account,
                    *[self._binaries / "postgres", "-D", self._folder / "data", "-p", str(self.port)],
                    *options,
                    *self._options,
                ],
                stdout=log,
                stderr=log,
                cwd=self._folder,
            )
        until(self._answers, limit_s=60, what="PostgreSQL answers")

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self.log.read_text()
        try:
            psycopg.connect(self.url("postgres"), connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """SIGINT ends every session; SIGQUIT leaves without writing anything, as a crash."""
        if self._process is None:
            return
        self._process.send_signal(how)
        self._process.wait(60)
        self._process = None

    def url(self, database: str) -> str:
        return f"postgresql://test@127.0.0.1:{self.port}/{database}"

    def create_database(self) -> str:
        """The URL of a new database."""
        self._count += 1
        name = f"test_{os.getpid()}_{self._count}_{time.monotonic_ns()}"
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{name}"')
        return self.url(name)


@contextmanager
def running_postgresql(*, fsync: bool = False) -> Iterator[PostgreSQL | None]:
    """A server that runs; `None` where the machine has no binaries of one."""
    binaries = find_binaries()
    if binaries is None:
        yield None
        return
    folder = Path(tempfile.mkdtemp(prefix="postgresql-"))
    try:
        server = PostgreSQL(binaries, folder, fsync=fsync)
        server.initialise()
        server.start()
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
