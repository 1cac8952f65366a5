"""
The statuses of a batch and how it moves between them; pure.

Source: section 1.5 of the contract (docs/decisions/0023).  `worker.batches.store` is the only place that moves a batch,
always by comparing the stored status first.
"""

from enum import StrEnum


class Status(StrEnum):
    """OpenAI's eight; clients refuse any other."""

    VALIDATING = "validating"
    FAILED = "failed"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"


FINAL = frozenset({Status.FAILED, Status.COMPLETED, Status.EXPIRED, Status.CANCELLED})
"""Statuses that never change."""
UNFINISHED = frozenset(Status) - FINAL
CANCELLABLE = frozenset({Status.VALIDATING, Status.IN_PROGRESS, Status.FINALIZING})

ENTERED_FROM: dict[Status, frozenset[Status]] = {
    Status.VALIDATING: frozenset(),
    Status.FAILED: frozenset({Status.VALIDATING}),
    Status.IN_PROGRESS: frozenset({Status.VALIDATING}),
    Status.FINALIZING: frozenset({Status.IN_PROGRESS}),
    Status.COMPLETED: frozenset({Status.FINALIZING}),
    Status.EXPIRED: frozenset({Status.VALIDATING, Status.IN_PROGRESS}),
    Status.CANCELLING: CANCELLABLE,
    Status.CANCELLED: frozenset({Status.CANCELLING}),
}
"""Each status with those that it is entered from."""

STAMPS = (
    "created_at",
    "in_progress_at",
    "finalizing_at",
    "cancelling_at",
    "completed_at",
    "failed_at",
    "expired_at",
    "cancelled_at",
)
"""Times of a batch that its transitions set, whole Unix seconds."""


def stamp_of(status: Status) -> str:
    """Return the name of the time that is set when a status is entered."""
    return "created_at" if status is Status.VALIDATING else f"{status}_at"


def may_move(old: Status, new: Status) -> bool:
    """Whether a batch may go from one status to another."""
    return old in ENTERED_FROM[new]
