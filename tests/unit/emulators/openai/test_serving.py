"""Slots, and the times at which an answer is due."""

import asyncio

import pytest

from worker.emulators.openai.generation import Choice, Generation
from worker.emulators.openai.options import SimOptions
from worker.emulators.openai.seeded import Draws
from worker.emulators.openai.serving import ClockPace, DueTimes, Slots, due_times, sequence_sizes
from worker.emulators.openai.validation import Call, Endpoint


async def settle() -> None:
    """Let every task run until it waits."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_slots_are_given_in_order() -> None:
    """Above the limit requests wait and get a slot in the order they came, one for each that is released."""
    slots = Slots(1)
    entered: list[int] = []

    async def visit(number: int) -> None:
        await slots.acquire()
        entered.append(number)

    tasks = [asyncio.ensure_future(visit(number)) for number in range(3)]
    await settle()
    assert (entered, slots.waiting, slots.has_free_slot) == ([0], 2, False)
    slots.release()
    await settle()
    assert entered == [0, 1]
    slots.set_limit(None)
    await asyncio.gather(*tasks)
    assert (entered, slots.in_service, slots.has_free_slot) == ([0, 1, 2], 2, True)


async def test_a_lower_limit_ends_no_request_in_service() -> None:
    """Requests in service finish; new ones wait until fewer than the new limit remain."""
    slots = Slots(3)
    for _ in range(3):
        await slots.acquire()
    slots.set_limit(1)
    late = asyncio.ensure_future(slots.acquire())
    for left in (2, 1):
        slots.release()
        await settle()
        assert (slots.in_service, late.done()) == (left, False)
    slots.release()
    await late
    assert slots.in_service == 1


@pytest.mark.parametrize("granted", [False, True])
async def test_a_cancelled_wait_keeps_no_slot(granted: bool) -> None:
    """Cancelled while waiting, or in the moment a slot was granted, a request leaves nothing behind."""
    slots = Slots(1)
    await slots.acquire()
    waiter = asyncio.ensure_future(slots.acquire())
    await settle()
    if granted:
        slots.release()
    waiter.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiter
    assert (slots.in_service, slots.waiting) == (0 if granted else 1, 0)


def test_due_times_are_the_same_streamed_and_not() -> None:
    """Generation speed adds to the first token, and latency is the least total."""
    fast = due_times(SimOptions.of(latency="1s", tokens_per_s=10), 5, lambda: Draws(0), 1.0)
    assert (fast.first_s, fast.total_s) == (1.0, 1.5)
    early = due_times(SimOptions.of(latency="1s", ttft="100ms"), 5, lambda: Draws(0), 2.0)
    assert (early.first_s, early.total_s) == (0.2, 2.0)
    assert early.due_s(5, 10) == pytest.approx(1.1)
    assert early.due_s(0, 0) == 2.0


async def test_a_clock_gives_a_part_of_the_tokens_for_a_part_of_the_time() -> None:
    """Without any time all of them are there at once; of an hour hardly any."""
    at_once, slow = ClockPace(DueTimes(0.0, 0.0), 7), ClockPace(DueTimes(60.0, 3600.0), 7)
    await at_once.until(7)
    assert (at_once.has(7), at_once.generated) == (True, 7)
    assert (slow.has(0), slow.generated) == (False, 0)


def generated(*tokens: int) -> Generation:
    return Generation([Choice(place, ["x"] * count) for place, count in enumerate(tokens)], 100)


@pytest.mark.parametrize(
    ("generation", "inputs", "cached", "sizes"),
    [
        (generated(24), [], 0, [(100, 24)]),
        (generated(24), [], 64, [(36, 24)]),
        (generated(24), [], 100, [(1, 24)]),
        (generated(5, 0, 9), [], 0, [(34, 5), (33, 1), (33, 9)]),
        (Generation([], 100), ["a", "b"], 0, [(50, 1), (50, 1)]),
        (Generation([], 100), [], 0, [(100, 1)]),
    ],
    ids=["one answer", "a cached beginning", "all of it cached", "three answers", "embeddings", "no choices"],
)
def test_a_request_is_a_sequence_for_each_answer(
    generation: Generation, inputs: list[str], cached: int, sizes: list[tuple[int, int]]
) -> None:
    """They have all tokens of the prompt together, less what is cached; none has no token."""
    call = Call(Endpoint.CHAT, {}, "m", prompt_tokens=100, inputs=inputs)
    assert sequence_sizes(call, generation, cached) == sizes
