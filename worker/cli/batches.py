"""
`inference-worker batches`: the OpenAI-compatible Files and Batches API, its database and its keys.

`serve` is what a container starts; `local` has everything in one process tree (`worker.cli.batches_local`).
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from worker.cli.arguments import add_settings, at_least_one
from worker.cli.exit_codes import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE
from worker.cli.parser import Parser, describe
from worker.errors import SettingsError, WorkerError, how_to_get

if TYPE_CHECKING:
    from worker.batches.store import Store
    from worker.settings.schema import Settings


LOCAL_PORT = 8100
"""Not 8000, which vLLM and the simulated backend take."""
LOCAL_DATA = "batches-data"


def add_arguments(parser: Parser) -> None:
    """Add the command's actions."""
    describe(
        parser,
        "OpenAI's Files and Batches API in front of the topics: each line of an uploaded file becomes one message to "
        "the worker. Needs the extra `batches`. docs/batches.md has the whole of it.",
        examples=[
            "inference-worker batches local",
            "inference-worker batches serve --config worker.yaml",
            "inference-worker batches keys add acme ci --config worker.yaml",
        ],
    )
    actions = parser.add_subparsers(metavar="ACTION", required=True, help="what to do")
    _add_local(actions.add_parser("local", help="everything on this machine, in one command"))
    _add_serve(actions.add_parser("serve", help="serve the API, publish lines, collect answers"))
    _add_migrate(actions.add_parser("migrate", help="create or update the tables of the database"))
    _add_keys(actions.add_parser("keys", help="add, list and revoke API keys"))


def run(namespace: argparse.Namespace) -> int:
    """Run the action."""
    try:
        import sqlalchemy  # noqa: F401, PLC0415 - of the extra
        import starlette  # noqa: F401, PLC0415
    except ImportError:
        raise SettingsError([f"batches: {how_to_get('batches')}"]) from None
    code: int = namespace.action(namespace)
    return code


