"""What is held, until when, and what the broker is told: on a clock that stands still until told otherwise."""

import math
from collections import defaultdict
from typing import Any

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tests.support.fakeclock import FakeClock
from worker.brokers.leases import (
    EXTENSION_S,
    GATHER_S,
    LATE_ACK_S,
    MAX_ID_BYTES,
    MAX_IDS,
    MAX_REQUESTS,
    TICK_S,
    Grant,
    Kind,
    Lease,
    Leases,
    Request,
)
from worker.ports import Settlement
from worker.settings.schema import PubSubSettings
from worker.wire.message import ReceivedMessage

ACK, NACK = Settlement.ACK, Settlement.NACK


class Table:
    """Leases with a record of what was lost, and short ways to do what the subscriber does."""

    def __init__(self, *, first_s: float = 20.0, **fields: Any) -> None:
        self.clock = FakeClock()
        self.lost: list[str] = []
        self.refused: list[str] = []
        self.leases = Leases(
            PubSubSettings(emulator_host="localhost:1", **fields),
            on_lost=lambda lease: self.lost.append(lease.ack_id),
            on_refused=lambda lease: self.refused.append(lease.ack_id),
            clock=self.clock.now,
            uniform=lambda: 1.0,
        )
        self.leases.first_s = first_s
        self.grant = Grant(1_000, 1_000_000_000)

    def add(self, *ack_ids: str, key: str = "", size: int = 1, is_exactly_once: bool = False) -> None:
        for ack_id in ack_ids:
            message = ReceivedMessage(message_id=ack_id, data=b"", received_at=self.clock.now())
            self.leases.add(ack_id, message, size, self.grant, key=key, is_exactly_once=is_exactly_once)

    def start(self) -> list[Lease]:
        """Start everything that may run."""
        started = []
        while (lease := self.leases.next()) is not None:
            started.append(lease)
        return started

    def started(self) -> list[str]:
        return [lease.ack_id for lease in self.start()]

    def pass_s(self, seconds: float) -> None:
        """Let time pass, with a tick every second."""
        end = self.clock.now() + seconds
        while self.clock.now() < end:
            self.clock.advance(min(TICK_S, end - self.clock.now()))
            self.leases.tick()

    def requests(self, kind: Kind) -> list[Request]:
        """What is sent now, with what waits for others; it must be of one kind."""
        self.clock.advance(GATHER_S)
        found = self.leases.requests()
        assert {request.kind for request in found} <= {kind}
        return found

    def sent(self, kind: Kind) -> list[str]:
        """Ack ids of the one request that is sent now, and answered well; none without one."""
        ack_ids = []
        for request in self.requests(kind):
            ack_ids += request.ack_ids
            self.leases.confirmed(request)
        return ack_ids


@pytest.fixture
def table() -> Table:
    """Leases whose first is as long as a subscription's ack deadline of 20 s."""
    return Table()


def test_what_arrives_starts_in_order_and_is_acked_in_one_request(table: Table) -> None:
    """Acks wait a moment for others; an answered one frees its place."""
    table.add("a", "b", "c")
    started = table.start()
    for lease in started:
        table.leases.settle(lease, ACK)
    assert [lease.ack_id for lease in started] == ["a", "b", "c"]
    assert table.leases.next_at() == table.clock.now() + GATHER_S
    assert (table.leases.requests(), len(table.leases), table.leases.is_settled) == ([], 3, False)
    assert table.sent(Kind.ACK) == ["a", "b", "c"]
    assert (len(table.leases), table.grant.messages, table.grant.size_bytes, table.leases.is_settled) == (0, 0, 0, True)
    assert table.leases.next_at() == math.inf


