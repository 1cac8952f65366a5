"""
The tables, as SQLAlchemy describes them; `migrations/` creates them, and a test compares the two.

Only `worker.batches.store` reads or writes them.  Times are whole Unix seconds by the database's clock, except for
leases, whose times have fractions.  JSON is kept as text: it is read back exactly as it was written, on every database.
"""

from typing import Any

import sqlalchemy as sa


class CleanText(sa.TypeDecorator[str]):
    """Text of users and servers: what a database refuses (NUL, halves of surrogate pairs) is replaced."""

    impl = sa.Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Any) -> str | None:  # noqa: ARG002 - SQLAlchemy's
        """Return the text that is stored."""
        if value is None or (value.isascii() and "\x00" not in value):
            return value
        return value.replace("\x00", "\ufffd").encode("utf-8", "replace").decode()


class Id(CleanText):
    """An id, which may be any text of a user; compared byte by byte, whatever order of letters a database has."""

    cache_ok = True

    def load_dialect_impl(self, dialect: Any) -> Any:
        """Return the type of a column."""
        return dialect.type_descriptor(sa.String(48, collation="C" if dialect.name == "postgresql" else None))


metadata = sa.MetaData()

_ID = Id()
_TENANT = sa.String(128)
_SECONDS = sa.BigInteger

files = sa.Table(
    "files",
    metadata,
    sa.Column("id", _ID, primary_key=True),
    sa.Column("tenant", _TENANT, nullable=False),
    sa.Column("purpose", sa.String(32), nullable=False),
    sa.Column("filename", CleanText, nullable=False),
    sa.Column("bytes", sa.BigInteger, nullable=False),
    sa.Column("created_at", _SECONDS, nullable=False),
    sa.Column("expires_at", _SECONDS),
    sa.Column("deleted_at", _SECONDS),
    sa.Column("object_key", CleanText, nullable=False),
    sa.Column("is_ready", sa.Boolean, nullable=False),  # false while the content is being written
    sa.Column("is_removed", sa.Boolean, nullable=False),  # the content is gone
    sa.Index("files_by_tenant", "tenant", "id"),
    sa.Index("files_by_object", "object_key"),
    sa.Index("files_by_expiry", "is_removed", "expires_at"),
)

batches = sa.Table(
    "batches",
    metadata,
    sa.Column("id", _ID, primary_key=True),
    sa.Column("tenant", _TENANT, nullable=False),
    sa.Column("endpoint", sa.String(64), nullable=False),
    sa.Column("input_file_id", CleanText, nullable=False),
    sa.Column("input_key", CleanText),  # the object of the input; null where the file was not there
    sa.Column("input_bytes", sa.BigInteger, nullable=False),
    sa.Column("completion_window", sa.String(16), nullable=False),
    sa.Column("metadata", CleanText),
    sa.Column("idempotency_key", CleanText),
    sa.Column("idempotency_digest", sa.String(64)),
    sa.Column("output_expires_after_s", sa.Integer),
    sa.Column("retry_of", _ID),
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("is_final", sa.Boolean, nullable=False),
    sa.Column("is_tidy", sa.Boolean, nullable=False),  # its results, which are in its files, are deleted
    sa.Column("is_closed", sa.Boolean, nullable=False),  # no result is stored any more
    sa.Column("created_at", _SECONDS, nullable=False),
    sa.Column("expires_at", _SECONDS, nullable=False),
    sa.Column("in_progress_at", _SECONDS),
    sa.Column("finalizing_at", _SECONDS),
    sa.Column("cancelling_at", _SECONDS),
    sa.Column("completed_at", _SECONDS),
    sa.Column("failed_at", _SECONDS),
    sa.Column("expired_at", _SECONDS),
    sa.Column("cancelled_at", _SECONDS),
    sa.Column("model", CleanText),
    sa.Column("total", sa.Integer, nullable=False),
    sa.Column("completed", sa.Integer, nullable=False),
    sa.Column("failed", sa.Integer, nullable=False),
    sa.Column("tokens", sa.BigInteger, nullable=False),  # reserved of the tenant's limit until the end
    sa.Column("usage", CleanText),
    sa.Column("failures", CleanText),
    sa.Column("output_id", _ID, nullable=False),  # of the files that it will have, so that they can be written again
    sa.Column("error_id", _ID, nullable=False),
    sa.Column("output_file_id", _ID),
    sa.Column("error_file_id", _ID),
    sa.Column("announced_records", sa.Integer, nullable=False),  # what is being published ends here
    sa.Column("published_records", sa.Integer, nullable=False),
    sa.Column("published_bytes", sa.BigInteger, nullable=False),  # of the input: where the next record is read
    sa.Column("published_lines", sa.Integer, nullable=False),
    sa.Column("waiting_for", CleanText),
    sa.Column("sampled_at", sa.Float),  # when `sampled_settled` was noted, from which the rate is told
    sa.Column("sampled_settled", sa.Integer, nullable=False),
    sa.Column("settled_at", sa.Float),  # of the last result
    sa.Column("succeeded", sa.LargeBinary),  # a bit for each record, set with the final status
    sa.UniqueConstraint("tenant", "idempotency_key", name="batches_idempotency"),
    sa.Index("batches_by_tenant", "tenant", "id"),
    sa.Index(
        "batches_unfinished", "id", sqlite_where=sa.text("is_final = 0"), postgresql_where=sa.text("NOT is_final")
    ),
    sa.Index(
        "batches_untidy",
        "id",
        sqlite_where=sa.text("is_final = 1 AND is_tidy = 0"),
        postgresql_where=sa.text("is_final AND NOT is_tidy"),
    ),
    sa.Index("batches_by_input", "input_key"),
)

