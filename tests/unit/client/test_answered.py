"""The compact set of answered lines."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.client.answered import _MAX_GAP, AnsweredLines, line_number

numbers = st.integers(1, 30) | st.integers(1, 10**17) | st.integers(_MAX_GAP - 3, _MAX_GAP + 40)
ids = st.builds(
    lambda number, digest: f"line-{number}-{digest:08x}", numbers, st.sampled_from([0, 1, 2**31, 2**32 - 1])
)


@given(st.lists(ids), st.lists(ids))
def test_it_is_a_set(added, asked):
    """It holds what was added and nothing else, whatever numbers and hashes."""
    lines, model = AnsweredLines(), set()
    for line_id in added:
        assert lines.add(line_id)
        model.add(line_id)
        assert len(lines) == len(model)
    assert all(line_id in lines for line_id in added)
    assert [line_id in lines for line_id in asked] == [line_id in model for line_id in asked]


def test_batch_ids_are_the_same_lines():
    """A line that was answered in the batch shape needs no answer in either."""
    lines = AnsweredLines()
    lines.add("batch_req_line-1-0a1b2c3d")
    assert "line-1-0a1b2c3d" in lines


@pytest.mark.parametrize(
    "text", ["", "line-0-0a1b2c3d", "line-1-0A1B2C3D", "line-1-0a1b2c3", "x-1-0a1b2c3d", "line-01-0a1b2c3d"]
)
def test_other_texts_are_no_ids(text):
    """Only ids of this program's form are taken."""
    lines = AnsweredLines()
    assert not lines.add(text)
    assert text not in lines
    assert line_number(text) is None
    assert len(lines) == 0


def test_four_bytes_a_line():
    """Lines in about their order take four bytes each, a far one does not stretch the array."""
    lines = AnsweredLines()
    for number in range(2, 50_002):
        lines.add(f"line-{number ^ 1}-{number:08x}")
    lines.add("line-900000000000-00000001")
    assert len(lines) == 50_001
    assert len(lines._hashes) * lines._hashes.itemsize <= 4 * 50_003
    assert len(lines._others) == 1
