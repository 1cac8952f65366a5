"""The garbage collector's tuning."""

import gc
import subprocess
import sys
import weakref
from collections.abc import Iterator

import pytest

from worker.cli.run import YOUNG_OBJECTS, tune_collector


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    before = gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*before)


class _Ring:
    """A cycle of one."""

    def __init__(self) -> None:
        self.me = self


def test_what_exists_is_left_alone_and_the_young_are_looked_at_less_often() -> None:
    """Everything is frozen; the first threshold is ours, the others stay."""
    gc.set_threshold(700, 11, 12)
    tune_collector()
    assert gc.get_threshold() == (YOUNG_OBJECTS, 11, 12)
    assert gc.get_freeze_count() > 1000


def test_a_larger_threshold_stays() -> None:
    """An interpreter whose own default is larger knows better."""
    gc.set_threshold(50_000, 10, 10)
    tune_collector()
    assert gc.get_threshold() == (50_000, 10, 10)


def test_cycles_are_still_collected() -> None:
    """What is made later is found when it is left, by itself."""
    tune_collector()
    ring = weakref.ref(_Ring())
    left = [[] for _ in range(2 * YOUNG_OBJECTS)]
    assert ring() is None
    assert len(left) == 2 * YOUNG_OBJECTS


def test_importing_tunes_nothing() -> None:
    """Only the edge of the process decides over the collector."""
    code = "import gc, worker.cli.run, worker.cli.main; print(gc.get_freeze_count())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout.strip() == b"0"
