"""`inference-worker localpubsub` and `simbackend`: the emulators, each as a server of its own."""

import argparse
import sys
from collections.abc import Callable

from worker.cli.loop import serve_until_stopped
from worker.errors import SettingsError


def add_localpubsub(parser: argparse.ArgumentParser) -> None:
    """Add the options of the embedded Pub/Sub server."""
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8085)


def run_localpubsub(namespace: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C."""
    from worker.emulators.pubsub import serve  # noqa: PLC0415 - needs gRPC

    ready = _announce("embedded Pub/Sub on {0}; export PUBSUB_EMULATOR_HOST={0} to use it")
    where = f"{namespace.host}:{namespace.port}"
    return serve_until_stopped(lambda: serve(namespace.host, namespace.port, on_ready=ready), where)


def add_simbackend(parser: argparse.ArgumentParser) -> None:
    """Add the options of the simulated backend."""
    from worker.emulators.openai.options import add_arguments  # noqa: PLC0415 - no other command needs it

    add_arguments(parser)


def run_simbackend(namespace: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C."""
    from worker.emulators.openai.options import options_from  # noqa: PLC0415 - no other command needs it
    from worker.emulators.openai.server import SimBackend, serve  # noqa: PLC0415 - needs an HTTP server

    def ready(backend: SimBackend) -> None:
        print(
            f"simulated OpenAI-compatible server: {backend.base_url}/v1\n"
            f"control and statistics:             {backend.control_url}/sim/control and /sim/stats",
            flush=True,
        )

    try:
        options = options_from(namespace)
    except ValueError as error:
        raise SettingsError([str(error)]) from None
    where = f"{namespace.host}:{namespace.port}"
    return serve_until_stopped(lambda: serve(options, namespace.host, namespace.port, on_ready=ready), where)


def _announce(text: str) -> Callable[[str], None]:
    def announce(address: str) -> None:
        print(text.format(address), file=sys.stderr, flush=True)

    return announce
