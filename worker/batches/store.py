"""
The store: batches, files, results and keys in a SQL database; the only module with SQL.

Synchronous, to be called in threads.  Each method is one transaction, durable when it returns.  The same code runs on
SQLite (one machine; several processes) and PostgreSQL (several replicas).

* Every move of a batch compares the stored status first, under a lock of the row.  Of two processes that finish one
  batch, one does it and the other is told that the batch is not where it thought.
* The result of a record is inserted once; whatever comes later for the same record is dropped and counted.  The counts
  of a batch change in the transaction that inserts the results, under the same lock, so they are never a result ahead
  or behind.
* Times are the database's.  A time that is set is never before one that was set earlier, even when the clock goes back.

Errors: `StoreUnavailableError` when the database cannot be reached or cannot write; then nothing of the transaction is
stored, except that a commit whose confirmation was lost may be.  So every method may be called again with the same
arguments: what the first call stored is found, and not done twice.
"""

import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import msgspec
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from worker.batches import tables as t
from worker.batches.ids import BATCH, EVENT, FILE, make_id
from worker.batches.states import CANCELLABLE, ENTERED_FROM, FINAL, STAMPS, Status, stamp_of
from worker.errors import SettingsError, WorkerError

LEADER = "coordinator"
"""Name of the lease whose owner coordinates."""
INSERT_ROWS = 500
"""Rows of one INSERT statement; SQLite takes 32,766 parameters."""
_WAL_PAUSE_S = 0.02
_BUSY_S = 30
"""How long SQLite waits for another process's transaction."""
_UNAVAILABLE = (sa.exc.OperationalError, sa.exc.InterfaceError, sa.exc.TimeoutError, sa.exc.DisconnectionError)
_READ_ONLY = "25006"
"""What PostgreSQL says while it is a standby: a failover is under way."""
_READY_S = 86_400
"""A file whose content was not complete after this is removed: its upload was cut, or its process killed."""


class StoreError(WorkerError):
    """Root of what the store raises."""


class StoreUnavailableError(StoreError):
    """The database is away, full, locked or restarting; retryable."""


class SchemaError(StoreError):
    """The database has not the tables of this version; permanent until `batches migrate` of the right version ran."""


class IdempotencyConflictError(StoreError):
    """The key was used for a batch with other parameters; permanent."""


class TokenLimitError(StoreError):
    """
    The tenant's unfinished batches leave no room for another; retryable when one of them has ended.

    Attributes:
        enqueued: Tokens of the unfinished batches.
        limit: What is allowed.
    """

    def __init__(self, enqueued: int, limit: int) -> None:
        self.enqueued = enqueued
        self.limit = limit
        super().__init__(f"{enqueued} tokens are enqueued, {limit} are allowed")


class CreateLimitError(StoreError):
    """The tenant created as many batches within the last hour as it may; retryable."""


class NotCancellableError(StoreError):
    """
    The batch has ended; permanent.

    Attributes:
        status: How.
    """

    def __init__(self, status: Status) -> None:
        self.status = status
        super().__init__(status.value)


class File(msgspec.Struct, frozen=True, kw_only=True):
    """A file that is there: neither deleted nor expired, and complete."""

    id: str
    tenant: str
    purpose: str
    filename: str
    bytes: int
    created_at: int
    expires_at: int | None
    object_key: str


class NewBatch(msgspec.Struct, frozen=True, kw_only=True):
    """A batch to be created."""

    tenant: str
    endpoint: str
    input_file_id: str
    """As the client gave it; there need not be such a file."""
    window_s: float
    id: str = msgspec.field(default_factory=lambda: make_id(BATCH))
    """Chosen beforehand, so that the creation can be repeated after an error."""
    completion_window: str = "24h"
    metadata: dict[str, str] | None = None
    idempotency_key: str | None = None
    idempotency_digest: str | None = None
    """Of the parameters; the same for the same parameters."""
    output_expires_after_s: int | None = None
    retry_of: str | None = None
    """Id of the batch whose failed lines these are."""


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """A batch as it is stored; times are Unix seconds."""

    id: str
    tenant: str
    endpoint: str
    input_file_id: str
    input_key: str | None
    input_bytes: int
    completion_window: str
    metadata: dict[str, str] | None
    output_expires_after_s: int | None
    retry_of: str | None
    status: Status
    is_closed: bool
    created_at: int
    expires_at: int
    in_progress_at: int | None
    finalizing_at: int | None
    cancelling_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelled_at: int | None
    model: str | None
    total: int
    completed: int
    failed: int
    tokens: int
    usage: dict[str, Any] | None
    failures: list[dict[str, Any]] | None
    """`[{"code", "count", "example_line", "example_message"}]`, the most frequent first; set with the final status."""
    output_id: str
    error_id: str
    output_file_id: str | None
    error_file_id: str | None
    announced_records: int
    published_records: int
    published_bytes: int
    published_lines: int
    waiting_for: str | None
    sampled_at: float | None
    sampled_settled: int
    settled_at: float | None

    @property
    def settled(self) -> int:
        """Records that have a result."""
        return self.completed + self.failed

    @property
    def outstanding(self) -> int:
        """Records that are published, or may be, and have no result."""
        return max(0, max(self.announced_records, self.published_records) - self.settled)

    @property
    def rate_per_s(self) -> float | None:
        """Results a second of late; `None` while there are none to count."""
        since, before = self.sampled_at, self.sampled_settled
        if since is None or self.settled_at is None or self.settled_at <= since or self.settled <= before:
            return None
        return (self.settled - before) / (self.settled_at - since)


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of a failed batch's `errors`."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None
    """From 1; `None` when it is the file's."""


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """The result of one record."""

    batch_id: str
    record: int
    """From 1; blank lines are not counted."""
    is_ok: bool
    line: int | None = None
    """The same with blank lines; `None`: unknown."""
    status_code: int | None = None
    code: str | None = None
    """Of the error; `None` when `is_ok`."""
    message: str | None = None
    request_id: str | None = None
    body: bytes | None = None
    """The backend's JSON object; `None` where there is no response."""
    input_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None
    reasoning_tokens: int | None = None


