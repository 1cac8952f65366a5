"""The ledger: rows, totals and who may use the file."""

import sqlite3
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.client.errors import LedgerError
from worker.client.ledger import Ledger, Outcome, new_run


@pytest.fixture
def ledger(tmp_path):
    with Ledger.create(
        str(tmp_path / "in.jsonl.run"), new_run(str(tmp_path / "in.jsonl"), "projects/p/topics/t")
    ) as made:
        yield made


def an_outcome(number, error_class=None, at_round=1):
    status = 200 if error_class is None else 500
    return Outcome(
        number=number,
        round=at_round,
        status=status,
        error_class=error_class,
        message=f"words {number}",
        output_tokens=7,
    )


def test_a_run_is_found_again_with_everything_it_noted(tmp_path):
    """What one process wrote another one reads."""
    path = str(tmp_path / "a.run")
    with Ledger.create(path, new_run(str(tmp_path / "a"), "projects/p/topics/t")) as made:
        made.note({"subscription": "s"})
        made.add_lines([(1, "aaaaaaaa", "x"), (3, "bbbbbbbb", None)])
        made.record_published([(3, "m3")])
    with Ledger(path) as found:
        assert (found.run.topic, found.run.input_path) == ("projects/p/topics/t", str(tmp_path / "a"))
        assert (found.get("subscription"), found.get("nothing")) == ("s", None)
        assert (found.totals().lines, found.totals().published, found.first_unpublished()) == (2, 1, 1)
        assert found.lines(2, 9)[3].is_published


@pytest.mark.parametrize("content", [b"", b"not a database at all, but longer than a header" * 30])
def test_a_foreign_file_is_no_ledger_and_stays_as_it_is(tmp_path, content):
    """Another file is refused and not touched."""
    path = tmp_path / "x.run"
    path.write_bytes(content)
    with pytest.raises(LedgerError, match=r"x\.run"):
        Ledger(str(path))
    assert path.read_bytes() == content


def test_another_programs_database_is_no_ledger(tmp_path):
    """SQLite files of others do not have the mark."""
    path = tmp_path / "y.run"
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE run (key, value)")
    with pytest.raises(LedgerError, match="is no ledger"):
        Ledger(str(path))


def test_a_missing_ledger_says_what_makes_one(tmp_path):
    """The message helps."""
    with pytest.raises(LedgerError, match="`submit` makes one"):
        Ledger(str(tmp_path / "none.run"))


def test_a_ledger_is_not_made_twice_and_nothing_half_made_stays(tmp_path):
    """Creating over an existing one fails; a folder that cannot be written has no rest."""
    path = str(tmp_path / "a.run")
    Ledger.create(path, new_run("a", "t")).close()
    with pytest.raises(LedgerError, match="exists"):
        Ledger.create(path, new_run("a", "t"))
    with pytest.raises(LedgerError, match="its directory does not exist"):
        Ledger.create(str(tmp_path / "missing" / "a.run"), new_run("a", "t"))
    assert [each.name for each in tmp_path.iterdir()] == ["a.run"]


def test_a_published_line_may_not_change_and_an_unpublished_one_may(ledger):
    """A new check forgets what was not published."""
    ledger.add_lines([(1, "aaaaaaaa", None), (2, "bbbbbbbb", None)])
    ledger.record_published([(1, "m1")])
    ledger.begin_check()
    assert (ledger.totals().lines, ledger.last_line()) == (1, 1)
    assert ledger.add_lines([(1, "aaaaaaaa", None), (2, "cccccccc", None)]) is None
    with pytest.raises(LedgerError, match="line 1 has changed"):
        ledger.add_lines([(1, "dddddddd", None)])


def test_the_first_answer_counts_and_a_late_one_of_an_earlier_round_does_not(ledger):
    """Answers are recorded once a round."""
    ledger.add_lines([(1, "a", None), (2, "b", None)])
    ledger.record_published([(1, "m1"), (2, "m2")])
    ledger.record_answers([an_outcome(1, "timeout"), an_outcome(1)])
    assert (ledger.totals().answered, ledger.totals().failed) == (1, 1)
    assert list(ledger.failed_lines(["timeout"])) == [1]
    assert ledger.begin_round(["timeout", "quota"]) == 1
    assert (ledger.totals().published, ledger.totals().answered, ledger.failures()) == (1, 0, [])
    ledger.record_answers([an_outcome(1)])
    assert ledger.totals().answered == 0
    ledger.record_answers([an_outcome(1, at_round=2)])
    assert (ledger.totals().answered, ledger.totals().failed) == (1, 0)


