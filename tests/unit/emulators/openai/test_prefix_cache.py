"""What a cache of prefixes keeps, and what it drops first."""

from worker.emulators.openai.prefix_cache import PrefixCache


def a_prompt(beginning: str, rest: str, tokens: int = 64) -> bytes:
    """A text of so many tokens for each of its two parts."""
    return (beginning * tokens * 4)[: tokens * 4].encode() + (rest * tokens * 4)[: tokens * 4].encode()


def test_what_a_prompt_begins_with_is_found() -> None:
    """Whole blocks, up to the first that differs."""
    cache = PrefixCache(10_000)
    assert cache.take(a_prompt("a", "b")) == 0
    assert cache.take(a_prompt("a", "c")) == 64
    assert cache.take(a_prompt("a", "b")) == 128
    assert cache.take(a_prompt("x", "b")) == 0
    assert (cache.asked_tokens, cache.found_tokens) == (512, 192)


def test_a_block_counts_under_what_stands_before_it() -> None:
    """The same words in another place are other keys and values."""
    cache = PrefixCache(10_000)
    cache.take(a_prompt("a", "b"))
    assert cache.take(a_prompt("b", "a")) == 0


def test_the_oldest_are_dropped_first() -> None:
    """And of one prompt its end before its beginning."""
    cache = PrefixCache(200)
    cache.take(a_prompt("a", "b"))
    cache.take(a_prompt("c", "d"))
    assert cache.take(a_prompt("a", "b")) == 64
    assert cache.take(a_prompt("c", "d")) == 64


def test_a_prompt_below_a_block_is_never_found() -> None:
    """Only whole blocks are kept."""
    cache = PrefixCache(1)
    assert [cache.take(b"short"), cache.take(b"short")] == [0, 0]
    assert cache.asked_tokens == 0
