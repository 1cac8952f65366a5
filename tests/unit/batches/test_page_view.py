"""What the page says of a batch."""

import msgspec
import pytest

from worker.batches.page.view import duration, view_of
from worker.batches.states import Status
from worker.batches.store import Batch


def a_batch(**changes: object) -> Batch:
    """Return a batch of ten lines that was created at second 1,000."""
    fields = dict.fromkeys(Batch.__struct_fields__)
    known = {
        "id": "batch_" + "0" * 32, "endpoint": "/v1/chat/completions", "status": Status.IN_PROGRESS, "created_at": 1_000,
        "expires_at": 87_400, "total": 10, "completed": 0, "failed": 0, "announced_records": 0, "published_records": 0,
        "sampled_settled": 0, "is_closed": False,
    }  # fmt: skip
    return Batch(**{**fields, **known, **changes})


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (59, "59 s"),
        (60, "1 min"),
        (61, "1 min 1 s"),
        (3_600, "1 h"),
        (7_500, "2 h 5 min"),
        (97_200, "1 d 3 h"),
    ],
)
def test_a_duration_has_its_two_largest_units(seconds: int, text: str):
    assert duration(seconds) == text


def test_progress_has_a_rate_and_a_time_only_while_there_is_one():
    """Ten lines, four settled in two seconds: three seconds are left."""
    moving = a_batch(completed=3, failed=1, sampled_at=1_000.0, settled_at=1_002.0)
    assert view_of(moving).progress == "4 of 10, 2.0/s, about 3 s left"
    assert view_of(msgspec.structs.replace(moving, sampled_at=None)).progress == "4 of 10"
    assert view_of(a_batch(status=Status.VALIDATING)).progress == "the file is being checked"


@pytest.mark.parametrize(
    ("status", "failed", "can_cancel", "can_retry"),
    [
        (Status.VALIDATING, 0, True, False),
        (Status.IN_PROGRESS, 2, True, False),
        (Status.CANCELLING, 2, False, False),
        (Status.COMPLETED, 0, False, False),
        (Status.COMPLETED, 2, False, True),
        (Status.CANCELLED, 2, False, True),
        (Status.FAILED, 0, False, False),
    ],
)
def test_buttons_are_there_when_they_work(status: Status, failed: int, can_cancel: bool, can_retry: bool):
    view = view_of(a_batch(status=status, failed=failed))
    assert (view.can_cancel, view.can_retry) == (can_cancel, can_retry)


def test_the_end_says_how_long_it_took():
    """Whatever the end was."""
    done = a_batch(status=Status.EXPIRED, expired_at=1_061)
    assert view_of(done).ended == "1970-01-01 00:17:41 UTC, after 1 min 1 s"
    assert view_of(a_batch()).ended == ""
