"""Ids sort by creation and tell what they are of."""

import time

from worker.batches.ids import BATCH, FILE, LINE, IdMaker, is_id, line_id, make_id


def test_ids_sort_by_creation():
    made = [make_id(BATCH) for _ in range(5_000)]
    assert made == sorted(made)
    assert len(set(made)) == 5_000


def test_ids_sort_when_the_clock_goes_back(monkeypatch):
    maker = IdMaker()
    first = maker.make(FILE)
    monkeypatch.setattr(time, "time_ns", lambda: 1_000_000_000_000)
    assert maker.make(FILE) > first


def test_the_form_of_an_id_is_checked():
    assert is_id(make_id(BATCH), BATCH)
    for wrong in ("", "batch_", make_id(FILE), make_id(BATCH) + "0", make_id(BATCH)[:-1] + "g", make_id(BATCH) + "\n"):
        assert not is_id(wrong, BATCH)
    assert not is_id(make_id(LINE), BATCH)


def test_a_line_has_the_same_id_whenever_it_is_written():
    batch = make_id(BATCH)
    assert line_id(batch, 7) == line_id(batch, 7)
    assert len({line_id(batch, number) for number in range(1000)} | {line_id(make_id(BATCH), 1)}) == 1001
    assert line_id(batch, 1).startswith("batch_req_")