@pytest.mark.parametrize(
    ("first_s", "extended_at", "seconds"), [(10, 5, 60), (20, 10, 60), (60, 30, 60), (600, 300, 600)], ids=str
)
def test_a_lease_is_extended_at_its_half_and_then_to_a_minute(first_s: float, extended_at: int, seconds: int) -> None:
    """The first lease is the subscription's own; an ack deadline that is longer than a minute stays."""
    table = Table(first_s=first_s)
    table.add("a")
    assert len(table.start()) == 1
    table.pass_s(extended_at - 1)
    assert table.sent(Kind.EXTEND) == []
    table.pass_s(1)
    (request,) = table.requests(Kind.EXTEND)
    assert (request.ack_ids, request.seconds) == (["a"], seconds)
    table.leases.confirmed(request)
    table.pass_s(seconds / 2 - 1)
    assert table.sent(Kind.EXTEND) == []
    table.pass_s(2)
    assert table.sent(Kind.EXTEND) == ["a"]
    assert table.lost == []


def test_what_is_short_costs_no_extension(table: Table) -> None:
    """A delivery that is settled before the half of its lease is one ack and nothing else."""
    table.add("a")
    (lease,) = table.start()
    table.pass_s(9)
    table.leases.settle(lease, ACK)
    assert table.sent(Kind.ACK) == ["a"]
    table.pass_s(60)
    assert table.sent(Kind.EXTEND) == []


@pytest.mark.parametrize("waited_s", range(0, 60, 5))
def test_a_stall_of_25_s_loses_no_lease_of_a_minute(waited_s: int) -> None:
    """Whenever it begins: the first turn afterwards extends what is due."""
    table = Table(first_s=60)
    table.add("a")
    table.start()
    for _ in range(waited_s):
        table.pass_s(1)
        table.sent(Kind.EXTEND)
    table.clock.advance(25)  # nothing turns
    table.leases.tick()
    table.sent(Kind.EXTEND)
    table.pass_s(25)
    assert table.lost == []


def test_what_came_during_a_stall_is_extended_at_once(table: Table) -> None:
    """It may have waited to be read for all of that time, with its lease running."""
    table.leases.tick()
    table.clock.advance(12)
    table.add("during")
    table.leases.tick()
    table.add("right after")
    assert table.sent(Kind.EXTEND) == ["during", "right after"]
    table.pass_s(2)
    table.add("later")
    assert table.sent(Kind.EXTEND) == []


def test_a_lease_that_was_not_extended_in_time_is_lost_once(table: Table) -> None:
    """What runs goes on, and its late ack is still sent: it counts if the message was not delivered again."""
    table.add("running")
    (lease,) = table.start()
    table.add("waiting")
    table.pass_s(21)
    assert (table.lost, len(table.leases)) == (["running"], 1)
    assert table.start() == []
    table.pass_s(60)
    table.leases.settle(lease, ACK)
    assert table.lost == ["running"]


def test_no_lease_is_extended_beyond_the_longest_duration() -> None:
    """Counted from the arrival, whatever part of it was spent waiting."""
    table = Table(max_lease_duration_s=60.0)
    table.add("a")
    table.pass_s(11)
    table.start()
    assert table.sent(Kind.EXTEND) == ["a"]
    table.pass_s(30)
    assert table.sent(Kind.EXTEND) == ["a"]
    table.pass_s(31)
    assert table.sent(Kind.EXTEND) == []
    table.pass_s(30)
    assert table.lost == ["a"]


def test_what_waited_for_longer_than_that_is_nacked_when_its_turn_comes() -> None:
    """There would be no time left for it."""
    table = Table(max_lease_duration_s=60.0)
    table.add("a")
    table.pass_s(11)
    assert table.sent(Kind.EXTEND) == ["a"]
    table.pass_s(50)
    assert table.sent(Kind.EXTEND) == ["a"]
    assert table.started() == []
    assert table.sent(Kind.NACK) == ["a"]


