"""`python -m worker.emulators.openai`: the simulated server alone."""

import argparse
import asyncio
import signal
import sys
from collections.abc import Sequence

import uvloop

from worker.emulators.openai.options import SimOptions, add_arguments, options_from
from worker.emulators.openai.server import announce, serve


async def _until_signalled(options: SimOptions, host: str, port: int) -> None:
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    await serve(options, host, port, announce)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until SIGINT or SIGTERM and return the exit code: 0, or 2 for unusable options or a taken port."""
    parser = argparse.ArgumentParser(prog="simbackend", description="A simulated OpenAI-compatible server.")
    add_arguments(parser)
    namespace = parser.parse_args(arguments)
    try:
        options = options_from(namespace)
    except ValueError as error:
        parser.error(str(error))
    try:
        uvloop.run(_until_signalled(options, namespace.host, namespace.port))
    except asyncio.CancelledError:
        return 0
    except OSError as error:
        sys.stderr.write(f"simbackend: cannot listen on {namespace.host}:{namespace.port}: {error.strerror}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