class Recorded(msgspec.Struct, frozen=True, kw_only=True):
    """What became of some outcomes: the sum is their number."""

    stored: int
    repeated: int
    """Their records had a result already."""
    late: int
    """Their batch was closed."""
    unknown: int
    """There is no such batch, or no such record in it."""


class ResultFile(msgspec.Struct, frozen=True, kw_only=True):
    """An output or error file that was written."""

    id: str
    filename: str
    bytes: int
    object_key: str


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What the final status of a batch brings with it."""

    completed: int = 0
    failed: int = 0
    output: ResultFile | None = None
    error: ResultFile | None = None
    usage: dict[str, Any] | None = None
    failures: list[dict[str, Any]] | None = None
    succeeded: bytes | None = None
    """A bit for each record: whether it is in the output file."""


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """An event that has not been told to all that are to hear of it."""

    id: str
    batch_id: str
    type: str
    created_at: int
    attempts: int
    webhook_at: float | None
    topic_at: float | None


class ApiKey(msgspec.Struct, frozen=True, kw_only=True):
    """A key, by its hash."""

    hash: str
    tenant: str
    name: str
    created_at: int
    revoked_at: int | None


class Page(msgspec.Struct, frozen=True, kw_only=True):
    """A part of a list."""

    items: list[Any]
    has_more: bool


_BATCH_COLUMNS = [t.batches.c[name] for name in Batch.__struct_fields__]
_FILE_COLUMNS = [t.files.c[name] for name in File.__struct_fields__]
_EVENT_COLUMNS = [t.events.c[name] for name in Event.__struct_fields__]
_KEY_COLUMNS = [t.api_keys.c[name] for name in ApiKey.__struct_fields__]
_OUTCOME_COLUMNS = [t.outcomes.c[name] for name in Outcome.__struct_fields__]
_JSON = ("metadata", "usage", "failures")


def open_engine(url: str, *, pool_size: int = 8) -> sa.Engine:
    """
    Return an engine for a database; nothing is connected.

    Args:
        url: `sqlite:///FILE`, `postgresql://…`.
        pool_size: Connections of this process at most.

    Raises:
        SettingsError: The URL is none; permanent.
    """
    try:
        parsed = sa.make_url(url)
    except sa.exc.ArgumentError:
        raise SettingsError(["batches.database_url: is not the URL of a database"]) from None
    if parsed.get_backend_name() in {"postgresql", "postgres"}:
        return sa.create_engine(
            parsed.set(drivername="postgresql+psycopg"),
            pool_size=pool_size,
            max_overflow=0,
            pool_timeout=_BUSY_S,
            pool_pre_ping=True,
            hide_parameters=True,
            connect_args={
                "connect_timeout": 5,
                "keepalives_idle": 10,
                "keepalives_interval": 5,
                "keepalives_count": 3,
                "tcp_user_timeout": 20_000,
                "options": "-c statement_timeout=60000 -c lock_timeout=30000 -c client_encoding=UTF8",
            },
        )
    if parsed.database in {None, "", ":memory:"}:
        raise SettingsError(["batches.database_url: must name a file, sqlite:///FILE"])
    engine = sa.create_engine(
        parsed.set(drivername="sqlite"),
        pool_size=pool_size,
        max_overflow=0,
        pool_timeout=_BUSY_S,
        hide_parameters=True,
        connect_args={"timeout": _BUSY_S, "check_same_thread": False},
    )

    @sa.event.listens_for(engine, "connect")
    def _connected(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # transactions are begun below, not by the driver
        _use_wal(connection)
        # FULL: what was committed is on the disk.
        for pragma in ("synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")

    @sa.event.listens_for(engine, "begin")
    def _begun(connection: sa.Connection) -> None:
        # A transaction that reads first and then writes would fail when another one wrote in between.
        writes = connection.get_execution_options().get("writes", True)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _use_wal(connection: Any) -> None:
    """
    Have readers and the writer of an SQLite database not wait for each other.

    A new database changes to it under a lock that SQLite does not wait for when several processes begin at once.
    """
    end = time.monotonic() + _BUSY_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() >= end:
                raise
            time.sleep(_WAL_PAUSE_S)
        else:
            return


class Store:
    """
    See the module.

    Args:
        engine: Of `open_engine`.
        clock: Stands for the database's clock in tests; Unix seconds.
    """

    def __init__(self, engine: sa.Engine, *, clock: Callable[[], float] | None = None) -> None:
        self._engine = engine
        self._clock = clock
        self._is_postgresql = engine.dialect.name == "postgresql"
        self._turn = None if self._is_postgresql else threading.Lock()
        self._insert: Any = postgresql.insert if self._is_postgresql else sqlite.insert

    def close(self) -> None:
        """Close every connection that is not in use."""
        self._engine.dispose()

    def check(self) -> None:
        """
        Check that the database can be read and has the tables of this version.

        Raises:
            StoreUnavailableError: It cannot be reached.
            SchemaError: `batches migrate` has to be run.
        """
        from worker.batches.migrate import current_revision, head_revision  # noqa: PLC0415 - alembic takes 0.2 s

        with self._reading() as connection:
            current = current_revision(connection)
        if current != head_revision():
            raise SchemaError(
                f"the database is at schema {current or 'none'}, this version needs {head_revision()}: "
                "run `inference-worker batches migrate`"
            )

    # Transactions.

    @contextmanager
    def _reading(self) -> Iterator[sa.Connection]:
        with self._translated(), self._engine.connect() as plain:
            connection = plain.execution_options(writes=False)
            with connection.begin():
                yield connection

    @contextmanager
    def _writing(self) -> Iterator[sa.Connection]:
        with self._own_turn(), self._translated(), self._engine.begin() as connection:
            yield connection

    @contextmanager
    def _own_turn(self) -> Iterator[None]:
        """
        Wait until no other thread of this process writes to SQLite.

        SQLite has one writer at a time and lets the others ask again and again: of many threads one might ask at the
        wrong moment for all of `_BUSY_S`.
        """
        if self._turn is None:
            yield
            return
        if not self._turn.acquire(timeout=_BUSY_S):
            raise StoreUnavailableError("other threads write to the database")
        try:
            yield
        finally:
            self._turn.release()

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except _UNAVAILABLE as error:
            raise StoreUnavailableError(_first_line(error)) from error
        except sa.exc.DBAPIError as error:
            if error.connection_invalidated or getattr(error.orig, "sqlstate", None) == _READ_ONLY:
                raise StoreUnavailableError(_first_line(error)) from error
            raise

    def _now(self, connection: sa.Connection) -> float:
        """Return the time, Unix seconds."""
        if self._clock is not None:
            return self._clock()
        if not self._is_postgresql:
            return time.time()  # SQLite's clock is the machine's
        return float(connection.scalar(sa.select(sa.func.extract("epoch", sa.func.clock_timestamp()))) or 0)

    def now(self) -> float:
        """Return the database's time, Unix seconds."""
        with self._reading() as connection:
            return self._now(connection)

    # Files.

    def begin_file(self, file: File) -> None:
        """
        Note a file whose content is about to be written under `object_key`.

        Nothing shows it until `finish_file`; if that never comes, the content is removed after a day.
        """
        with self._writing() as connection:
            self._add_file(connection, file, is_ready=False)

    def finish_file(self, file_id: str, size: int, *, expires_at: int | None = None) -> File | None:
        """
        Show a file whose content is written; return it.

        Args:
            file_id: Of `begin_file`.
            size: Bytes of the content.
            expires_at: Takes the place of what `begin_file` said; a form may tell it after the content.

        Returns:
            `None`: it was removed in the meantime.
        """
        values = {"is_ready": True, "bytes": size} | ({} if expires_at is None else {"expires_at": expires_at})
        with self._writing() as connection:
            connection.execute(
                sa.update(t.files).where(t.files.c.id == file_id, ~t.files.c.is_removed).values(**values)
            )
            return self._file(connection, t.files.c.id == file_id)

    def abandon_file(self, file_id: str) -> None:
        """Forget a file whose upload failed; its content, if there is any, must have been deleted."""
        with self._writing() as connection:
            connection.execute(sa.delete(t.files).where(t.files.c.id == file_id, ~t.files.c.is_ready))

    def _add_file(self, connection: sa.Connection, file: File, *, is_ready: bool) -> None:
        values = msgspec.structs.asdict(file)
        connection.execute(
            self._insert(t.files).values(**values, is_ready=is_ready, is_removed=False).on_conflict_do_nothing()
        )

    def get_file(self, tenant: str, file_id: str) -> File | None:
        """Return a tenant's file; `None` if there is none, or none any more."""
        with self._reading() as connection:
            return self._file(connection, t.files.c.id == file_id, t.files.c.tenant == tenant)

    def _file(self, connection: sa.Connection, *conditions: Any) -> File | None:
        query = sa.select(*_FILE_COLUMNS).where(*conditions, *self._is_there(connection))
        row = connection.execute(query).mappings().first()
        return None if row is None else File(**row)

    def _is_there(self, connection: sa.Connection) -> tuple[Any, ...]:
        now = int(self._now(connection))
        columns = t.files.c
        return (
            columns.is_ready,
            columns.deleted_at.is_(None),
            sa.or_(columns.expires_at.is_(None), columns.expires_at > now),
        )

    def list_files(
        self,
        tenant: str,
        *,
        purpose: str | None = None,
        after: str | None = None,
        limit: int = 10_000,
        order: Literal["asc", "desc"] = "desc",
    ) -> Page:
        """
        Return a tenant's files, ordered by creation.

        Args:
            tenant: Whose.
            purpose: Of all of them; `None` for any.
            after: The last id of the page before; the file itself need not be there any more.
            limit: Length of the page.
            order: `desc`: newest first.
        """
        column = t.files.c.id
        conditions = [t.files.c.tenant == tenant]
        if purpose is not None:
            conditions.append(t.files.c.purpose == purpose)
        if after is not None:
            conditions.append(column < after if order == "desc" else column > after)
        with self._reading() as connection:
            query = (
                sa.select(*_FILE_COLUMNS)
                .where(*conditions, *self._is_there(connection))
                .order_by(column.desc() if order == "desc" else column.asc())
                .limit(limit + 1)
            )
            rows = connection.execute(query).mappings().all()
        return Page(items=[File(**row) for row in rows[:limit]], has_more=len(rows) > limit)

    def delete_file(self, tenant: str, file_id: str) -> bool:
        """
        Delete a tenant's file; return whether there was one.

        Its content is removed when no unfinished batch reads it any more.
        """
        with self._writing() as connection:
            found = connection.execute(
                sa.update(t.files)
                .where(t.files.c.id == file_id, t.files.c.tenant == tenant, *self._is_there(connection))
                .values(deleted_at=int(self._now(connection)))
            )
            return found.rowcount > 0

    def removable_files(self, limit: int = 100) -> list[File]:
        """Return files whose content can be removed: deleted, expired or never completed, and read by no batch."""
        columns = t.files.c
        in_use = sa.exists().where(t.batches.c.input_key == columns.object_key, ~t.batches.c.is_final)
        with self._reading() as connection:
            now = int(self._now(connection))
            query = (
                sa.select(*_FILE_COLUMNS)
                .where(
                    ~columns.is_removed,
                    sa.or_(
                        columns.deleted_at.is_not(None),
                        columns.expires_at <= now,
                        sa.and_(~columns.is_ready, columns.created_at < now - _READY_S),
                    ),
                    ~in_use,
                )
                .limit(limit)
            )
            return [File(**row) for row in connection.execute(query).mappings()]

    def file_removed(self, file_id: str) -> None:
        """Note that a file's content is gone."""
        with self._writing() as connection:
            connection.execute(sa.update(t.files).where(t.files.c.id == file_id).values(is_removed=True))

    # Batches, as the API sees them.

    def create_batch(
        self, new: NewBatch, *, max_tokens: int | None = None, max_per_hour: int | None = None
    ) -> tuple[Batch, bool]:
        """
        Create a batch, unless there is one of the same id or the same idempotency key; return it.

        Args:
            new: The batch.
            max_tokens: Of the tenant's unfinished batches, this one included.
            max_per_hour: Batches that the tenant may create.

        Returns:
            The batch, and whether it is new.

        Raises:
            IdempotencyConflictError: The key belongs to a batch with other parameters.
            TokenLimitError: `max_tokens` would be exceeded.
            CreateLimitError: `max_per_hour` would be exceeded.
        """
        with self._writing() as connection:
            if self._is_postgresql and (max_tokens is not None or max_per_hour is not None):
                # Of two creations at once the second must count the first.
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(sa.func.hashtext(new.tenant))))
            if (known := self._same_batch(connection, new)) is not None:
                return known, False
            now = int(self._now(connection))
            file = self._input_of(connection, new)
            tokens = 0 if file is None else file.bytes // 4
            if max_tokens is not None:
                self._check_tokens(connection, new.tenant, tokens, max_tokens)
            if max_per_hour is not None:
                self._check_rate(connection, new.tenant, now, max_per_hour)
            values = {
                **{name: getattr(new, name) for name in NewBatch.__struct_fields__ if name != "window_s"},
                "metadata": None if new.metadata is None else json.dumps(new.metadata),
                "input_key": None if file is None else file.object_key,
                "input_bytes": 0 if file is None else file.bytes,
                "status": Status.VALIDATING.value,
                "is_final": False,
                "is_tidy": False,
                "is_closed": False,
                "created_at": now,
                "expires_at": now + max(1, round(new.window_s)),
                **dict.fromkeys(("total", "completed", "failed", "sampled_settled"), 0),
                **dict.fromkeys(("announced_records", "published_records", "published_bytes", "published_lines"), 0),
                "tokens": tokens,
                "output_id": make_id(FILE),
                "error_id": make_id(FILE),
            }
            connection.execute(self._insert(t.batches).values(**values).on_conflict_do_nothing())
            batch = self._same_batch(connection, new)
            assert batch is not None
            return batch, batch.id == new.id

    def _same_batch(self, connection: sa.Connection, new: NewBatch) -> Batch | None:
        """Return the batch that a creation would repeat."""
        columns = t.batches.c
        same = columns.id == new.id
        if new.idempotency_key is not None:
            by_key = sa.and_(columns.tenant == new.tenant, columns.idempotency_key == new.idempotency_key)
            same = sa.or_(same, by_key)
        row = connection.execute(sa.select(*_BATCH_COLUMNS, columns.idempotency_digest).where(same)).mappings().first()
        if row is None:
            return None
        fields = dict(row)
        if fields.pop("idempotency_digest") != new.idempotency_digest:
            raise IdempotencyConflictError("the idempotency key was used for a batch with other parameters")
        return _batch(fields)

    def _input_of(self, connection: sa.Connection, new: NewBatch) -> File | None:
        """Return the input file, which cannot be deleted until the batch is stored."""
        query = sa.select(*_FILE_COLUMNS).where(
            t.files.c.id == new.input_file_id,
            t.files.c.tenant == new.tenant,
            t.files.c.purpose == "batch",
            *self._is_there(connection),
        )
        row = connection.execute(query.with_for_update(read=True)).mappings().first()
        return None if row is None else File(**row)

    def _check_tokens(self, connection: sa.Connection, tenant: str, tokens: int, limit: int) -> None:
        enqueued = int(
            connection.scalar(
                sa.select(sa.func.coalesce(sa.func.sum(t.batches.c.tokens), 0)).where(
                    t.batches.c.tenant == tenant, ~t.batches.c.is_final
                )
            )
            or 0
        )
        if enqueued + tokens > limit:
            raise TokenLimitError(enqueued, limit)

    def _check_rate(self, connection: sa.Connection, tenant: str, now: int, limit: int) -> None:
        oldest = f"{BATCH}{max(0, now - 3600) * 1000:012x}"  # ids sort by creation
        count = connection.scalar(
            sa.select(sa.func.count()).where(t.batches.c.tenant == tenant, t.batches.c.id > oldest)
        )
        if (count or 0) >= limit:
            raise CreateLimitError(f"{limit} batches an hour are allowed")

    def get_batch(self, tenant: str, batch_id: str) -> Batch | None:
        """Return a tenant's batch; `None` if there is none."""
        with self._reading() as connection:
            return self._batch(connection, t.batches.c.id == batch_id, t.batches.c.tenant == tenant)

    def _batch(self, connection: sa.Connection, *conditions: Any) -> Batch | None:
        row = connection.execute(sa.select(*_BATCH_COLUMNS).where(*conditions)).mappings().first()
        return None if row is None else _batch(row)

    def list_batches(self, tenant: str, *, after: str | None = None, limit: int = 20) -> Page:
        """Return a tenant's batches, newest first, from the one after `after`, which need not be there."""
        conditions = [t.batches.c.tenant == tenant]
        if after is not None:
            conditions.append(t.batches.c.id < after)
        query = sa.select(*_BATCH_COLUMNS).where(*conditions).order_by(t.batches.c.id.desc()).limit(limit + 1)
        with self._reading() as connection:
            rows = connection.execute(query).mappings().all()
        return Page(items=[_batch(row) for row in rows[:limit]], has_more=len(rows) > limit)

    def errors_of(self, batch_id: str, *, limit: int | None = None) -> list[Fault]:
        """Return what is wrong with a failed batch's file, in order; empty for any other batch."""
        columns = t.batch_errors.c
        query = (
            sa.select(columns.code, columns.message, columns.param, columns.line)
            .where(columns.batch_id == batch_id)
            .order_by(columns.number)
            .limit(limit)
        )
        with self._reading() as connection:
            return [Fault(**row) for row in connection.execute(query).mappings()]

    def count_errors(self, batch_id: str) -> int:
        """Return how many there are."""
        query = sa.select(sa.func.count()).where(t.batch_errors.c.batch_id == batch_id)
        with self._reading() as connection:
            return connection.scalar(query) or 0

    def request_cancel(self, tenant: str, batch_id: str) -> Batch | None:
        """
        Have a batch cancelled; return it, unchanged if that was asked for before, `None` if there is none.

        Raises:
            NotCancellableError: It has ended in another way.
        """
        with self._writing() as connection:
            batch = self._locked(connection, t.batches.c.id == batch_id, t.batches.c.tenant == tenant)
            if batch is None or batch.status in {Status.CANCELLING, Status.CANCELLED}:
                return batch
            if batch.status not in CANCELLABLE:
                raise NotCancellableError(batch.status)
            self._move(connection, batch, Status.CANCELLING)
            return self._batch(connection, t.batches.c.id == batch_id)

    def succeeded_records(self, tenant: str, batch_id: str) -> bytes | None:
        """Return a bit for each record of a batch that has ended, set where it is in the output file; see `retry`."""
        query = sa.select(t.batches.c.succeeded).where(t.batches.c.id == batch_id, t.batches.c.tenant == tenant)
        with self._reading() as connection:
            found = connection.scalar(query)
        return None if found is None else bytes(found)

    def enqueued_tokens(self, tenant: str) -> int:
        """Return the tokens that a tenant's unfinished batches reserve."""
        query = sa.select(sa.func.sum(t.batches.c.tokens)).where(t.batches.c.tenant == tenant, ~t.batches.c.is_final)
        with self._reading() as connection:
            return int(connection.scalar(query) or 0)

    def counts(self) -> dict[Status, int]:
        """Return how many unfinished batches there are of each status."""
        query = sa.select(t.batches.c.status, sa.func.count()).where(~t.batches.c.is_final).group_by(t.batches.c.status)
        with self._reading() as connection:
            return {Status(status): count for status, count in connection.execute(query)}

    # Moves.

    def _locked(self, connection: sa.Connection, *conditions: Any) -> Batch | None:
        """Return a batch that no other transaction can change until the transaction ends."""
        row = connection.execute(sa.select(*_BATCH_COLUMNS).where(*conditions).with_for_update()).mappings().first()
        return None if row is None else _batch(row)

    def _move(self, connection: sa.Connection, batch: Batch, to: Status, **values: Any) -> int:
        """Move a locked batch; return the time that was set."""
        assert batch.status in ENTERED_FROM[to]
        known = [getattr(batch, name) or 0 for name in STAMPS]
        now = max(int(self._now(connection)), *known)
        connection.execute(
            sa.update(t.batches)
            .where(t.batches.c.id == batch.id)
            .values(**{"status": to.value, stamp_of(to): now, "is_final": to in FINAL, **values})
        )
        if to in FINAL:
            connection.execute(
                sa.insert(t.events).values(
                    id=make_id(EVENT), batch_id=batch.id, type=f"batch.{to}", created_at=now, attempts=0, due_at=now
                )
            )
        return now

    def start_batch(self, batch_id: str, *, total: int, model: str | None) -> bool:
        """Move a validated batch to `in_progress`; return whether it was still being validated."""
        with self._writing() as connection:
            batch = self._locked(connection, t.batches.c.id == batch_id)
            if batch is None or batch.status is not Status.VALIDATING:
                return False
            self._move(connection, batch, Status.IN_PROGRESS, total=total, model=model, waiting_for=None)
            return True

    def fail_batch(self, batch_id: str, faults: Sequence[Fault]) -> bool:
        """Move a batch whose file was refused to `failed`; return whether it was still being validated."""
        assert faults
        with self._writing() as connection:
            batch = self._locked(connection, t.batches.c.id == batch_id)
            if batch is None or batch.status is not Status.VALIDATING:
                return False
            rows = (
                {"batch_id": batch_id, "number": number, **msgspec.structs.asdict(fault)}
                for number, fault in enumerate(faults)
            )
            for some in _chunks(rows, INSERT_ROWS):
                connection.execute(sa.insert(t.batch_errors), some)
            self._move(connection, batch, Status.FAILED, is_closed=True, waiting_for=None)
            return True

    def begin_finalizing(self, batch_id: str) -> bool:
        """Move a batch all of whose records have results to `finalizing`; return whether it was and is so."""
        with self._writing() as connection:
            batch = self._locked(connection, t.batches.c.id == batch_id)
            if batch is None or batch.status is not Status.IN_PROGRESS or batch.settled != batch.total:
                return False
            self._move(connection, batch, Status.FINALIZING, waiting_for=None)
            return True

    def close_batch(self, batch_id: str, status: Status) -> bool:
        """
        Store no result of a batch from now on; return whether it has still this status.

        A batch that goes on (`in_progress`) is closed only when its time is over.
        """
        with self._writing() as connection:
            batch = self._locked(connection, t.batches.c.id == batch_id)
            if batch is None or batch.status is not status:
                return False
            if status is Status.IN_PROGRESS and self._now(connection) < batch.expires_at:
                return False
            connection.execute(sa.update(t.batches).where(t.batches.c.id == batch_id).values(is_closed=True))
            return True

    def finish_batch(self, batch_id: str, *, expected: Status, to: Status, result: Result, retention_s: int) -> bool:
        """
        Move a batch to its final status, together with its files, counts and event.

        Args:
            batch_id: Which.
            expected: The status that it must still have.
            to: The final status.
            result: Files that are written, and what is told about them.
            retention_s: After this the files expire, unless the batch says otherwise.

        Returns:
            Whether it had that status.
        """
        with self._writing() as connection:
            batch = self._locked(connection, t.batches.c.id == batch_id)
            if batch is None or batch.status is not expected:
                return False
            if to is Status.EXPIRED and self._now(connection) < batch.expires_at:
                return False
            now = self._move(
                connection,
                batch,
                to,
                is_closed=True,
                waiting_for=None,
                completed=result.completed,
                failed=result.failed,
                total=batch.total if batch.in_progress_at is not None else 0,
                usage=None if result.usage is None else json.dumps(result.usage),
                failures=None if result.failures is None else json.dumps(result.failures),
                succeeded=result.succeeded,
                output_file_id=None if result.output is None else result.output.id,
                error_file_id=None if result.error is None else result.error.id,
            )
            for written in (result.output, result.error):
                if written is not None:
                    file = File(
                        id=written.id,
                        tenant=batch.tenant,
                        purpose="batch_output",
                        filename=written.filename,
                        bytes=written.bytes,
                        created_at=now,
                        expires_at=now + (batch.output_expires_after_s or retention_s),
                        object_key=written.object_key,
                    )
                    self._add_file(connection, file, is_ready=True)
            return True

    # The coordinator's.

    def unfinished_batches(self) -> list[Batch]:
        """Return every batch that has not ended, oldest first."""
        query = sa.select(*_BATCH_COLUMNS).where(~t.batches.c.is_final).order_by(t.batches.c.id)
        with self._reading() as connection:
            return [_batch(row) for row in connection.execute(query).mappings()]

    def announce(self, batch_id: str, *, published: int, upto: int) -> bool:
        """
        Note that the records after `published` up to `upto` are about to be published.

        Returns:
            Whether they may be: the batch is in progress, its time is not over, and no process published them.
        """
        columns = t.batches.c
        with self._writing() as connection:
            found = connection.execute(
                sa.update(t.batches)
                .where(
                    columns.id == batch_id,
                    columns.status == Status.IN_PROGRESS.value,
                    ~columns.is_closed,
                    columns.expires_at > self._now(connection),
                    columns.published_records == published,
                )
                .values(announced_records=upto)
            )
            return found.rowcount > 0

    def advance(self, batch_id: str, *, published: int, upto: int, offset: int, lines: int) -> bool:
        """
        Note that the announced records are published.

        Args:
            batch_id: Which.
            published: Records that were published before.
            upto: Records that are published now.
            offset: Byte of the input after the last of them.
            lines: Lines of the input up to there.

        Returns:
            Whether no other process did.
        """
        columns = t.batches.c
        with self._writing() as connection:
            found = connection.execute(
                sa.update(t.batches)
                .where(columns.id == batch_id, columns.published_records == published, ~columns.is_final)
                .values(published_records=upto, published_bytes=offset, published_lines=lines)
            )
            return found.rowcount > 0

    def publish_again(self) -> None:
        """
        Have every line without a result published again, because the broker has lost its messages.

        What is published at the moment may be published twice: no process may coordinate meanwhile.
        """
        columns = t.batches.c
        never = {"published_records": 0, "published_bytes": 0, "published_lines": 0}
        with self._writing() as connection:
            goes_on = columns.status == Status.IN_PROGRESS.value
            # Records that are announced are looked up before they are published: those with a result are left out.
            announced = sa.case((columns.announced_records > columns.published_records, columns.announced_records))
            connection.execute(
                sa.update(t.batches)
                .where(~columns.is_final)
                .values(
                    **never,
                    announced_records=sa.case(
                        (goes_on, sa.func.coalesce(announced, columns.published_records)), else_=0
                    ),
                )
            )

    def settled_records(self, batch_id: str, *, after: int, upto: int) -> set[int]:
        """Return which of these records have a result."""
        columns = t.outcomes.c
        query = sa.select(columns.record).where(
            columns.batch_id == batch_id, columns.record > after, columns.record <= upto
        )
        with self._reading() as connection:
            return set(connection.scalars(query))

    def note(self, batch_id: str, *, waiting_for: str | None) -> None:
        """Note what an unfinished batch waits for, and its progress, from which its rate is told."""
        columns = t.batches.c
        with self._writing() as connection:
            connection.execute(
                sa.update(t.batches)
                .where(columns.id == batch_id, ~columns.is_final)
                .values(
                    waiting_for=waiting_for,
                    sampled_at=self._now(connection),
                    sampled_settled=columns.completed + columns.failed,
                )
            )

    # Results.

    def record(self, outcomes: Sequence[Outcome]) -> Recorded:
        """
        Store results; the first of each record is kept.

        They may belong to several batches and hold repetitions.
        """
        first: dict[tuple[str, int], Outcome] = {}
        for outcome in outcomes:
            first.setdefault((outcome.batch_id, outcome.record), outcome)
        names = sorted({batch_id for batch_id, _ in first})
        late = unknown = 0
        with self._writing() as connection:
            now = self._now(connection)
            columns = t.batches.c
            rows = connection.execute(
                sa.select(columns.id, columns.total, columns.is_closed, columns.sampled_at)
                .where(columns.id.in_(names))
                .order_by(columns.id)  # everybody locks in this order
                .with_for_update()
            ).all()
            open_to = {row.id: row.total for row in rows if not row.is_closed}
            closed = {row.id for row in rows if row.is_closed}
            wanted = list[Outcome]()
            for (batch_id, record), outcome in first.items():
                if batch_id in closed:
                    late += 1
                elif not 1 <= record <= open_to.get(batch_id, 0):
                    unknown += 1
                else:
                    wanted.append(outcome)
            stored = self._insert_outcomes(connection, wanted)
            for batch_id, (completed, failed) in stored.items():
                connection.execute(
                    sa.update(t.batches)
                    .where(columns.id == batch_id)
                    .values(
                        completed=columns.completed + completed,
                        failed=columns.failed + failed,
                        settled_at=now,
                        sampled_at=sa.func.coalesce(columns.sampled_at, now),
                    )
                )
        count = sum(completed + failed for completed, failed in stored.values())
        return Recorded(stored=count, late=late, unknown=unknown, repeated=len(outcomes) - count - late - unknown)

    def _insert_outcomes(self, connection: sa.Connection, outcomes: Sequence[Outcome]) -> dict[str, list[int]]:
        """Insert what is new; return, for each batch, how many of them are good and how many are not."""
        stored: dict[str, list[int]] = {}
        rows = [msgspec.structs.asdict(outcome) for outcome in sorted(outcomes, key=_key)]
        if rows:
            if self._is_postgresql:
                returned = connection.execute(_INSERT_ARRAYS, _columns_of(rows))
            else:
                returned = connection.execute(_INSERT_ROWS, rows)
            for batch_id, is_ok in returned:
                stored.setdefault(batch_id, [0, 0])[0 if is_ok else 1] += 1
        return stored

    def outcomes_of(
        self, batch_id: str, *, after: int, limit: int = INSERT_ROWS, max_bytes: int | None = None
    ) -> list[Outcome]:
        """
        Return results of a batch in the order of its records.

        Args:
            batch_id: Whose.
            after: The record before the first one.
            limit: Results at most.
            max_bytes: Of their bodies together, unless a single one is larger.
        """
        columns = t.outcomes.c
        of_batch = (columns.batch_id == batch_id, columns.record > after)
        query = sa.select(*_OUTCOME_COLUMNS).where(*of_batch).order_by(columns.record)
        with self._reading() as connection:
            if max_bytes is not None:
                sizes = sa.select(sa.func.coalesce(sa.func.length(columns.body), 0))
                total = count = 0
                for size in connection.scalars(sizes.where(*of_batch).order_by(columns.record).limit(limit)):
                    total += size
                    if count and total > max_bytes:
                        break
                    count += 1
                limit = count
            return [Outcome(**row) for row in connection.execute(query.limit(limit)).mappings()]

    def failures_of(self, batch_id: str) -> list[dict[str, Any]]:
        """Return the failures of a running batch by code, `[{"code", "count", "example_line", "example_message"}]`."""
        columns = t.outcomes.c
        found = (
            sa.select(columns.code, sa.func.count().label("count"), sa.func.min(columns.record).label("first"))
            .where(columns.batch_id == batch_id, ~columns.is_ok)
            .group_by(columns.code)
            .subquery()
        )
        query = (
            sa.select(found.c.code, found.c["count"], sa.func.coalesce(columns.line, columns.record), columns.message)
            .join(t.outcomes, sa.and_(columns.batch_id == batch_id, columns.record == found.c["first"]))
            .order_by(found.c["count"].desc(), found.c.code)
        )
        with self._reading() as connection:
            return [
                {"code": code, "count": count, "example_line": line, "example_message": message}
                for code, count, line, message in connection.execute(query)
            ]

    def has_expired_outcomes(self, batch_id: str) -> bool:
        """Whether a worker answered that a line's deadline had passed."""
        columns = t.outcomes.c
        query = sa.select(
            sa.exists().where(columns.batch_id == batch_id, ~columns.is_ok, columns.code == "batch_expired")
        )
        with self._reading() as connection:
            return bool(connection.scalar(query))

    def forget_outcomes(self, limit: int = 5_000) -> bool:
        """Delete some results of a batch that has ended, whose files hold them; return whether there may be more."""
        columns = t.outcomes.c
        with self._writing() as connection:
            batch_id = connection.scalar(
                sa.select(t.batches.c.id).where(t.batches.c.is_final, ~t.batches.c.is_tidy).limit(1)
            )
            if batch_id is None:
                return False
            some = sa.select(columns.record).where(columns.batch_id == batch_id).order_by(columns.record).limit(limit)
            found = connection.execute(
                sa.delete(t.outcomes).where(columns.batch_id == batch_id, columns.record.in_(some))
            )
            if found.rowcount < limit:
                connection.execute(sa.update(t.batches).where(t.batches.c.id == batch_id).values(is_tidy=True))
            return True

    # Events.

    def due_events(self, limit: int = 100) -> list[Event]:
        """Return events that are to be told now, oldest first."""
        with self._reading() as connection:
            query = (
                sa.select(*_EVENT_COLUMNS)
                .where(t.events.c.due_at <= self._now(connection))
                .order_by(t.events.c.id)
                .limit(limit)
            )
            return [Event(**row) for row in connection.execute(query).mappings()]

    def event_told(self, event_id: str, *, webhook: bool, topic: bool, again_after_s: float | None) -> None:
        """
        Note what became of an attempt to tell an event.

        Args:
            event_id: Which.
            webhook: It was accepted there.
            topic: It is published.
            again_after_s: Seconds until the next attempt; `None` when there is none.
        """
        with self._writing() as connection:
            now = self._now(connection)
            values: dict[str, Any] = {
                "attempts": t.events.c.attempts + 1,
                "due_at": None if again_after_s is None else now + again_after_s,
            }
            if webhook:
                values["webhook_at"] = now
            if topic:
                values["topic_at"] = now
            connection.execute(sa.update(t.events).where(t.events.c.id == event_id).values(**values))

    # The lease of the coordinator.

    def hold_lease(self, name: str, owner: str, ttl_s: float) -> bool:
        """Take or renew a lease for `ttl_s` seconds; return whether it is `owner`'s now."""
        columns = t.leases.c
        with self._writing() as connection:
            now = self._now(connection)
            connection.execute(
                self._insert(t.leases).values(name=name, owner=owner, until=now + ttl_s).on_conflict_do_nothing()
            )
            found = connection.execute(
                sa.update(t.leases)
                .where(columns.name == name, sa.or_(columns.owner == owner, columns.until < now))
                .values(owner=owner, until=now + ttl_s)
            )
            return found.rowcount > 0

    def release_lease(self, name: str, owner: str) -> None:
        """Give a lease up, if it is `owner`'s, so that another one need not wait for its end."""
        with self._writing() as connection:
            connection.execute(sa.delete(t.leases).where(t.leases.c.name == name, t.leases.c.owner == owner))

    # Keys.

    def add_key(self, *, key_hash: str, tenant: str, name: str) -> None:
        """Add a key; a hash that is there stays as it is."""
        with self._writing() as connection:
            connection.execute(
                self._insert(t.api_keys)
                .values(hash=key_hash, tenant=tenant, name=name, created_at=int(self._now(connection)))
                .on_conflict_do_nothing()
            )

    def find_key(self, key_hash: str) -> ApiKey | None:
        """Return a key that is not revoked."""
        query = sa.select(*_KEY_COLUMNS).where(t.api_keys.c.hash == key_hash, t.api_keys.c.revoked_at.is_(None))
        with self._reading() as connection:
            row = connection.execute(query).mappings().first()
            return None if row is None else ApiKey(**row)

    def list_keys(self) -> list[ApiKey]:
        """Return every key, the revoked ones included, oldest first."""
        query = sa.select(*_KEY_COLUMNS).order_by(t.api_keys.c.created_at, t.api_keys.c.hash)
        with self._reading() as connection:
            return [ApiKey(**row) for row in connection.execute(query).mappings()]

    def revoke_keys(self, *, tenant: str, name: str) -> int:
        """Revoke the keys of this name; return how many there were."""
        columns = t.api_keys.c
        with self._writing() as connection:
            found = connection.execute(
                sa.update(t.api_keys)
                .where(columns.tenant == tenant, columns.name == name, columns.revoked_at.is_(None))
                .values(revoked_at=int(self._now(connection)))
            )
            return found.rowcount


