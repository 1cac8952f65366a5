"""When a row of decreases is taken back."""

import pytest

from worker.flow.window.reward import Reward


def test_two_decreases_in_vain_are_taken_back():
    """To the limit before the first of them."""
    reward = Reward()
    reward.shrunk(9.0, 64.0)
    assert reward.judged(9.0) is None
    reward.shrunk(9.0, 30.0)
    assert reward.judged(9.5) == 64.0


@pytest.mark.parametrize("wait_s", [6.2, 11.8, 0.0, -1.0])
def test_a_wait_that_changed_ends_the_row(wait_s):
    """Shorter is the reward; longer is a backlog that is still growing."""
    reward = Reward()
    reward.shrunk(9.0, 64.0)
    assert reward.judged(9.0) is None
    assert reward.judged(wait_s) is None
    reward.shrunk(9.0, 20.0)
    assert reward.judged(9.0) is None


def test_after_taking_back_a_new_row_begins():
    """What was in vain once may be right the next time."""
    reward = Reward()
    for _ in range(2):
        reward.shrunk(9.0, 64.0)
        assert [reward.judged(9.0), reward.judged(9.0)] == [None, 64.0]


def test_without_a_decrease_nothing_is_taken_back():
    """And a decrease for another reason ends the row."""
    reward = Reward()
    assert reward.judged(9.0) is None
    reward.shrunk(9.0, 64.0)
    assert reward.judged(9.0) is None
    reward.forget()
    assert reward.judged(9.0) is None
