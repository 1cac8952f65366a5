"""
The engine: one object that says what is to be done about an attempt's end.

The processor asks it after every attempt and then applies the budgets (`budgets.apply_budgets`) to what it says.
"""

import time
from collections.abc import Callable

from worker.policy.model import Decision, ErrorEvent
from worker.policy.table import judge


class ErrorPolicy:
    """Operators' rules, then the built-in table, then hooks; immutable once built."""

    def __init__(self, *, now_unix: Callable[[], float] = time.time) -> None:
        self._now_unix = now_unix

    async def decide(self, event: ErrorEvent, *, consecutive_forbidden: int = 0) -> Decision:
        """
        Return what is to be done, before the budgets.

        Args:
            event: What happened; a good answer is an event too.
            consecutive_forbidden: 403s in a row on this route without a success between, this one included.

        Cancellation: leaves nothing behind.
        """
        return judge(event, now_unix=self._now_unix(), consecutive_forbidden=consecutive_forbidden)
