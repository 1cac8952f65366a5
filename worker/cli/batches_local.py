"""
`inference-worker batches local`: the whole of it on this machine, in one process tree.

This process serves the API, publishes lines and collects results.  Below it run, each as a process of its own, the
embedded Pub/Sub server, the worker (`run`, exactly as a container starts it) and, without a server of the user's, the
simulated backend.  They end with this process, also when it is killed.

The embedded server keeps messages in memory: what was published and not answered is gone with it, and is published
again at the next start.  The first Ctrl-C has the worker finish what is at the server and keeps those results; the
second one ends everything.
"""

import argparse
import asyncio
import fcntl
import os
import socket
import sys
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, BinaryIO

import sqlalchemy as sa

from worker.batches.migrate import migrate
from worker.batches.serve import BatchServer, Role
from worker.batches.store import Store, open_engine
from worker.brokers.connection import Broker
from worker.cli.children import Child, ChildError, WorkerChild
from worker.cli.local import look_at_server
from worker.cli.loop import Interrupts, run_interruptible
from worker.cli.target import PROJECT, REQUESTS, RESPONSES, Target, find_target, simulated_backend
from worker.errors import SettingsError
from worker.settings.load import load_settings
from worker.settings.schema import PubSubSettings, Settings
from worker.telemetry.logs import configure_logs

DRAIN_S = 60.0
"""How long a cancelled batch waits for the results of its published lines."""
LEASE_S = 2.0
"""No other process coordinates these batches: the next start need not wait for the lease of a killed one."""
SETTLE_S = 5.0
SETTLE_STEP_S = 0.3
"""What the worker published at its end is stored when nothing came for a step, or `SETTLE_S` have passed."""


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def run(namespace: argparse.Namespace) -> int:
    """Serve until Ctrl-C; return the exit code."""
    configure_logs("auto", "warning")

    return run_interruptible(
        lambda interrupts: run_local(namespace, interrupts),
        lambda: _say("interrupted; batches that have not ended go on at the next start"),
    )


async def run_local(options: argparse.Namespace, interrupts: Interrupts) -> int:
    """
    Serve until Ctrl-C; return the exit code.

    Raises:
        SettingsError: The arguments cannot be used, the address is taken, or another process has the data.
        WorkerError: A child process failed; what is stored stays.

    Cancellation: the second Ctrl-C; stops everything.
    """
    options.config, options.header, options.simulated = None, [], options.backend_url is None
    target = find_target(options)
    _check_address(options.host, options.port)
    async with AsyncExitStack() as stack:
        data = _own(Path(options.data), stack)
        log = stack.enter_context(_open_log(options.log)) if options.log else None
        await look_at_server(target, {}, is_required=False)
        await asyncio.to_thread(_publish_again, _database(data))
        flags = await _start_servers(options, target, stack)
        settings = _settings(options, target, flags, data)
        worker = WorkerChild(
            log, flags["backend.base_url"], _say, lambda: False, *_worker_arguments(flags), environ=target.environ
        )
        stack.push_async_callback(worker.stop)
        await _serve(settings, worker, interrupts, data)
    return 0


async def _serve(settings: Settings, worker: WorkerChild, interrupts: Interrupts, data: Path) -> None:
    """Run the parts of this process beside the worker, and stop them in the order in which work flows."""
    is_interrupted = asyncio.Event()
    front = BatchServer(settings, roles=[Role.API, Role.COLLECTOR], on_ready=_tell_ready(settings, data))
    coordinator = BatchServer(settings, roles=[Role.COORDINATOR])

    def drain() -> None:
        _say(
            "stopping: waiting for the requests at the server, to keep their results; Ctrl-C again ends at once. "
            "Batches that have not ended go on at the next start"
        )
        is_interrupted.set()

    interrupts.drain = drain
    tasks = {
        "the API": asyncio.create_task(front.run()),
        "the coordinator": asyncio.create_task(coordinator.run()),
        "the worker": asyncio.create_task(worker.supervise()),
    }
    waiting = asyncio.create_task(is_interrupted.wait())
    try:
        await asyncio.wait({*tasks.values(), waiting}, return_when=asyncio.FIRST_COMPLETED)
        for name, task in tasks.items():
            if task.done():
                task.result()
                raise ChildError(f"{name} ended unexpectedly")
        coordinator.stop()
        await tasks["the coordinator"]
        worker.drain()
        await tasks["the worker"]
        await _until_stored(_database(data))
        front.stop()
        await tasks["the API"]
    except asyncio.CancelledError:
        worker.hurry()
        raise
    finally:
        for each in (waiting, *tasks.values()):
            each.cancel()
        await asyncio.gather(waiting, *tasks.values(), return_exceptions=True)