def test_each_class_of_errors_has_a_count_and_the_first_example(ledger):
    """And after a new round the example of that round."""
    ledger.add_lines([(number, str(number), None) for number in range(1, 5)])
    ledger.record_answers([an_outcome(2, "timeout"), an_outcome(1, "timeout"), an_outcome(3, "quota")])
    assert [(each.error_class, each.count, each.number, each.message) for each in ledger.failures()] == [
        ("timeout", 2, 2, "words 2"),
        ("quota", 1, 3, "words 3"),
    ]
    ledger.begin_round(["timeout"])
    ledger.record_answers([an_outcome(1, "timeout", at_round=2)])
    assert [(each.count, each.number) for each in ledger.failures()] == [(1, 3), (1, 1)]


def test_two_processes_may_write_at_once(ledger):
    """`submit` and `collect` share the file."""
    with Ledger(ledger.path) as other:
        ledger.add_lines([(1, "a", None), (2, "b", None)])
        other.record_published([(1, "m1")])
        ledger.record_answers([an_outcome(1)])
        assert other.totals() == ledger.totals()


steps = st.lists(
    st.tuples(st.sampled_from(["publish", "good", "timeout", "quota", "round"]), st.integers(1, 6)), max_size=40
)


@given(steps)
@settings(max_examples=60, deadline=None)
def test_the_totals_are_those_of_the_rows_whatever_happens(tmp_path_factory, taken):
    """The law of the counters."""
    folder: Path = tmp_path_factory.mktemp("ledger")
    with Ledger.create(str(folder / "a.run"), new_run("a", "t")) as ledger:
        ledger.add_lines([(number, str(number), None) for number in range(1, 7)])
        for what, number in taken:
            row = ledger.lines(number, number)[number]
            match what:
                case "publish":
                    ledger.record_published([(number, "m")])
                case "round":
                    ledger.begin_round(["timeout"])
                case _:
                    if row.is_published:
                        ledger.record_answers([an_outcome(number, None if what == "good" else what, row.round)])
        database = sqlite3.connect(ledger.path)
        counted = database.execute(
            "SELECT count(*), count(message_id), count(status), count(error_class) FROM lines"
        ).fetchone()
        database.close()
        totals = ledger.totals()
        assert (totals.lines, totals.published, totals.answered, totals.failed) == counted
        assert sum(each.count for each in ledger.failures()) == totals.failed


def test_lines_that_will_not_be_answered_are_published_again_in_their_round(ledger):
    """Those without an answer, and answered ones whose answer is in no output any more; the counts follow."""
    ledger.add_lines([(number, f"{number:08x}", None) for number in range(1, 6)])
    ledger.record_published([(number, "m") for number in range(1, 5)])
    ledger.record_answers([an_outcome(1), an_outcome(2, "timeout"), an_outcome(3, "timeout")])
    assert ledger.begin_again([2]) == 2
    rows = ledger.rows([1, 2, 3, 4, 5, 9])
    assert [number for number, row in rows.items() if row.is_published] == [1, 3]
    assert {row.round for row in rows.values()} == {1}
    totals = ledger.totals()
    assert (totals.published, totals.answered, totals.failed) == (2, 2, 1)
    assert [(each.error_class, each.count) for each in ledger.failures()] == [("timeout", 1)]
    assert list(ledger.answered_lines()) == [(1, 1), (3, 3)]


def test_a_line_whose_answer_is_quicker_than_its_note_was_published(ledger):
    """Also if the note never comes; if it does, the message id is kept."""
    ledger.add_lines([(1, "00000001", None), (2, "00000002", None)])
    ledger.record_answers([an_outcome(1), an_outcome(2)])
    assert (ledger.totals().published, ledger.first_unpublished()) == (2, None)
    ledger.record_published([(2, "m2")])
    assert ledger.totals().published == 2
    ids = ledger._database.execute("SELECT message_id FROM lines ORDER BY number").fetchall()
    assert ids == [("",), ("m2",)]


def test_a_ledger_whose_file_was_deleted_leaves_nothing_to_the_next_one(tmp_path):
    """What a kill leaves beside the file is not read as a part of the new ledger."""
    path = tmp_path / "a.run"
    killed = Ledger.create(str(path), new_run("a", "t"))
    killed.add_lines([(number, f"{number:08x}", None) for number in range(1, 500)])
    left = (tmp_path / "a.run-wal").read_bytes()
    killed.close()
    path.unlink()
    (tmp_path / "a.run-wal").write_bytes(left)
    with Ledger.create(str(path), new_run("a", "t")) as made:
        assert made.totals().lines == 0
        made.add_lines([(1, "00000001", None)])
    with Ledger(str(path)) as found:
        assert found.totals().lines == 1
