"""What answers cost."""

import pytest

from worker.policy.prices import MAX_KNOWN, Price, PriceTable

TABLE = PriceTable(
    [
        Price(model="llama-*", input=1.0, output=3.0, input_cached=0.5),
        Price(model="*", input=10.0, output=10.0),
    ]
)


@pytest.mark.parametrize(
    ("model", "tokens", "cost"),
    [
        ("llama-3", (1_000_000, 1_000_000, None), 4.0),
        ("llama-3", (1_000_000, 0, 400_000), 0.8),
        ("llama-3", (100, None, 1_000), 0.00005),
        ("qwen", (500_000, 500_000, 500_000), 10.0),
        (None, (1_000_000, None, None), 10.0),
        ("llama-3", (None, None, None), None),
    ],
)
def test_the_first_pattern_counts(model: str | None, tokens: tuple[int | None, ...], cost: float | None) -> None:
    """Cached input has its own price where there is one; what was not counted costs nothing that is known."""
    given, generated, cached = tokens
    assert TABLE.cost(model, tokens_in=given, tokens_out=generated, cached=cached) == pytest.approx(cost)


def test_a_model_without_a_price_has_no_cost() -> None:
    """Nor has anything where there are no prices; names of requesters do not fill the memory."""
    table = PriceTable([Price(model="a", input=1.0, output=1.0)])
    for number in range(MAX_KNOWN + 10):
        assert table.cost(f"m{number}", tokens_in=1, tokens_out=1, cached=None) is None
    assert len(table._known) <= MAX_KNOWN
    assert PriceTable([]).cost("a", tokens_in=1, tokens_out=1, cached=None) is None
