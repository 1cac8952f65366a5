"""Waits before another try: how they grow, and how much of them is random."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.policy.backoff import Backoff


@pytest.mark.parametrize(("failures", "ceiling"), [(1, 1.0), (2, 2.0), (3, 4.0), (7, 60.0), (10_000, 60.0)])
def test_the_ceiling_doubles_up_to_the_limit(failures: int, ceiling: float) -> None:
    """From 1 s after the first failure to 60 s, and no further after any number of failures."""
    assert Backoff(base_s=1.0, max_s=60.0).ceiling_s(failures) == ceiling


@pytest.mark.parametrize(("jitter", "shortest"), [(1.0, 0.0), (0.5, 2.0), (0.1, 3.6), (0.0, 4.0)])
def test_the_jitter_is_the_random_share_below_the_ceiling(jitter: float, shortest: float) -> None:
    """1 is full jitter, 0 none; the longest wait is the ceiling in any case."""
    backoff = Backoff(base_s=1.0, max_s=60.0, jitter=jitter)
    assert backoff.delay_s(3, 0.0) == pytest.approx(shortest)
    assert backoff.delay_s(3, 1.0) == pytest.approx(4.0)


BACKOFFS = st.builds(
    lambda base_s, ratio, jitter: Backoff(base_s=base_s, max_s=base_s * ratio, jitter=jitter),
    st.floats(1e-3, 1e3),
    st.floats(1.0, 1e4),
    st.floats(0, 1),
)


@given(BACKOFFS, st.integers(1, 10**6), st.floats(0, 1), st.floats(0, 1))
def test_a_wait_is_within_its_bounds(backoff: Backoff, failures: int, one: float, other: float) -> None:
    """Never negative and never above the limit; a larger random number never gives a shorter wait."""
    low, high = (backoff.delay_s(failures, each) for each in sorted((one, other)))
    assert 0 <= low <= high * (1 + 1e-9)
    assert high <= backoff.max_s * (1 + 1e-9)


@pytest.mark.parametrize(
    "values", [{"base_s": 2.0, "max_s": 1.0}, {"base_s": 0.0}, {"base_s": -1.0}, {"jitter": 1.5}, {"jitter": -0.1}]
)
def test_an_impossible_backoff_is_refused(values: dict[str, float]) -> None:
    """The first wait is positive and not above the longest, the jitter a share."""
    with pytest.raises(ValueError, match=r"base_s|jitter"):
        Backoff(**values)
