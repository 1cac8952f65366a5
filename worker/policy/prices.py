"""What answers cost, by a table of prices.  Pure."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

import msgspec

MILLION = 1_000_000
MAX_KNOWN = 1_000
"""Names of models that are remembered with their price; requesters choose the names."""


class Price(msgspec.Struct, frozen=True, kw_only=True):
    """Of models, for a million tokens, in any currency."""

    model: str
    """Shell pattern, case-sensitive."""
    input: float
    output: float
    input_cached: float | None = None
    """Of the input that came from a cache; `None`: as `input`."""


class PriceTable:
    """
    The prices of models; the first pattern that matches counts.

    Args:
        prices: In their order.
    """

    def __init__(self, prices: Sequence[Price]) -> None:
        self._prices = prices
        self._known: dict[str, Price | None] = {}

    def cost(
        self, model: str | None, *, tokens_in: int | None, tokens_out: int | None, cached: int | None
    ) -> float | None:
        """Return what an answer costs; `None` where its model has no price or nothing was counted."""
        price = self._of(model or "") if self._prices else None
        if price is None or (tokens_in is None and tokens_out is None):
            return None
        cached = min(cached or 0, tokens_in or 0)
        of_cached = price.input if price.input_cached is None else price.input_cached
        total = ((tokens_in or 0) - cached) * price.input + cached * of_cached + (tokens_out or 0) * price.output
        return total / MILLION

    def _of(self, model: str) -> Price | None:
        if model in self._known:
            return self._known[model]
        price = next((each for each in self._prices if fnmatchcase(model, each.model)), None)
        if len(self._known) >= MAX_KNOWN:
            self._known.clear()
        self._known[model] = price
        return price