def test_requests_are_bounded() -> None:
    """In ids, in bytes, and in how many are under way: then the next ones grow."""
    table = Table()
    table.add(*map(str, range(2 * MAX_IDS + 1)))
    for lease in table.start():
        table.leases.settle(lease, NACK)
    assert [len(request.leases) for request in table.requests(Kind.NACK)] == [MAX_IDS, MAX_IDS, 1]
    table = Table()
    table.add(*(f"{index:0{MAX_ID_BYTES // 2}}" for index in range(2 * MAX_REQUESTS)))
    for lease in table.start():
        table.leases.settle(lease, ACK)
    under_way = table.requests(Kind.ACK)
    assert [len(request.leases) for request in under_way] == [1] * MAX_REQUESTS
    assert table.leases.next_at() == math.inf
    table.leases.confirmed(under_way[0])
    assert len(table.requests(Kind.ACK)) == 1


@pytest.mark.parametrize(("settlement", "kind"), [(ACK, Kind.ACK), (NACK, Kind.NACK)])
def test_what_cannot_be_sent_is_sent_again_later(table: Table, settlement: Settlement, kind: Kind) -> None:
    """With growing waits while the broker is away; what comes meanwhile goes with it."""
    table.add("a", "b")
    first, second = table.start()
    table.leases.settle(first, settlement)
    waits = []
    for _ in range(4):
        (request,) = table.requests(kind)
        table.leases.failed(request)
        waits.append(round(table.leases.next_at() - table.clock.now(), 3))
        table.clock.advance(waits[-1])
    table.leases.settle(second, settlement)
    assert waits == [0.2, 0.4, 0.8, 1.6]
    assert table.sent(kind) == ["a", "b"]
    assert len(table.leases) == 0


def test_a_nack_is_given_up_at_the_end_of_its_lease_and_an_ack_later(table: Table) -> None:
    """The end of a lease is as good as a nack; a late ack is better than none."""
    table.add("nack", "ack")
    nacked, acked = table.start()
    table.leases.settle(nacked, NACK)
    table.leases.settle(acked, ACK)
    table.clock.advance(GATHER_S)
    for request in table.leases.requests():
        table.leases.failed(request)
    table.pass_s(21)
    assert (len(table.leases), table.lost) == (1, ["ack"])
    table.pass_s(LATE_ACK_S)
    assert (len(table.leases), table.leases.is_settled) == (0, True)


def test_while_an_ack_is_tried_its_lease_is_extended(table: Table) -> None:
    """Otherwise a message whose answer is published would be delivered again."""
    table.add("a")
    (lease,) = table.start()
    table.leases.settle(lease, ACK)
    (request,) = table.requests(Kind.ACK)
    table.pass_s(11)
    assert table.sent(Kind.EXTEND) == ["a"]
    table.leases.failed(request)
    table.pass_s(1)
    assert table.sent(Kind.ACK) == ["a"]
    assert table.lost == []


def test_what_is_refused_as_a_whole_is_not_tried_again(table: Table) -> None:
    """The subscription is gone, or not ours any more: its messages come again, if at all, by themselves."""
    table.add("ack", "nack", "running")
    acked, nacked, _ = table.start()
    table.leases.settle(acked, ACK)
    table.leases.settle(nacked, NACK)
    table.pass_s(11)
    for request in table.leases.requests():
        table.leases.failed(request, is_permanent=True)
    assert (table.refused, table.lost, len(table.leases)) == (["ack"], ["ack", "running"], 1)
    assert table.leases.next_at() == math.inf


# Exactly-once subscriptions.


def test_a_delivery_is_handed_out_when_its_receipt_is_confirmed(table: Table) -> None:
    """At once, since another worker may have it otherwise; a failure that may pass is tried again."""
    table.add("ok", "gone", "again", is_exactly_once=True)
    assert table.started() == []
    (request,) = table.requests(Kind.EXTEND)
    assert request.seconds == EXTENSION_S
    reasons = {"gone": "PERMANENT_FAILURE_INVALID_ACK_ID", "again": "TRANSIENT_FAILURE_UNORDERED_ACK_ID"}
    table.leases.failed(request, is_permanent=True, reasons=reasons)
    assert table.started() == ["ok"]
    assert (len(table.leases), table.lost) == (2, [])
    table.clock.advance(1)
    assert table.sent(Kind.EXTEND) == ["again"]
    assert table.started() == ["again"]


