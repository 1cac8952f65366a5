"""Shares of the lines that may be outstanding."""

from hypothesis import given
from hypothesis import strategies as st

from worker.batches.sharing import FIRST_LINES, Demand, share


def demand(name: str, remaining: int, outstanding: int = 0, tenant: str = "t") -> Demand:
    return Demand(batch_id=name, tenant=tenant, outstanding=outstanding, remaining=remaining)


def test_one_batch_gets_all_the_room():
    assert share([demand("a", 50_000)], 2_000, extra=0) == {"a": 2_000}
    assert share([demand("a", 7)], 2_000, extra=0) == {"a": 7}


def test_batches_of_a_tenant_get_equal_shares():
    assert share([demand("a", 50_000), demand("b", 50_000)], 2_000, extra=0) == {"a": 1_000, "b": 1_000}
    assert share([demand("a", 50_000), demand("b", 100)], 2_000, extra=0) == {"a": 1_900, "b": 100}


def test_tenants_get_equal_shares_however_many_batches_they_have():
    demands = [demand(f"a{number}", 50_000, tenant="a") for number in range(9)] + [demand("b", 50_000, tenant="b")]
    given_ = share(demands, 1_800, extra=0)
    assert given_["b"] == 900


def test_the_one_with_fewer_outstanding_lines_catches_up():
    given_ = share([demand("a", 50_000, outstanding=1_900), demand("b", 50_000)], 100, extra=0)
    assert given_ == {"b": 100}


def test_a_small_batch_need_not_wait_for_room():
    assert share([demand("a", 50_000, 2_000), demand("b", 10)], 0, extra=2_000) == {"b": 10}
    assert share([demand("a", 50_000, 2_000), demand("b", 1_000)], -50, extra=2_000) == {"b": FIRST_LINES}
    assert share([demand("a", 50_000, 2_000), demand("b", 1_000)], 0, extra=0) == {}


demands = st.lists(
    st.builds(
        Demand,
        batch_id=st.uuids().map(str),
        tenant=st.sampled_from("abc"),
        outstanding=st.integers(0, 3_000),
        remaining=st.integers(0, 60_000),
    ),
    max_size=20,
    unique_by=lambda each: each.batch_id,
)


@given(demands, st.integers(-100, 5_000))
def test_the_room_is_used_and_not_exceeded(asked, room):
    given_ = share(asked, room, extra=0)
    assert sum(given_.values()) == min(max(0, room), sum(each.remaining for each in asked))
    for each in asked:
        assert 0 <= given_.get(each.batch_id, 0) <= each.remaining


@given(demands, st.integers(0, 5_000), st.integers(0, 100))
def test_the_extra_is_bounded(asked, room, extra):
    assert sum(share(asked, room, extra=extra).values()) <= room + extra
