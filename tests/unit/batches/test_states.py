"""The table of statuses, as laws."""

from worker.batches.states import CANCELLABLE, ENTERED_FROM, FINAL, STAMPS, UNFINISHED, Status, may_move, stamp_of


def test_a_final_status_is_never_left():
    assert not [(old, new) for old in FINAL for new in Status if may_move(old, new)]


def test_every_unfinished_status_leads_to_an_end():
    for status in UNFINISHED:
        reached, todo = set(), {status}
        while todo:
            reached |= todo
            todo = {new for old in todo for new in Status if may_move(old, new)} - reached
        assert reached & FINAL


def test_a_refused_file_is_the_only_way_to_failed():
    assert ENTERED_FROM[Status.FAILED] == {Status.VALIDATING}


def test_nothing_completes_or_expires_once_it_is_being_cancelled():
    assert [new for new in Status if may_move(Status.CANCELLING, new)] == [Status.CANCELLED]
    assert all(may_move(status, Status.CANCELLING) for status in CANCELLABLE)


def test_each_status_has_a_stamp_of_its_own():
    assert {stamp_of(status) for status in Status} == set(STAMPS)
