"""Waiting for a condition in real time; the only way a test waits for another thread, process or connection."""

import asyncio
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

LIMIT_S = 30.0
"""Generous, since a test may share its cores; a condition that comes true costs no more than one interval."""
INTERVAL_S = 0.01


def until(condition: Callable[[], T], limit_s: float = LIMIT_S, what: str = "the condition") -> T:
    """Return the first true value of the condition; fail when there is none within the limit."""
    end = time.monotonic() + limit_s
    while not (found := condition()):
        assert time.monotonic() < end, f"not within {limit_s:g} s: {what}"
        time.sleep(INTERVAL_S)
    return found


async def eventually(condition: Callable[[], T], limit_s: float = LIMIT_S, what: str = "the condition") -> T:
    """Do the same without blocking the event loop; a cancellation ends the wait."""
    end = time.monotonic() + limit_s
    while not (found := condition()):
        assert time.monotonic() < end, f"not within {limit_s:g} s: {what}"
        await asyncio.sleep(INTERVAL_S)
    return found
