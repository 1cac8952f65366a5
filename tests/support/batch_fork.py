"""
Processes of `batches serve` that start at once: forked from one that has imported everything.

A test that kills a hundred processes would else spend its time with their imports.
"""

import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

from worker.batches.serve import BatchServer, Role
from worker.cli.loop import on_signals, run_loop
from worker.settings.load import load_settings
from worker.telemetry.logs import configure_logs

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["tests.support.batch_fork", "worker.batches.migrate", "grpc.aio", "sqlite3", "psycopg"]
)
_UNUSED = {
    "pubsub.request_subscription": "unused",
    "pubsub.response_topic": "unused",
    "backend.base_url": "http://unused",
}


def _serve(roles: str, settings: dict[str, str], log: str) -> None:
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), sys.stderr.fileno())
    loaded = load_settings(flags={**_UNUSED, **settings}, environ={})
    configure_logs("json", "info")

    async def serve() -> int:
        server = BatchServer(loaded, roles=[Role(role) for role in roles.split(",")])
        on_signals(server.stop)
        await server.run()
        return 0

    run_loop(serve)


class ForkedProcess:
    """One of them, from its start on."""

    def __init__(self, roles: str, settings: dict[str, Any], log: Path) -> None:
        values = {key: str(value) for key, value in settings.items()}
        self.log_path = log
        self._process = _CONTEXT.Process(target=_serve, args=(roles, values, str(log)), daemon=True)
        self._process.start()

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    close = kill