def _add_local(parser: argparse.ArgumentParser) -> None:
    describe(
        parser,
        "Serve the API on this machine with nothing else: embedded Pub/Sub, the worker, a simulated model server or "
        "yours, SQLite and a folder. The first Ctrl-C finishes the requests that are at the server; what is left goes "
        "on when the command is started again.",
        examples=[
            "inference-worker batches local",
            "inference-worker batches local --backend-url http://localhost:8000",
        ],
        exits={
            0: "stopped by Ctrl-C or SIGTERM, and drained",
            EXIT_FAILED: "a part could not be started or died too often",
            EXIT_USAGE: "arguments cannot be used, or the address is taken",
            EXIT_INTERRUPTED: "stopped by a second Ctrl-C",
        },
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    parser.add_argument("--port", type=int, default=LOCAL_PORT, help=f"0 is any free port ({LOCAL_PORT})")
    parser.add_argument("--data", metavar="DIR", default=LOCAL_DATA, help=f"database and files ({LOCAL_DATA})")
    parser.add_argument("--backend-url", metavar="URL", help="an OpenAI-compatible server (default: simulated)")
    parser.add_argument("--api-key-file", metavar="FILE", help="its key (default: the variable OPENAI_API_KEY)")
    parser.add_argument("--latency", metavar="T", help="of the simulated server (50ms)")
    parser.add_argument("--engine", metavar="NAME", help="of the simulated server: an engine to be as fast as (none)")
    parser.add_argument("--concurrency", type=at_least_one, metavar="N", default=64, help="requests at once (64)")
    parser.add_argument("--log", metavar="FILE", help="append the log of the worker to this file")
    parser.set_defaults(action=_local)


def _add_serve(parser: argparse.ArgumentParser) -> None:
    describe(
        parser,
        "Serve the API until SIGTERM. A process has every role unless some are named: api answers clients, coordinator "
        "validates files, publishes lines and ends batches, collector stores answers. Each may run several times.",
        examples=[
            "inference-worker batches serve --config worker.yaml",
            "inference-worker batches serve --config worker.yaml --role api",
        ],
        exits={
            0: "stopped",
            EXIT_FAILED: "the topic or subscription is gone or refused, or the tables are of another version",
            EXIT_USAGE: "settings cannot be used",
        },
    )
    parser.add_argument(
        "--role",
        action="append",
        choices=["api", "coordinator", "collector"],
        help="what this process does; may be repeated (all three)",
    )
    add_settings(parser)
    parser.set_defaults(action=_serve)


def _local(namespace: argparse.Namespace) -> int:
    from worker.cli.batches_local import run as run_local  # noqa: PLC0415 - of the extra, as all below

    return run_local(namespace)


def _serve(namespace: argparse.Namespace) -> int:
    from worker.batches.serve import ALL_ROLES, BatchServer, Role  # noqa: PLC0415
    from worker.cli.loop import on_signals, run_loop  # noqa: PLC0415
    from worker.telemetry.logs import configure_logs, get_logger  # noqa: PLC0415

    settings = _settings(namespace)
    configure_logs(settings.log.format, settings.log.level)
    roles = [Role(role) for role in namespace.role] if namespace.role else ALL_ROLES

    async def serve() -> int:
        server = BatchServer(settings, roles=roles)
        on_signals(server.stop)
        await server.run()
        return 0

    try:
        return run_loop(serve)
    except WorkerError as error:
        get_logger("batches").error("startup_failed", error=error.one_line)
        return EXIT_USAGE if isinstance(error, SettingsError) else EXIT_FAILED


def _add_migrate(parser: argparse.ArgumentParser) -> None:
    describe(
        parser,
        "Create the tables of the database, or bring those of an earlier version up to date. Does nothing when they "
        "are; several may do it at once.",
        examples=["inference-worker batches migrate --config worker.yaml"],
        exits={0: "done", EXIT_FAILED: "the database cannot be reached", EXIT_USAGE: "settings cannot be used"},
    )
    add_settings(parser)
    parser.set_defaults(action=_migrate)


def _add_keys(parser: argparse.ArgumentParser) -> None:
    exits = {0: "done", EXIT_FAILED: "there is no such key, or no database", EXIT_USAGE: "settings cannot be used"}
    describe(
        parser,
        "Manage the keys of the API. The database has only their hashes.",
        examples=["inference-worker batches keys add acme ci", "inference-worker batches keys revoke acme ci"],
        exits=exits,
    )
    actions = parser.add_subparsers(metavar="ACTION", required=True, help="what to do")
    add = actions.add_parser("add", help="make a key for a tenant and print it, once")
    describe(
        add,
        "Make a key and print it; it is not stored and cannot be shown again. A tenant sees its own files and batches, "
        "whichever of its keys is used.",
        examples=["inference-worker batches keys add acme ci --config worker.yaml"],
        exits=exits,
    )
    _add_name(add)
    add.set_defaults(action=_add_key)
    listed = actions.add_parser("list", help="list tenants and names of the keys")
    describe(
        listed, "List every key, without the key itself.", examples=["inference-worker batches keys list"], exits=exits
    )
    add_settings(listed)
    listed.set_defaults(action=_list_keys)
    revoke = actions.add_parser("revoke", help="end a key")
    describe(
        revoke,
        "End a key; servers refuse it within 30 s. The tenant's files and batches stay.",
        examples=["inference-worker batches keys revoke acme ci --config worker.yaml"],
        exits=exits,
    )
    _add_name(revoke)
    revoke.set_defaults(action=_revoke_key)


def _add_name(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("tenant", metavar="TENANT", type=_word, help="who owns the files and batches")
    parser.add_argument("name", metavar="NAME", type=_word, help="what tells the tenant's keys apart")
    add_settings(parser)


def _word(text: str) -> str:
    if not text or len(text) > 100 or not text.isprintable() or " " in text:  # noqa: PLR2004 - told in the message
        raise argparse.ArgumentTypeError("must be a word of at most 100 characters")
    return text


@contextmanager
def _opened_store(namespace: argparse.Namespace) -> Iterator["Store"]:
    from worker.batches.migrate import migrate  # noqa: PLC0415 - of the extra, as all below
    from worker.batches.store import Store, open_engine  # noqa: PLC0415

    engine = open_engine(_database_url(namespace))
    store = Store(engine)
    try:
        if engine.dialect.name == "sqlite":
            migrate(engine)
        else:
            store.check()
        yield store
    finally:
        store.close()


def _settings(namespace: argparse.Namespace) -> "Settings":
    """Return the settings; those that only a worker needs may be missing."""
    from worker.cli.runs import run_settings  # noqa: PLC0415

    return run_settings(namespace)


def _database_url(namespace: argparse.Namespace) -> str:
    from worker.batches.secrets import database_url  # noqa: PLC0415 - of the extra

    return database_url(_settings(namespace).batches)


def _migrate(namespace: argparse.Namespace) -> int:
    import sqlalchemy as sa  # noqa: PLC0415

    from worker.batches.migrate import head_revision, migrate  # noqa: PLC0415
    from worker.batches.store import open_engine  # noqa: PLC0415

    engine = open_engine(_database_url(namespace))
    try:
        migrate(engine)
    except sa.exc.SQLAlchemyError as error:
        reason = str(getattr(error, "orig", None) or error).partition("\n")[0]
        raise WorkerError(f"the database cannot be changed: {reason}") from None
    finally:
        engine.dispose()
    print(f"the database is at {head_revision()}")
    return 0


def _add_key(namespace: argparse.Namespace) -> int:
    from worker.batches.api.auth import hash_of, new_key  # noqa: PLC0415

    key = new_key()
    with _opened_store(namespace) as store:
        taken = [each for each in store.list_keys() if (each.tenant, each.name) == (namespace.tenant, namespace.name)]
        if any(each.revoked_at is None for each in taken):
            raise WorkerError(f"{namespace.tenant} has a key named {namespace.name} already")
        store.add_key(key_hash=hash_of(key), tenant=namespace.tenant, name=namespace.name)
    print(key)
    print("keep it: it cannot be shown again", file=sys.stderr)
    return 0


def _list_keys(namespace: argparse.Namespace) -> int:
    from datetime import UTC, datetime  # noqa: PLC0415

    with _opened_store(namespace) as store:
        keys = store.list_keys()
    for key in keys:
        made = datetime.fromtimestamp(key.created_at, UTC).isoformat(" ").removesuffix("+00:00")
        state = "revoked" if key.revoked_at is not None else "good"
        print(f"{key.tenant}\t{key.name}\t{made}\t{state}")
    return 0


def _revoke_key(namespace: argparse.Namespace) -> int:
    with _opened_store(namespace) as store:
        if not store.revoke_keys(tenant=namespace.tenant, name=namespace.name):
            raise WorkerError(f"{namespace.tenant} has no key named {namespace.name} that is not revoked")
    print("revoked", file=sys.stderr)
    return 0
