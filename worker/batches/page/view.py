"""
What the page shows of a batch: numbers and times as texts; pure.

Everything else is in the templates beside this file, which escape all that they are given.
"""

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from worker.batches.states import CANCELLABLE, FINAL, Status
from worker.batches.store import Batch, Fault

MAX_FAULTS = 100
"""Of a file that was refused; the API has all of them."""
_MINUTE_S, _HOUR_S, _DAY_S = 60, 3_600, 86_400


class BatchView(NamedTuple):
    """One batch as the templates use it."""

    id: str
    short_id: str
    """The end of the id, which differs between batches of one second."""
    name: str
    """Of its metadata: `description` or `name`; else the id."""
    status: str
    endpoint: str
    model: str
    total: int
    completed: int
    failed: int
    done_percent: float
    failed_percent: float
    is_final: bool
    can_cancel: bool
    can_retry: bool
    progress: str
    """For example `412 of 1,000, 31.0/s, about 19 s left`."""
    waiting_for: str
    created: str
    ended: str
    expires: str
    usage: Mapping[str, Any] | None
    metadata: Mapping[str, str]
    output_file_id: str | None
    error_file_id: str | None
    failures: Sequence[Mapping[str, Any]]
    faults: Sequence[Fault]
    hidden_faults: int
    """Faults that are not in `faults`."""
    retry_of: str | None


def view_of(
    batch: Batch, *, failures: Sequence[Mapping[str, Any]] = (), faults: Sequence[Fault] = (), all_faults: int = 0
) -> BatchView:
    """
    Return what is shown of a batch.

    Args:
        batch: As it is stored.
        failures: Its failed lines by code.
        faults: Of its file, where that was refused.
        all_faults: How many there are.
    """
    total = max(1, batch.total)
    ended = next(
        (at for at in (batch.completed_at, batch.failed_at, batch.expired_at, batch.cancelled_at) if at is not None),
        None,
    )
    metadata = batch.metadata or {}
    return BatchView(
        id=batch.id,
        short_id=batch.id[-8:],
        name=metadata.get("description") or metadata.get("name") or "",
        status=batch.status.value,
        endpoint=batch.endpoint,
        model=batch.model or "",
        total=batch.total,
        completed=batch.completed,
        failed=batch.failed,
        done_percent=round(100 * batch.completed / total, 2),
        failed_percent=round(100 * batch.failed / total, 2),
        is_final=batch.status in FINAL,
        can_cancel=batch.status in CANCELLABLE,
        can_retry=batch.status in FINAL and batch.status is not Status.FAILED and batch.failed > 0,
        progress=_progress(batch),
        waiting_for=batch.waiting_for or "",
        created=moment(batch.created_at),
        ended="" if ended is None else f"{moment(ended)}, after {duration(ended - batch.created_at)}",
        expires=moment(batch.expires_at),
        usage=batch.usage,
        metadata=metadata,
        output_file_id=batch.output_file_id,
        error_file_id=batch.error_file_id,
        failures=failures,
        faults=faults,
        hidden_faults=max(0, all_faults - len(faults)),
        retry_of=batch.retry_of,
    )


def _progress(batch: Batch) -> str:
    if batch.status is Status.VALIDATING:
        return "the file is being checked"
    if batch.status is Status.FAILED:
        return "the file was refused"
    texts = [f"{batch.settled:,} of {batch.total:,}"]
    rate = batch.rate_per_s
    if batch.status not in FINAL and rate:
        texts.append(f"{rate:,.1f}/s")
        if batch.status is Status.IN_PROGRESS:
            texts.append(f"about {duration(math.ceil((batch.total - batch.settled) / rate))} left")
    return ", ".join(texts)


def moment(seconds: int) -> str:
    """Return Unix seconds as a text in UTC, to the second."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def duration(seconds: int) -> str:
    """Return a time in its two largest units: `42 s`, `3 min 20 s`, `2 h 5 min`, `1 d 3 h`."""
    for size, unit, smaller, small_unit in (
        (_DAY_S, "d", _HOUR_S, "h"),
        (_HOUR_S, "h", _MINUTE_S, "min"),
        (_MINUTE_S, "min", 1, "s"),
    ):
        if seconds >= size:
            whole, rest = divmod(seconds, size)
            small = rest // smaller
            return f"{whole} {unit} {small} {small_unit}" if small else f"{whole} {unit}"
    return f"{seconds} s"
