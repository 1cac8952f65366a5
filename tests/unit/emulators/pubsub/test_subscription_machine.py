"""The promises of the engine under any sequence of calls: hypothesis compares it with a simple model."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.support.embedded_pubsub import NO_LIMIT, Bench
from worker.emulators.pubsub.deliveries import Receiver

MAX_ATTEMPTS = 5
DEADLINE_S = 10.0
MAX_BACKOFF_S = 6.0


class SubscriptionMachine(RuleBasedStateMachine):
    """
    Nothing is lost, nothing is leased twice, every attempt is counted exactly, keys stay in order.

    The model sees only what a client sees.  It knows the failures of each message, and the receiver and the end of each
    lease.  It is complete without ordering keys; `OrderedMachine` adds the effects of keys.
    """

    keys: tuple[str, ...] = ("",)

    @initialize(backoff=st.sampled_from([None, 2.0]), dead_letters=st.booleans(), exactly_once=st.booleans())
    def build(self, backoff: float | None, dead_letters: bool, exactly_once: bool) -> None:
        self.backoff, self.dead_letters, self.exactly_once = backoff, dead_letters, exactly_once
        self.now = 0.0
        self.key_of: dict[str, str] = {}
        self.unacked: set[str] = set()
        self.failures: dict[str, int] = {}
        self.leases: dict[str, tuple[str, float, Receiver]] = {}  # message id → ack id, end, receiver
        self.ready_at: dict[str, float] = {}
        self.dead: list[tuple[str, int]] = []
        self.receivers: list[Receiver] = []
        self.bench = Bench(
            ack_deadline_s=DEADLINE_S,
            minimum_backoff_s=backoff,
            maximum_backoff_s=MAX_BACKOFF_S,
            max_delivery_attempts=MAX_ATTEMPTS if dead_letters else 0,
            is_exactly_once=exactly_once,
            is_ordered=len(self.keys) > 1,
        )
        self.subscription = self.bench.subscription

    # Calls of clients.

    @rule(count=st.integers(1, 4), data=st.data())
    def publish(self, count: int, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(self.keys))
        for message_id in self.bench.publish(count, key=key):
            self.key_of[message_id] = key
            self.unacked.add(message_id)
            self.failures[message_id] = 0

    @rule(max_messages=st.integers(0, 3))
    def open_stream(self, max_messages: int) -> None:
        if len(self.receivers) < 3:
            receiver = Receiver(lambda: None, max_messages=max_messages)
            self.receivers.append(receiver)
            self.subscription.attach(receiver)

    @precondition(lambda self: self.receivers)
    @rule(data=st.data())
    def close_stream(self, data: st.DataObject) -> None:
        receiver = data.draw(st.sampled_from(self.receivers))
        self.receivers.remove(receiver)
        self.subscription.detach(receiver)

    @precondition(lambda self: self.receivers)
    @rule(data=st.data(), limit=st.integers(1, 5))
    def take(self, data: st.DataObject, limit: int) -> None:
        self.receive(data.draw(st.sampled_from(self.receivers)), limit)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def ack(self, data: st.DataObject) -> None:
        message_id = data.draw(st.sampled_from(sorted(self.leases)))
        ack_id = self.leases.pop(message_id)[0]
        assert self.subscription.acknowledge([ack_id]) == []
        self.settle(message_id)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def nack(self, data: st.DataObject) -> None:
        message_id = data.draw(st.sampled_from(sorted(self.leases)))
        ack_id = self.leases[message_id][0]
        assert self.subscription.modify_ack_deadline([ack_id], 0) == []
        self.fail(message_id, self.now)

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), seconds=st.sampled_from([1.0, 4.0, 30.0]))
    def extend(self, data: st.DataObject, seconds: float) -> None:
        message_id = data.draw(st.sampled_from(sorted(self.leases)))
        ack_id, _, holder = self.leases[message_id]
        assert self.subscription.modify_ack_deadline([ack_id], seconds) == []
        self.leases[message_id] = (ack_id, self.now + seconds, holder)

    @rule(seconds=st.sampled_from([0.5, 2.0, 5.0, 11.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.bench.time.sleep(seconds)
        while due := [(end, int(m), m) for m, (_, end, _) in self.leases.items() if end <= self.now]:
            end, _, message_id = min(due)
            self.fail(message_id, end)

    # The model.

    def receive(self, receiver: Receiver, limit: int) -> int:
        taken = self.subscription.take(receiver, limit, NO_LIMIT)
        assert len(taken) <= limit
        for ack_id, message, attempt in taken:
            message_id = message.message_id
            assert message_id in self.unacked, "neither acked nor dead messages are delivered"
            assert message_id not in self.leases, "nothing is leased twice"
            assert self.ready_at.get(message_id, 0.0) <= self.now, "not before its backoff is over"
            assert attempt == (self.failures[message_id] + 1 if self.dead_letters else 0)
            self.check_order(message_id, receiver)
            self.leases[message_id] = (ack_id, self.now + DEADLINE_S, receiver)
        held = sum(1 for _, _, holder in self.leases.values() if holder is receiver)
        assert held == receiver.outstanding_messages <= receiver.max_messages
        return len(taken)

    def check_order(self, message_id: str, receiver: Receiver) -> None:
        """Without keys there is no order."""

    def settle(self, message_id: str) -> None:
        self.unacked.remove(message_id)

    def fail(self, message_id: str, at: float) -> None:
        del self.leases[message_id]
        self.failures[message_id] += 1
        failures = self.failures[message_id]
        if self.dead_letters and failures == MAX_ATTEMPTS:
            self.dead.append((message_id, failures))
            self.settle(message_id)
        elif self.backoff is not None:
            self.ready_at[message_id] = at + min(MAX_BACKOFF_S, self.backoff * 2 ** (failures - 1))

    @invariant()
    def the_engine_agrees(self) -> None:
        snapshot = self.subscription.snapshot()
        assert {lease.message_id for lease in snapshot.leased} == set(self.leases)
        assert snapshot.delivery_attempts == {m: self.failures[m] + 1 for m in self.unacked}
        assert self.bench.forwarded == self.dead

    def teardown(self) -> None:
        """In every case a receiver that acks all messages gets all that are left."""
        if not hasattr(self, "bench"):  # hypothesis gave up before the first rule
            return
        for receiver in self.receivers:
            self.subscription.detach(receiver)
        last = Receiver(lambda: None)
        self.subscription.attach(last)
        for _ in range(2 + len(self.unacked)):
            self.wait(30.0)
            while self.receive(last, 5):
                for message_id in [m for m, (_, _, holder) in self.leases.items() if holder is last]:
                    self.subscription.acknowledge([self.leases.pop(message_id)[0]])
                    self.settle(message_id)
        assert self.unacked == set(), "nothing is lost"
        assert self.subscription.snapshot().delivery_attempts == {}


class OrderedMachine(SubscriptionMachine):
    """Two keys beside messages without a key."""

    keys = ("", "a", "b")

    @initialize()
    def build_keys(self) -> None:
        self.acked_early: set[str] = set()  # behind an unacked message of their key

    def later(self, message_id: str, among: set[str]) -> list[str]:
        key = self.key_of[message_id]
        return [m for m in among if key and self.key_of[m] == key and int(m) > int(message_id)]

    def check_order(self, message_id: str, receiver: Receiver) -> None:
        for other in self.unacked:
            if message_id in self.later(other, {message_id}):
                assert other in self.leases, "every earlier message of the key is out already"
                assert self.leases[other][2] is receiver, "a key is with one receiver at a time"

    def settle(self, message_id: str) -> None:
        super().settle(message_id)
        self.acked_early.add(message_id)
        self.acked_early = {m for m in self.acked_early if any(self.later(other, {m}) for other in self.unacked)}

    def fail(self, message_id: str, at: float) -> None:
        super().fail(message_id, at)
        if message_id not in self.unacked:  # dead-lettered: the key goes on
            return
        for other in self.later(message_id, set(self.leases)):
            del self.leases[other]
        if not self.exactly_once:
            for other in self.later(message_id, self.acked_early):
                if (other, MAX_ATTEMPTS) not in self.dead:
                    self.acked_early.remove(other)
                    self.unacked.add(other)


class TestUnordered(SubscriptionMachine.TestCase):
    """Without ordering keys."""

    settings = settings(max_examples=50, stateful_step_count=40)


class TestOrdered(OrderedMachine.TestCase):
    """With ordering keys."""

    settings = settings(max_examples=50, stateful_step_count=40)
