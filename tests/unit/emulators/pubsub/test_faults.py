from typing import Any

import grpc
import pytest

from worker.emulators.pubsub.errors import InjectedError, PubSubError
from worker.emulators.pubsub.faults import CallFaults, Faults
from worker.emulators.pubsub.subscription import SubscriptionSnapshot


class Stream:
    """An open stream that remembers the error it was ended with."""

    def __init__(self, subscription_path: str) -> None:
        self.subscription_path = subscription_path
        self.error: PubSubError | None = None

    def break_off(self, error: PubSubError) -> None:
        self.error = error


def no_snapshot(path: str) -> SubscriptionSnapshot:
    raise KeyError(path)


@pytest.fixture
def streams() -> list[Stream]:
    return [Stream("a"), Stream("a"), Stream("b")]


@pytest.fixture
def faults(streams: list[Stream]) -> Faults:
    return Faults(["Publish", "Acknowledge"], no_snapshot, streams, lambda function: function())


def arrived(faults: Faults, method: str) -> CallFaults:
    call = faults.arrive(method)
    assert call is not None
    return call


async def test_a_fault_holds_for_its_method_and_number_of_calls(faults: Faults) -> None:
    """Later calls and other methods succeed."""
    faults.fail("Publish", grpc.StatusCode.UNAVAILABLE, times=2, message="no")
    assert faults.arrive("Acknowledge") is None
    for _ in range(2):
        with pytest.raises(InjectedError, match=r"^no$") as raised:
            await arrived(faults, "Publish").before()
        assert raised.value.status == "UNAVAILABLE"
    assert faults.arrive("Publish") is None


async def test_an_unlimited_fault_holds_until_cleared(faults: Faults) -> None:
    """A fault can be cleared alone or with all others."""
    for clear_all in (False, True):
        faults.fail("Publish", grpc.StatusCode.ABORTED)
        for _ in range(5):
            with pytest.raises(InjectedError):
                await arrived(faults, "Publish").before()
        faults.clear(None if clear_all else "Publish")
        assert faults.arrive("Publish") is None


async def test_a_fault_after_the_work_lets_the_work_be_done(faults: Faults) -> None:
    """The error replaces the answer."""
    faults.fail("Publish", grpc.StatusCode.DEADLINE_EXCEEDED, after=True)
    call = arrived(faults, "Publish")
    await call.before()
    with pytest.raises(InjectedError):
        await call.after()


async def test_delays_are_spent_on_their_side_of_the_work(faults: Faults, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several faults add up in the order in which they were set."""
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr("asyncio.sleep", sleep)
    faults.delay("Publish", 1.5)
    faults.delay("Publish", 7.0, after=True)
    faults.delay("Publish", 2.5, times=1)
    call = arrived(faults, "Publish")
    await call.before()
    assert slept == [1.5, 2.5]
    await call.after()
    assert slept == [1.5, 2.5, 7.0]
    await arrived(faults, "Publish").before()
    assert slept[3:] == [1.5]


def test_calls_are_counted_whether_they_fail_or_not(faults: Faults) -> None:
    """Each method is counted by itself, from the start or the last reset."""
    faults.fail("Publish", grpc.StatusCode.INTERNAL, times=1)
    for _ in range(3):
        faults.arrive("Publish")
    assert (faults.calls("Publish"), faults.calls("Acknowledge")) == (3, 0)
    faults.reset_calls()
    assert faults.calls("Publish") == 0


@pytest.mark.parametrize("matching", [(None, 3), ("a", 2), ("none", 0)])
def test_streams_are_broken_by_subscription(faults: Faults, streams: list[Stream], matching: Any) -> None:
    """All streams end, or those of one subscription; the number is returned."""
    path, count = matching
    assert faults.break_streams(grpc.StatusCode.UNKNOWN, message="bye", subscription_path=path) == count
    broken = [stream for stream in streams if stream.error is not None]
    assert len(broken) == count
    assert all(stream.error is not None and stream.error.status == "UNKNOWN" for stream in broken)


def test_a_misspelt_method_is_an_error(faults: Faults) -> None:
    """A fault that never fires would make a test green for the wrong reason."""
    for call in (
        lambda: faults.fail("publish", grpc.StatusCode.ABORTED),
        lambda: faults.delay("Ack", 1.0),
        lambda: faults.calls("Pulls"),
        lambda: faults.clear("Pulls"),
    ):
        with pytest.raises(ValueError, match="known are Acknowledge, Publish"):
            call()