def _tell_ready(settings: Settings, data: Path) -> Callable[[int | None], None]:
    def tell(port: int | None) -> None:
        host = settings.batches.host
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
        print(f"base_url: {url}", flush=True)
        root = url.removesuffix("/v1")
        _say(f"batches: data in {data}; the page: {root}/batches, the routes: {root}/docs; Ctrl-C stops")

    return tell


async def _start_servers(options: argparse.Namespace, target: Target, stack: AsyncExitStack) -> dict[str, Any]:
    """Start the embedded Pub/Sub and, without a real server, the simulated one; return the settings of the worker."""
    flags = dict(target.flags)
    pubsub = Child("the embedded Pub/Sub server", "localpubsub", "--port", "0")
    stack.push_async_callback(pubsub.stop)
    process = await pubsub.start(stderr=asyncio.subprocess.PIPE)
    if target.is_simulated:
        backend = simulated_backend(options)
        stack.push_async_callback(backend.stop)
        started = await backend.start(stdout=asyncio.subprocess.PIPE)
        flags["backend.base_url"] = (await backend.read_address(started.stdout, "http://")).removesuffix("/v1")
    flags["pubsub.emulator_host"] = await pubsub.read_address(process.stderr, "PUBSUB_EMULATOR_HOST")
    broker = await Broker.connect(
        PubSubSettings(
            project_id=PROJECT,
            emulator_host=flags["pubsub.emulator_host"],
            request_subscription=RESPONSES,
            response_topic=REQUESTS,
        )
    )
    try:
        await broker.create_local(PROJECT, REQUESTS, RESPONSES)
    finally:
        await broker.aclose()
    return flags


def _settings(options: argparse.Namespace, target: Target, flags: Mapping[str, Any], data: Path) -> Settings:
    own = {
        "batches.host": options.host,
        "batches.port": options.port,
        "batches.database_url": _database(data),
        "batches.files": str(data / "files"),
        "batches.request_topic": REQUESTS,
        "batches.response_subscription": RESPONSES,
        "batches.auth": "none",
        "batches.check_models": not target.is_simulated,  # that one answers for any model, and lists one
        "batches.drain_s": DRAIN_S,
        "batches.lease_s": LEASE_S,
    }
    return load_settings(None, flags={**flags, **own}, environ={**os.environ, **target.environ})


def _worker_arguments(flags: Mapping[str, Any]) -> list[str]:
    arguments = ["run"]
    for key, value in flags.items():
        arguments += ["--set", f"{key}={value}"]
    return arguments


def _database(data: Path) -> str:
    return f"sqlite:///{data / 'batches.db'}"


def _publish_again(url: str) -> None:
    """Have the lines published again that another run's broker took with it; blocks."""
    engine = open_engine(url)
    store = Store(engine)
    try:
        migrate(engine)
        store.publish_again()
    except sa.exc.OperationalError as error:
        raise SettingsError([f"--data: {error.orig}"]) from None
    finally:
        store.close()


async def _until_stored(url: str) -> None:
    """Wait until the collector has stored what the worker published last."""
    store = Store(open_engine(url))
    try:
        before = -1
        async with asyncio.timeout(SETTLE_S):
            while (settled := await asyncio.to_thread(_settled, store)) != before:
                before = settled
                await asyncio.sleep(SETTLE_STEP_S)
    except TimeoutError:
        pass  # what is not stored yet is asked for again at the next start
    finally:
        store.close()


def _settled(store: Store) -> int:
    return sum(batch.settled for batch in store.unfinished_batches())


def _own(data: Path, stack: AsyncExitStack) -> Path:
    """
    Make the folder, and keep every other process out of it until the stack ends.

    Raises:
        SettingsError: It cannot be made, or another process has it.
    """
    try:
        data.mkdir(parents=True, exist_ok=True)
        lock = stack.enter_context((data / "lock").open("ab"))
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SettingsError([f"--data: {data} is in use by another `batches local`"]) from None
    except OSError as error:
        raise SettingsError([f"--data: {data}: {error.strerror}"]) from None
    return data.absolute()


def _check_address(host: str, port: int) -> None:
    """
    Try the address, so that a taken one is told before anything is started.

    Raises:
        SettingsError: Nothing can listen there.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise SettingsError([f"cannot listen on {host}:{port}: {reason}"]) from None


def _open_log(path: str) -> BinaryIO:
    try:
        return Path(path).open("ab")
    except OSError as error:
        raise SettingsError([f"--log: {path}: {error.strerror}"]) from None
