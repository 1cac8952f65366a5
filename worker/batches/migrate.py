"""
Creates the tables, and changes those of an earlier version: `batches migrate`, and every start on SQLite.

One transaction under a lock, so that of several processes which start at once one migrates and the others find it done.
A process that is killed meanwhile leaves the database as it was.
"""

from functools import lru_cache
from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from worker.batches.store import SchemaError

_LOCK = 0x62617463_686573
"""Of PostgreSQL's advisory locks: any number that nothing else uses."""


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    return config


@lru_cache(maxsize=1)
def head_revision() -> str:
    """Return the revision that this version's tables have."""
    head = ScriptDirectory.from_config(_config()).get_current_head()
    assert head is not None
    return head


def current_revision(connection: sa.Connection) -> str | None:
    """Return the revision of a database; `None` for an empty one."""
    return MigrationContext.configure(connection).get_current_revision()


def migrate(engine: sa.Engine, revision: str = "head") -> None:
    """
    Bring a database to the tables of this version; does nothing when it has them.

    Args:
        engine: Of the database.
        revision: Tables of an earlier version, for tests of what becomes of them.

    Raises:
        sqlalchemy.exc.SQLAlchemyError: It cannot be reached or changed.
        SchemaError: A newer version has changed it; permanent.
    """
    with engine.begin() as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))
        current = current_revision(connection)
        if current == head_revision():
            return
        config = _config()
        known = {each.revision for each in ScriptDirectory.from_config(config).walk_revisions()}
        if current is not None and current not in known:
            raise SchemaError(
                f"the database is at schema {current}, which a newer version made; this one knows {head_revision()}"
            )
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
