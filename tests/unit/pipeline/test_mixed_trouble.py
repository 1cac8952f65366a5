"""Messages that always fail beside healthy ones: the targets of `benchmarks.mixed`, for a few cells of its table."""

import pytest

from benchmarks.mixed import Cell, cells, measure

CELLS = (
    Cell(scenario="one message", kind="400"),
    Cell(scenario="one message", kind="403"),
    Cell(scenario="one message", kind="500"),
    Cell(scenario="one message", kind="empty 200"),
    Cell(scenario="one message", kind="cut JSON"),
    Cell(scenario="one message", kind="broken stream"),
    Cell(scenario="one message", kind="reset"),
    Cell(scenario="one message", kind="hang 30 s"),
    Cell(scenario="one message", kind="401"),
    Cell(scenario="one message", kind="402"),
    Cell(scenario="one message", kind="429"),
    Cell(scenario="one message", kind="429 after 1 h"),
    Cell(scenario="one message", kind="503"),
    Cell(scenario="six alone", kind="empty 200"),
    Cell(scenario="six alone", kind="401"),
    Cell(scenario="six alone", kind="loading"),
    Cell(scenario="six alone", kind="403"),
    Cell(scenario="six alone", kind="500"),
    Cell(scenario="six alone", kind="reset"),
    Cell(scenario="fresh", kind="400", share=20),
    Cell(scenario="fresh", kind="401", share=1),
    Cell(scenario="fresh", kind="403", share=20),
    Cell(scenario="fresh", kind="429", share=5),
    Cell(scenario="fresh", kind="500", share=20),
    Cell(scenario="fresh", kind="hang 5 s", share=5),
    Cell(scenario="fresh", kind="reset", share=20),
    Cell(scenario="model away, mixed", kind="503"),
    Cell(scenario="route away, mixed", kind="loading"),
    Cell(scenario="outage", kind="500"),
    Cell(scenario="long outage", kind="500", attempts=20),
    Cell(scenario="backlog", kind="loading", share=20),
)
MISSED = (
    # 40 and 32 calls, at most 15: alone in its model's lane, where only its own repeats tell it from a model that loads.
    Cell(scenario="one message", kind="loading"),
    Cell(scenario="one message", kind="504 gateway"),
    # 0.77 of the rate: the time to learn is a large part of a few seconds.
    Cell(scenario="backlog", kind="503", share=5),
    # 0.06 of the rate, and the p99: the failing ones at the head fill every lease.
    Cell(scenario="block", kind="500", share=20),
    # 0.90 of the rate: it takes a second until more messages are leased.
    Cell(scenario="model away, first", kind="loading"),
    Cell(scenario="route away, first", kind="503"),
)
"""What still misses a target."""


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_healthy_messages_are_answered_as_if_they_were_alone_and_failing_ones_with_their_own_error(cell):
    """No target of the table is missed."""
    assert measure(cell).missed == ()


def test_every_cell_of_the_lists_is_one_of_the_table():
    """So that nothing is measured under a name that the table does not have."""
    table = {cell.name for cell in cells()}
    assert {cell.name for cell in (*CELLS, *MISSED)} <= table
    assert not {cell.name for cell in CELLS} & {cell.name for cell in MISSED}
