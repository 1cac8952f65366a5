"""
Process edge: nothing but the signal handler that must stand before the slow imports.

As PID 1 of a container a process ignores SIGTERM until it has a handler.  Before the worker is built nothing is
leased, so the right answer to SIGTERM is to leave at once with 0.
"""

import os
import signal
import sys
from types import FrameType


def _leave(_signal: int, _frame: FrameType | None) -> None:
    os._exit(0)


def main() -> None:
    """Run the command line; never returns."""
    signal.signal(signal.SIGTERM, _leave)
    # We start processes but never fork into Python: gRPC's fork handlers would only complain about its own threads.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    # Settings mean the same whatever else is installed, and pydantic need not look through every installed package.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    from worker.cli.main import run_command  # noqa: PLC0415 - the handler comes first

    sys.exit(run_command(sys.argv[1:]))


if __name__ == "__main__":
    main()