def test_a_receipt_that_is_not_confirmed_in_time_is_forgotten(table: Table) -> None:
    """Nobody has begun it; it comes again."""
    table.add("a", is_exactly_once=True)
    (request,) = table.requests(Kind.EXTEND)
    table.pass_s(21)
    table.leases.confirmed(request)
    assert (table.started(), len(table.leases), table.lost) == ([], 0, [])


@pytest.mark.parametrize(
    ("reason", "refused", "held"),
    [
        ("PERMANENT_FAILURE_INVALID_ACK_ID", ["bad"], 0),
        ("TRANSIENT_FAILURE_INVALID_ACK_ID", [], 1),
        ("NEW", ["bad"], 0),
    ],
)
def test_a_refused_ack_says_that_the_lease_was_lost(table: Table, reason: str, refused: list[str], held: int) -> None:
    """Not one that may be tried again; ids that the failure does not name were acked."""
    table.add("good", "bad", is_exactly_once=True)
    table.sent(Kind.EXTEND)
    for lease in table.start():
        table.leases.settle(lease, ACK)
    (request,) = table.requests(Kind.ACK)
    table.leases.failed(request, is_permanent=True, reasons={"bad": reason})
    assert (table.refused, table.lost, len(table.leases)) == (refused, refused, held)


def test_a_lease_that_is_refused_its_extension_is_lost_once(table: Table) -> None:
    """Its handler goes on; the ack is tried and refused as well."""
    table.add("a", is_exactly_once=True)
    table.sent(Kind.EXTEND)
    (lease,) = table.start()
    table.pass_s(31)
    reasons = {"a": "PERMANENT_FAILURE_INVALID_ACK_ID"}
    for kind in (Kind.EXTEND, Kind.ACK):
        (request,) = table.requests(kind)
        table.leases.failed(request, is_permanent=True, reasons=reasons)
        if kind is Kind.EXTEND:
            table.leases.settle(lease, ACK)
    table.pass_s(60)
    assert (table.lost, table.refused, len(table.leases)) == (["a"], ["a"], 0)


# Ordering keys.


def test_of_each_key_one_runs_at_a_time(table: Table) -> None:
    """In the order of arrival; other keys and what has none do not wait."""
    table.add("k1", "k2", "k3", key="k")
    table.add("l1", "l2", key="l")
    table.add("free1", "free2")
    started = table.start()
    assert [lease.ack_id for lease in started] == ["k1", "l1", "free1", "free2"]
    table.leases.settle(started[0], ACK)
    (second,) = table.start()
    table.leases.settle(second, ACK)
    assert (second.ack_id, table.started()) == ("k2", ["k3"])


def test_a_nack_sends_back_what_waits_behind_it(table: Table) -> None:
    """The broker delivers all of that again; what comes then is in order."""
    table.add("k1", "k2", "k3", key="k")
    table.add("l1", "l2", key="l")
    first, _ = table.start()
    table.leases.settle(first, NACK)
    assert table.started() == []
    assert table.sent(Kind.NACK) == ["k1", "k2", "k3"]
    table.add("k1", "k2", key="k")
    assert table.started() == ["k1"]


def test_what_was_under_way_behind_a_nack_goes_back_too(table: Table) -> None:
    """The broker sent it before it knew; what was nacked starts when it comes again, however soon."""
    table.add("k1", "k2", key="k")
    (first,) = table.start()
    table.leases.settle(first, NACK)
    (request,) = table.requests(Kind.NACK)
    table.add("k3", key="k")
    table.leases.confirmed(request)
    table.add("k4", key="k")
    table.add("l1", key="l")
    assert table.started() == ["l1"]
    assert table.sent(Kind.NACK) == ["k3", "k4"]
    table.add("k1", "k2", key="k")
    (second,) = table.start()
    table.leases.settle(second, ACK)
    assert (second.ack_id, table.started()) == ("k1", ["k2"])


