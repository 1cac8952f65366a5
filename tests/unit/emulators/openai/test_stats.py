"""Counters of the simulated server."""

import asyncio

from worker.emulators.openai.stats import MAX_PATHS, Stats, Tally


def test_a_tally_counts_repeats() -> None:
    """It knows distinct keys, repeats, and how many keys were repeated."""
    tally: Tally[str] = Tally()
    assert [tally.add(key) for key in "abaacb"] == [0, 0, 1, 2, 0, 1]
    assert (tally.distinct, tally.repeats, tally.repeated, tally.forgotten) == (3, 3, 2, 0)
    assert tally.most_repeated() == [("a", 3), ("b", 2)]


def test_a_tally_forgets_the_oldest_and_says_so() -> None:
    """Above its limit memory stays bounded, and the number of forgotten keys is known."""
    tally: Tally[int] = Tally(limit=2)
    for key in (1, 2, 3):
        tally.add(key)
    assert (tally.distinct, tally.forgotten) == (3, 1)
    assert [tally.add(3), tally.add(1)] == [1, 0]


def test_in_flight_and_its_peak() -> None:
    """Requests in flight go up and down, the peak stays, a reset begins with what is in flight."""
    stats = Stats()
    for _ in range(3):
        stats.begin("/v1/completions")
    stats.end("200")
    stats.end("hung")
    assert (stats.in_flight, stats.peak_in_flight, stats.by_status["hung"]) == (1, 3, 1)
    stats.reset()
    assert (stats.requests, stats.in_flight, stats.peak_in_flight) == (0, 1, 1)


def test_wasted_generations_are_counted_by_body() -> None:
    """A body generated to its end a second time is a wasted generation with its tokens."""
    stats = Stats()
    for body in (1, 2, 1, 1):
        stats.identify("id", body)
        stats.complete(body, 10)
    stats.add_undelivered(4)
    snapshot = stats.snapshot()
    assert snapshot["generations"] == {"completed": 4, "distinct_bodies": 2, "bodies_generated_again": 1, "wasted": 2}
    assert snapshot["tokens"] == {"generated": 44, "repeated": 20, "undelivered": 4}
    assert snapshot["request_ids"]["most_repeated"] == {"id": 4}
    assert snapshot["bodies"]["most_repeated"] == {"0000000000000001": 3}


def test_the_series_has_a_row_per_second() -> None:
    """Each second has what happened in it; without asking it is left out."""
    now = [10.0]
    stats = Stats(lambda: now[0])
    stats.begin("/a")
    now[0] = 12.5
    stats.begin("/a")
    stats.end("200")
    assert stats.snapshot(series=True)["series"] == [
        {"second": 0, "requests": 1, "peak_in_flight": 1},
        {"second": 2, "requests": 1, "peak_in_flight": 2, "200": 1},
    ]
    assert "series" not in stats.snapshot()


def test_paths_of_a_scanner_are_counted_together() -> None:
    """A caller that invents paths does not grow the table without bound."""
    stats = Stats()
    for number in range(MAX_PATHS + 10):
        stats.begin(f"/{number}")
    assert (len(stats.by_path), stats.by_path["other"]) == (MAX_PATHS + 1, 10)


async def test_waiting_for_a_count() -> None:
    """A waiter is woken by the request that makes its predicate true, and cancelled waiters are forgotten."""
    stats = Stats()
    waiter = asyncio.ensure_future(stats.wait_for(lambda now: now.in_flight == 2))
    quitter = asyncio.ensure_future(stats.wait_for(lambda _: False))
    await asyncio.sleep(0)
    stats.begin("/a")
    await asyncio.sleep(0)
    assert not waiter.done()
    stats.begin("/a")
    await waiter
    quitter.cancel()
    await asyncio.gather(quitter, return_exceptions=True)
    assert stats._watchers == []
    await stats.wait_for(lambda now: now.requests == 2)
