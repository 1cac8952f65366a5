"""`inference-worker localpubsub` and `simbackend`: the emulators, each as a server of its own."""

import argparse
import sys
from collections.abc import Callable

from worker.cli.exit_codes import EXIT_USAGE
from worker.cli.loop import serve_until_stopped
from worker.cli.parser import describe
from worker.errors import SettingsError

_EXITS = {0: "stopped by SIGTERM or Ctrl-C", EXIT_USAGE: "arguments cannot be used, or the address is taken"}


def add_localpubsub(parser: argparse.ArgumentParser) -> None:
    """Add the options of the embedded Pub/Sub server."""
    describe(
        parser,
        "Run the embedded Pub/Sub server alone. Every Google client reaches it through PUBSUB_EMULATOR_HOST. It keeps "
        "messages in memory.",
        examples=["inference-worker localpubsub", "inference-worker localpubsub --port 0"],
        exits=_EXITS,
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    parser.add_argument("--port", type=int, default=8085, help="port to listen on, 0 is any (8085)")


def run_localpubsub(namespace: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C."""
    from worker.emulators.pubsub import serve  # noqa: PLC0415 - needs gRPC

    ready = _announce("embedded Pub/Sub on {0}; export PUBSUB_EMULATOR_HOST={0} to use it")
    where = f"{namespace.host}:{namespace.port}"
    return serve_until_stopped(lambda: serve(namespace.host, namespace.port, on_ready=ready), where)


def add_simbackend(parser: argparse.ArgumentParser) -> None:
    """Add the options of the simulated backend."""
    from worker.emulators.openai.options import add_arguments  # noqa: PLC0415 - no other command needs it

    describe(
        parser,
        "Run a simulated OpenAI-compatible server: chat, completions, responses, embeddings and models, streamed and "
        "not. POST /sim/control changes its behaviour while it runs; docs/simbackend.md has every setting.",
        examples=[
            "inference-worker simbackend",
            "inference-worker simbackend --latency lognormal:2s,0.8 --max-concurrency 16",
            "inference-worker simbackend --engine llama-8b-h100 --answer-tokens 256",
            "inference-worker simbackend --error-rate 0.05 --rate 50/s",
            "inference-worker simbackend --sagemaker --variants blue,green",
        ],
        exits=_EXITS,
    )
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
        if options.sagemaker:
            print(f"simulated SageMaker runtime:        {backend.base_url}/endpoints/NAME/invocations", flush=True)

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
