"""The hand-over from the client library's threads to the event loop: bursts, order, and a shutdown that waits."""

import asyncio
import queue
import threading
from collections.abc import Callable
from typing import Any, cast

from google.cloud.pubsub_v1.subscriber.message import Message
from google.cloud.pubsub_v1.subscriber.scheduler import Scheduler

from worker.brokers.scheduler import LoopScheduler


class FakeMessage:
    """A delivery that remembers how it was settled and on which thread."""

    def __init__(self, number: int = 0) -> None:
        self.number = number
        self.nacks = 0

    def nack(self) -> None:
        self.nacks += 1


class Party:
    """A scheduler on the running loop, with what its callback was given."""

    def __init__(self, drain_s: float = 60.0) -> None:
        self.loop = asyncio.get_running_loop()
        self.started: list[FakeMessage] = []
        self.threads: set[int] = set()
        self.unasked = asyncio.Event()
        self.arrived = asyncio.Event()
        self.scheduler = LoopScheduler(self.loop, drain_s, self.unasked.set)

    def start(self, message: Message) -> None:
        self.threads.add(threading.get_ident())
        self.started.append(cast("FakeMessage", message))
        self.arrived.set()

    def schedule(self, *messages: FakeMessage) -> None:
        """From another thread, one after the other, and wait for that thread."""
        thread = threading.Thread(
            target=lambda: [self.scheduler.schedule(self.start, cast("Any", m)) for m in messages]
        )
        thread.start()
        thread.join()

    def shut_down(self) -> tuple[threading.Thread, "queue.Queue[Any]"]:
        """Begin `shutdown` on a thread of its own, as the library does; its result comes through the queue."""
        results: queue.Queue[Any] = queue.Queue()
        thread = threading.Thread(target=lambda: results.put(self.scheduler.shutdown(await_msg_callbacks=True)))
        thread.start()
        return thread, results


async def finished(thread: threading.Thread) -> None:
    await asyncio.to_thread(thread.join, 30)
    assert not thread.is_alive()


async def test_it_is_the_librarys_scheduler() -> None:
    """The library accepts it, and finds the way back of acks and nacks."""
    scheduler = Party().scheduler
    assert isinstance(scheduler, Scheduler)
    assert isinstance(scheduler.queue, queue.Queue)
    assert scheduler.queue is scheduler.queue


async def test_messages_arrive_on_the_loop_in_order() -> None:
    """What a thread hands over starts on the loop's thread, in the order given."""
    party = Party()
    messages = [FakeMessage(number) for number in range(100)]
    party.schedule(*messages)
    assert party.started == []
    await party.arrived.wait()
    assert party.started == messages
    assert party.threads == {threading.get_ident()}


async def test_a_burst_wakes_the_loop_once() -> None:
    """The loop is woken for the first of a burst, and again only for the next burst."""
    party = Party()
    wakes = 0
    original = party.loop.call_soon_threadsafe

    def counted(callback: Callable[..., object], *args: Any, **kwargs: Any) -> Any:
        nonlocal wakes
        wakes += 1
        return original(callback, *args, **kwargs)

    party.loop.call_soon_threadsafe = counted  # type: ignore[method-assign]
    party.schedule(*(FakeMessage() for _ in range(500)))
    await party.arrived.wait()
    assert (wakes, len(party.started)) == (1, 500)
    party.arrived.clear()
    party.schedule(*(FakeMessage() for _ in range(3)))
    await party.arrived.wait()
    assert (wakes, len(party.started)) == (2, 503)


async def test_many_threads_lose_nothing() -> None:
    """Every message of concurrent threads starts exactly once."""
    party = Party()
    messages = [[FakeMessage(thread * 1000 + n) for n in range(1000)] for thread in range(4)]
    threads = [
        threading.Thread(target=lambda mine=mine: [party.scheduler.schedule(party.start, cast("Any", m)) for m in mine])
        for mine in messages
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        await finished(thread)
    while len(party.started) < 4000:
        party.arrived.clear()
        await party.arrived.wait()
    assert sorted(message.number for message in party.started) == sorted(m.number for mine in messages for m in mine)


async def test_shutdown_blocks_until_everything_is_settled() -> None:
    """Leases are kept and acks sent only while it blocks, so it waits for the last one."""
    party = Party()
    party.schedule(*(FakeMessage() for _ in range(3)))
    await party.arrived.wait()
    thread, results = party.shut_down()
    for _ in range(2):
        party.scheduler.settled()
    await party.unasked.wait()  # it runs, and waits
    assert results.empty()
    assert thread.is_alive()
    party.scheduler.settled()
    await finished(thread)
    assert results.get_nowait() == []


async def test_shutdown_does_not_block_the_loop_for_what_is_settled() -> None:
    """With nothing running it returns at once, twice as well."""
    party = Party()
    for _ in range(2):
        thread, results = party.shut_down()
        await finished(thread)
        assert results.get_nowait() == []


async def test_shutdown_hands_back_what_has_not_started() -> None:
    """The inbox is nacked at once, before the wait for what runs, and never starts."""
    party = Party()
    party.schedule(running := FakeMessage())
    await party.arrived.wait()
    waiting = [FakeMessage() for _ in range(5)]
    party.schedule(*waiting)
    thread, results = party.shut_down()
    await party.unasked.wait()
    assert [message.nacks for message in waiting] == [1] * 5
    assert thread.is_alive()
    assert running.nacks == 0
    party.scheduler.settled()
    await finished(thread)
    assert results.get_nowait() == []  # nacked here: the library would do it again
    assert party.started == [running]


async def test_schedule_after_shutdown_nacks() -> None:
    """What comes while the stream closes is handed back at once."""
    party = Party()
    thread, _ = party.shut_down()
    await finished(thread)
    party.schedule(late := FakeMessage())
    await asyncio.sleep(0)
    assert (late.nacks, party.started) == (1, [])


async def test_shutdown_is_bounded() -> None:
    """A message that is never settled does not keep the library's thread for ever."""
    party = Party(drain_s=0.05)
    party.schedule(FakeMessage())
    await party.arrived.wait()
    thread, results = party.shut_down()
    await finished(thread)
    assert results.get_nowait() == []


async def test_shutdown_without_waiting_returns_at_once() -> None:
    """The library's default does not wait."""
    party = Party()
    party.schedule(FakeMessage())
    await party.arrived.wait()
    assert await asyncio.to_thread(party.scheduler.shutdown) == []


async def test_an_unasked_shutdown_is_told_on_the_loop() -> None:
    """The library closed the stream by itself: another must be opened."""
    party = Party()
    thread, _ = party.shut_down()
    await asyncio.wait_for(party.unasked.wait(), 30)
    await finished(thread)


async def test_an_expected_shutdown_tells_nobody() -> None:
    """Our own stop is no reason to open another stream."""
    party = Party()
    party.scheduler.expect_shutdown()
    thread, _ = party.shut_down()
    await finished(thread)
    await asyncio.sleep(0)
    assert not party.unasked.is_set()


def test_a_closed_loop_does_not_raise_in_the_librarys_threads() -> None:
    """An exception there would leave the stream's future unresolved for ever."""

    async def build() -> Party:
        return Party()

    party = asyncio.run(build())
    party.schedule(message := FakeMessage())
    assert party.scheduler.shutdown(await_msg_callbacks=True) == []
    assert message.nacks == 1