@pytest.mark.parametrize("waits", [True, False])
def test_a_key_goes_on_without_a_message_that_does_not_come_again(table: Table, waits: bool) -> None:
    """It may be dead-lettered: the next one is nacked once at most, and not at all after a while."""
    table.add("k1", key="k")
    (first,) = table.start()
    table.leases.settle(first, NACK)
    assert table.sent(Kind.NACK) == ["k1"]
    if waits:
        table.pass_s(6)
    table.add("k2", key="k")
    assert table.sent(Kind.NACK) == ([] if waits else ["k2"])
    if not waits:
        table.add("k2", key="k")
    assert table.started() == ["k2"]


def test_a_lost_receipt_sends_back_its_key_but_not_what_runs(table: Table) -> None:
    """What runs under the key keeps later deliveries of it waiting."""
    table.add("k1", key="k", is_exactly_once=True)
    table.sent(Kind.EXTEND)
    (first,) = table.start()
    table.add("k2", "k3", key="k", is_exactly_once=True)
    (request,) = table.requests(Kind.EXTEND)
    reasons = {"k2": "PERMANENT_FAILURE_INVALID_ACK_ID", "k3": "TRANSIENT_FAILURE_INVALID_ACK_ID"}
    table.leases.failed(request, is_permanent=True, reasons=reasons)
    table.clock.advance(1)
    assert table.sent(Kind.NACK) == ["k3"]
    table.add("k2", key="k")
    assert table.started() == []
    table.leases.settle(first, ACK)
    assert table.started() == ["k2"]


def test_what_no_handler_has_begun_is_nacked_together(table: Table) -> None:
    """With what waits for its key or its receipt; what runs stays."""
    table.add("k1", "k2", key="k")
    table.add("a")
    running = table.start()
    table.add("b")
    table.add("l1", "l2", key="l")
    table.add("once", is_exactly_once=True)
    table.leases.nack_unstarted()
    assert table.sent(Kind.NACK) == ["k2", "b", "l1", "l2", "once"]
    for lease in running:
        table.leases.settle(lease, ACK)
    assert table.started() == []
    assert table.sent(Kind.ACK) == ["k1", "a"]


# Flow control.


def test_a_stream_may_deliver_what_there_is_room_for() -> None:
    """In messages and in bytes; none is to be opened when either is used up."""
    table = Table(max_in_flight=10, max_in_flight_bytes=1_000_000)
    assert table.leases.room() == Grant(10, 1_000_000)
    table.add("a", "b", size=300_000)
    assert table.leases.room() == Grant(8, 400_000)
    table.add("c", size=400_000)
    assert table.leases.room() is None
    table = Table(max_in_flight=2)
    table.add("a", "b")
    assert table.leases.room() is None
    table.leases.extra = 3
    room = table.leases.room()
    assert room is not None
    assert room.max_messages == 3


def test_a_stream_is_replaced_when_its_limits_are_wrong_by_an_eighth() -> None:
    """Too small after what earlier streams delivered is settled or more is allowed, too large when less is."""
    table = Table(max_in_flight=16)
    table.add("a", "b", "c")
    started = table.start()
    grant = table.leases.room()
    assert grant is not None
    table.grant = grant
    table.add("d", "e")
    assert table.leases.fits(grant), "its own deliveries change nothing"
    for lease, fits in zip(started, [True, False, False], strict=True):
        table.leases.settle(lease, ACK)
        table.sent(Kind.ACK)
        assert table.leases.fits(grant) == fits
    fitting = Grant(16, 256 * 1024 * 1024)
    table = Table(max_in_flight=16)
    for extra, fits in [(0, True), (1, True), (2, False), (0, True)]:
        table.leases.extra = extra
        assert table.leases.fits(fitting) == fits
    assert not table.leases.fits(Grant(18, fitting.max_bytes))