batch_errors = sa.Table(
    "batch_errors",
    metadata,
    sa.Column("batch_id", _ID, primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),  # in the order in which they are shown
    sa.Column("line", sa.Integer),
    sa.Column("param", CleanText),
    sa.Column("code", sa.String(64), nullable=False),
    sa.Column("message", CleanText, nullable=False),
)

outcomes = sa.Table(
    "outcomes",
    metadata,
    sa.Column("batch_id", _ID, primary_key=True),
    sa.Column("record", sa.Integer, primary_key=True, autoincrement=False),  # from 1, blank lines not counted
    sa.Column("is_ok", sa.Boolean, nullable=False),
    sa.Column("status_code", sa.Integer),
    sa.Column("code", CleanText),
    sa.Column("message", CleanText),
    sa.Column("request_id", CleanText),
    sa.Column("body", sa.LargeBinary),
    sa.Column("input_tokens", sa.BigInteger),
    sa.Column("cached_tokens", sa.BigInteger),
    sa.Column("output_tokens", sa.BigInteger),
    sa.Column("reasoning_tokens", sa.BigInteger),
    sa.Column("line", sa.Integer),  # from 1, blank lines counted; null where the answer did not tell it
)

events = sa.Table(
    "events",
    metadata,
    sa.Column("id", _ID, primary_key=True),
    sa.Column("batch_id", _ID, nullable=False),
    sa.Column("type", sa.String(32), nullable=False),
    sa.Column("created_at", _SECONDS, nullable=False),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("due_at", sa.Float),  # null: nothing is left to do
    sa.Column("webhook_at", sa.Float),
    sa.Column("topic_at", sa.Float),
    sa.Index("events_due", "due_at"),
)

leases = sa.Table(
    "leases",
    metadata,
    sa.Column("name", sa.String(32), primary_key=True),
    sa.Column("owner", sa.String(64), nullable=False),
    sa.Column("until", sa.Float, nullable=False),
)

api_keys = sa.Table(
    "api_keys",
    metadata,
    sa.Column("hash", sa.String(64), primary_key=True),  # SHA-256, hexadecimal
    sa.Column("tenant", _TENANT, nullable=False),
    sa.Column("name", CleanText, nullable=False),
    sa.Column("created_at", _SECONDS, nullable=False),
    sa.Column("revoked_at", _SECONDS),
)