def _insert_arrays() -> Any:
    """
    Return the INSERT of many outcomes on PostgreSQL: an array for each column.

    A parameter for each value would make statements of thousands of parameters, which the driver takes apart each time.
    """
    arrays = [
        sa.bindparam(
            column.name, type_=postgresql.ARRAY(t.CleanText() if isinstance(column.type, t.Id) else column.type)
        )
        for column in _OUTCOME_COLUMNS
    ]
    rows = sa.func.unnest(*arrays).table_valued(*Outcome.__struct_fields__).render_derived()
    insert = postgresql.insert(t.outcomes).from_select(Outcome.__struct_fields__, sa.select(rows))
    return insert.on_conflict_do_nothing().returning(t.outcomes.c.batch_id, t.outcomes.c.is_ok)


_INSERT_ARRAYS = _insert_arrays()
_INSERT_ROWS = sqlite.insert(t.outcomes).on_conflict_do_nothing().returning(t.outcomes.c.batch_id, t.outcomes.c.is_ok)


def _columns_of(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in Outcome.__struct_fields__}


def _batch(row: Any) -> Batch:
    fields = dict(row)
    for name in _JSON:
        if fields[name] is not None:
            fields[name] = json.loads(fields[name])
    fields["status"] = Status(fields["status"])
    return Batch(**fields)


def _key(outcome: Outcome) -> tuple[str, int]:
    return outcome.batch_id, outcome.record


def _chunks(rows: Iterable[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    chunk = list[dict[str, Any]]()
    for row in rows:
        chunk.append(row)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _first_line(error: Exception) -> str:
    """Return what the driver says, without the statement."""
    origin = getattr(error, "orig", None) or error
    return str(origin).partition("\n")[0][:300]
