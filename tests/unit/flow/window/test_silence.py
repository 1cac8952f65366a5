"""Whose silence means waiting."""

from worker.flow.window.silence import Silence


def a_silence(*started_at: float) -> Silence:
    silence = Silence()
    for number, at in enumerate(started_at):
        silence.begin(number, at)
    return silence


def test_the_late_ones_are_a_share_of_what_is_under_way():
    """Late is twice the usual time."""
    silence = a_silence(0.0, 1.0, 2.0, 9.0)
    assert silence.share(10.0, 1.0, 8) == 3 / 8
    assert silence.share(10.0, 6.0, 8) == 0.0


def test_a_few_are_no_queue():
    """One or two long prompts may be silent whatever their share."""
    assert a_silence(0.0, 1.0).share(10.0, 1.0, 2) == 0.0


def test_who_has_begun_or_ended_is_not_silent():
    """Ending twice, or one that never promised to begin, is harmless."""
    silence = a_silence(0.0, 1.0, 2.0)
    silence.end(0)
    silence.end(0)
    silence.end(77)
    assert silence.share(10.0, 1.0, 3) == 0.0
    silence.end(1)
    silence.end(2)
    assert not silence


def test_nothing_under_way_is_no_division():
    """The attempts may have left the count before they left this list."""
    assert a_silence(0.0, 0.0, 0.0).share(10.0, 1.0, 0) == 0.0
