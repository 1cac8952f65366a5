"""Messages that always fail beside healthy ones: the targets of `benchmarks.mixed`, for a few cells of its table."""

import pytest

from benchmarks.mixed import SHARES, Cell, bounds, cells, measure, plan_of, row

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
    Cell(scenario="backlog", kind="401", share=5),
    Cell(scenario="backlog", kind="429", share=5, is_streamed=True),
    Cell(scenario="backlog", kind="429 after 1 h", share=20),
    Cell(scenario="backlog", kind="503", share=5),
    Cell(scenario="backlog", kind="500", share=20),
    Cell(scenario="block", kind="500", share=5),
    Cell(scenario="block", kind="429", share=1),
    Cell(scenario="queued", kind="402"),
    Cell(scenario="model away, first", kind="loading"),
    Cell(scenario="route away, first", kind="503"),
)
BOUNDED = [
    (Cell(scenario="block", kind="401", share=20), "240 that fail come before all others"),
    (Cell(scenario="block", kind="500", share=20), "an attempt after the first probe, 1 s later"),
    (Cell(scenario="block", kind="429 after 1 h", share=20), "an attempt after the first pause, 2 s later"),
    (Cell(scenario="queued", kind="503 after 1 h"), "40 that fail come before all others"),
    (Cell(scenario="fresh", kind="429 after 3 s", share=20), "2 that fail come before all others"),
    (Cell(scenario="fresh", kind="hang 30 s", share=20), "64 slots have 7677 s meanwhile"),
    (Cell(scenario="block", kind="hang 5 s", share=5), "60 failing messages, 5 s each, on 16 slots"),
]
"""Cells whose targets are wider for a reason that nothing can avoid, and a part of the reason."""
HELD = (
    Cell(scenario="one message", kind="loading"),
    Cell(scenario="one message", kind="504 gateway"),
    Cell(scenario="backlog", kind="503 gateway", share=1),
)
"""Messages whose model is away: they wait for its return, and are called as often as their backoff says."""


QUICK = {"one message", "six alone", "queued", "model away, mixed", "long outage"}
"""Scenarios that take a second or less; the others run with the slow tests."""


def slow_unless_quick(cell: Cell):
    """Return the cell as a parameter."""
    is_quick = cell.scenario in QUICK or (cell.scenario in {"backlog", "block"} and cell.kind in {"401", "500"})
    return pytest.param(cell, id=cell.name, marks=() if is_quick else pytest.mark.slow)


@pytest.mark.parametrize("cell", [slow_unless_quick(cell) for cell in (*CELLS, *(cell for cell, _ in BOUNDED), *HELD)])
def test_healthy_messages_are_answered_as_if_they_were_alone_and_failing_ones_with_their_own_error(cell):
    """No target of the table is missed."""
    assert measure(cell).missed == ()


@pytest.mark.parametrize(("cell", "reason"), BOUNDED, ids=lambda value: getattr(value, "name", ""))
def test_a_wider_target_has_its_reason_beside_it(cell, reason):
    """Which is computed from what the cell sends, and said with its numbers."""
    assert any(reason in bound.reason for bound in bounds(cell, plan_of(cell)))


def test_few_seconds_are_added_where_failures_are_quick_and_scattered():
    """The first attempt of each, and nothing else."""
    for share in SHARES:
        for scenario, kind in (("fresh", "500"), ("backlog", "401"), ("one message", "503")):
            cell = Cell(scenario=scenario, kind=kind, share=None if scenario == "one message" else share)
            assert sum(bound.seconds for bound in bounds(cell, plan_of(cell))) < 0.5


def test_a_cell_gives_the_same_twice():
    """Time is virtual and chance has a seed, so that a target that is met stays met."""
    cell = Cell(scenario="block", kind="401", share=5)
    assert row(measure(cell)) == row(measure(cell))


def test_every_cell_of_the_lists_is_one_of_the_table():
    """So that nothing is measured under a name that the table does not have."""
    table = {cell.name for cell in cells()}
    assert {cell.name for cell in (*CELLS, *(cell for cell, _ in BOUNDED), *HELD)} <= table
