"""Batches for tests: stores on both databases, and what is put into them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from worker.batches.ids import FILE, make_id
from worker.batches.migrate import migrate
from worker.batches.states import Status
from worker.batches.store import Batch, File, NewBatch, Outcome, Result, Store, open_engine

TENANT = "tenant-a"
CHAT = "/v1/chat/completions"


@contextmanager
def opened_store(url: str, **options: Any) -> Iterator[Store]:
    """A store with its tables."""
    engine = open_engine(url)
    migrate(engine)
    store = Store(engine, **options)
    try:
        yield store
    finally:
        store.close()


def sqlite_url(folder: Path) -> str:
    """Of a new database."""
    return f"sqlite:///{folder / 'batches.db'}"


def add_file(store: Store, *, tenant: str = TENANT, size: int = 100, **fields: Any) -> File:
    """An input file that is ready; its content is somebody else's affair."""
    file_id = make_id(FILE)
    file = File(
        **{
            "id": file_id,
            "tenant": tenant,
            "purpose": "batch",
            "filename": "in.jsonl",
            "bytes": 0,
            "created_at": int(store.now()),
            "expires_at": None,
            "object_key": f"files/{file_id}",
            **fields,
        }
    )
    store.begin_file(file)
    ready = store.finish_file(file_id, size)
    assert ready is not None
    return ready


def new_batch(file: File | str, **fields: Any) -> NewBatch:
    """A batch to be created."""
    file_id = file if isinstance(file, str) else file.id
    tenant = TENANT if isinstance(file, str) else file.tenant
    return NewBatch(**{"tenant": tenant, "endpoint": CHAT, "input_file_id": file_id, "window_s": 86_400.0, **fields})


def create(store: Store, **fields: Any) -> Batch:
    """A batch that is being validated."""
    batch, _ = store.create_batch(new_batch(add_file(store), **fields))
    return batch


def start(store: Store, total: int, **fields: Any) -> Batch:
    """A batch in progress, all of whose records are published."""
    batch = create(store, **fields)
    assert store.start_batch(batch.id, total=total, model="m")
    assert store.announce(batch.id, published=0, upto=total)
    assert store.advance(batch.id, published=0, upto=total, offset=100, lines=total)
    return again(store, batch)


def again(store: Store, batch: Batch) -> Batch:
    """The batch as it is now."""
    found = store.get_batch(batch.tenant, batch.id)
    assert found is not None
    return found


def outcome(batch: Batch, record: int, *, is_ok: bool = True, **fields: Any) -> Outcome:
    """A result."""
    if is_ok:
        return Outcome(
            **{"batch_id": batch.id, "record": record, "is_ok": True, "status_code": 200, "body": b"{}", **fields}
        )
    return Outcome(**{"batch_id": batch.id, "record": record, "is_ok": False, "code": "c", "message": "m", **fields})


def complete(store: Store, batch: Batch, **result: Any) -> Batch:
    """A completed batch."""
    assert store.begin_finalizing(batch.id)
    assert store.finish_batch(
        batch.id,
        expected=Status.FINALIZING,
        to=Status.COMPLETED,
        result=Result(**{"completed": batch.total, **result}),
        retention_s=3600,
    )
    return again(store, batch)