def test_a_server_that_ignores_limits_is_noticed() -> None:
    """Twice what may be held, in messages or in bytes."""
    table = Table(max_in_flight=2, max_in_flight_bytes=1_000_000)
    table.add("a", "b", "c")
    assert not table.leases.is_overrun()
    table.add("d")
    assert table.leases.is_overrun()
    table = Table(max_in_flight=2, max_in_flight_bytes=1_000_000)
    table.add("a", size=2_000_000)
    assert table.leases.is_overrun()


class LeaseMachine(RuleBasedStateMachine):
    """Whatever happens in whatever order: each delivery ends once, in order of its key, and nothing is left."""

    def __init__(self) -> None:
        super().__init__()
        self.table = Table(max_in_flight=5, max_lease_duration_s=120.0)
        self.count = 0
        self.key_of: dict[str, str] = {}
        self.running: list[Lease] = []
        self.under_way: list[Request] = []
        self.ended: set[str] = set()
        self.last: dict[str, int] = defaultdict(int)

    @rule(key=st.sampled_from(["", "", "k", "l"]), is_exactly_once=st.booleans())
    def arrive(self, key: str, is_exactly_once: bool) -> None:
        self.count += 1
        self.key_of[str(self.count)] = key
        self.table.add(str(self.count), key=key, is_exactly_once=is_exactly_once)

    @rule()
    def start(self) -> None:
        for lease in self.table.start():
            assert lease.ack_id not in self.ended, "started twice, or after its end"
            self.ended.add(lease.ack_id)
            if lease.key:
                assert lease.key not in {other.key for other in self.running}
                assert self.last[lease.key] < int(lease.ack_id)
                self.last[lease.key] = int(lease.ack_id)
            self.running.append(lease)

    @rule(settlement=st.sampled_from(Settlement), data=st.data())
    def settle(self, settlement: Settlement, data: st.DataObject) -> None:
        if self.running:
            lease = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
            self.table.leases.settle(lease, settlement)

    @rule(seconds=st.sampled_from([0.01, 1.0, 7.0, 25.0]), ticks=st.booleans())
    def wait(self, seconds: float, ticks: bool) -> None:
        if ticks:
            self.table.pass_s(seconds)
        else:
            self.table.clock.advance(seconds)
            self.table.leases.tick()

    @rule()
    def send(self) -> None:
        self.under_way += self.table.leases.requests()

    @rule(failure=st.sampled_from([None, None, "transient", "permanent", "named"]), data=st.data())
    def answer(self, failure: str | None, data: st.DataObject) -> None:
        if not self.under_way:
            return
        request = self.under_way.pop(data.draw(st.integers(0, len(self.under_way) - 1)))
        if failure is None:
            self.table.leases.confirmed(request)
        elif failure == "named":
            reasons = st.dictionaries(st.sampled_from(request.ack_ids), st.sampled_from(["TRANSIENT_X", "GONE"]))
            self.table.leases.failed(request, is_permanent=True, reasons=data.draw(reasons))
        else:
            self.table.leases.failed(request, is_permanent=failure == "permanent")

    @rule()
    def stop(self) -> None:
        self.table.leases.nack_unstarted()

    @invariant()
    def counts_are_right(self) -> None:
        leases = self.table.leases
        assert self.table.grant.messages == self.table.grant.size_bytes == len(leases)
        assert len(set(self.table.lost)) == len(self.table.lost)

    def teardown(self) -> None:
        """With a broker that answers, everything ends."""
        self.table.leases.nack_unstarted()
        for lease in self.running:
            self.table.leases.settle(lease, ACK)
        for _ in range(30):
            for request in [*self.under_way, *self.table.leases.requests()]:
                self.table.leases.confirmed(request)
            self.under_way.clear()
            self.table.pass_s(1)
        assert len(self.table.leases) == 0
        assert self.table.leases.is_settled
        assert self.table.leases.next_at() == math.inf


TestLeaseMachine = LeaseMachine.TestCase
TestLeaseMachine.settings = hypothesis_settings(max_examples=60, stateful_step_count=40, deadline=None)
