"""Limits that go to the server, stream by stream."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from google.pubsub_v1.types import StreamingPullRequest

from worker.brokers.flow_control import OutstandingMessages, StreamingPull, _Requests, library_limits
from worker.settings.schema import PubSubSettings
from worker.wire.message import MAX_PUBSUB_MESSAGE_BYTES

SETTINGS = PubSubSettings(emulator_host="localhost:1", max_in_flight=3, max_in_flight_bytes=1_000_000)


def first_and_ping() -> Iterator[StreamingPullRequest]:
    yield StreamingPullRequest(subscription="s", max_outstanding_messages=7, max_outstanding_bytes=7)
    yield StreamingPullRequest()


def held(messages: int, size_bytes: int = 0) -> OutstandingMessages:
    found = OutstandingMessages(SETTINGS)
    for _ in range(messages):
        found.add(size_bytes)
    return found


def begin(held: OutstandingMessages) -> list[Any]:
    """Return the requests as the server sees them."""

    def call(requests: Any, *, timeout: float | None) -> Any:
        return SimpleNamespace(is_active=lambda: True, requests=requests, timeout=timeout)

    return list(StreamingPull(call, held)(first_and_ping(), timeout=None).requests)


def limits(request: StreamingPullRequest) -> tuple[int, int]:
    return request.max_outstanding_messages, request.max_outstanding_bytes


def test_the_first_request_of_a_streaming_pull_carries_our_limits() -> None:
    """The server gets what the settings say, not what the library was told; later requests carry no limits."""
    first, ping = begin(held(0))
    assert (limits(first), first.subscription) == ((3, 1_000_000), "s")
    assert limits(ping) == (0, 0)


def test_a_stream_waits_while_more_than_one_streams_worth_is_held() -> None:
    """With one full stream's deliveries held the next one begins; with one more it waits until that one is settled."""
    full = held(4)
    waits: list[float] = []

    def settle_one(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            full.remove(0)

    requests = _Requests(first_and_ping(), full, settle_one)
    requests.call = SimpleNamespace(is_active=lambda: True)
    assert limits(next(iter(requests))) == (3, 1_000_000)
    assert len(waits) == 3
    assert held(3).leaves_room()


def test_a_stream_waits_while_too_many_bytes_are_held() -> None:
    """Bytes count like messages; the message that goes over the limit belongs to the stream that brought it."""
    assert held(1, 1_000_000 + MAX_PUBSUB_MESSAGE_BYTES - 1).leaves_room()
    assert not held(1, 1_000_000 + MAX_PUBSUB_MESSAGE_BYTES).leaves_room()


def test_what_the_library_keeps_on_hold_is_held() -> None:
    """Messages behind another of their ordering key are leased as well, though nothing has been delivered of them."""
    found = held(2, 300_000)
    found.on_hold = lambda: (1, 0)
    assert found.leaves_room()
    found.on_hold = lambda: (2, 0)
    assert not found.leaves_room()
    found.on_hold = lambda: (1, 400_000 + MAX_PUBSUB_MESSAGE_BYTES)
    assert not found.leaves_room()


def test_a_waiting_stream_ends_with_its_call() -> None:
    """Nobody waits for the sake of a call that was cancelled."""
    requests = _Requests(first_and_ping(), held(4), lambda _: None)
    requests.call = SimpleNamespace(is_active=lambda: False)
    assert list(requests) == []


def test_a_waiting_stream_ends_when_nothing_more_is_wanted() -> None:
    """Room that a drain makes begins no stream."""
    full = held(4)

    def drain(_: float) -> None:
        full.is_closed = True
        full.remove(0)

    requests = _Requests(first_and_ping(), full, drain)
    requests.call = SimpleNamespace(is_active=lambda: True)
    assert list(requests) == []


def test_the_library_never_reaches_its_own_limits() -> None:
    """Two streams' worth is below them, so it never stops reading, not even after the pause that begins at 100 %."""
    found = library_limits(SETTINGS, 600.0, 60)
    assert found.max_messages > 2 * SETTINGS.max_in_flight
    assert found.max_bytes >= 2 * (SETTINGS.max_in_flight_bytes + MAX_PUBSUB_MESSAGE_BYTES)
    assert (found.max_lease_duration, found.min_duration_per_lease_extension) == (600.0, 60)
    assert found.max_duration_per_lease_extension == 60
