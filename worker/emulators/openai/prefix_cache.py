"""
What an engine keeps of prompts: blocks of them, each under everything that stands before it, the oldest dropped first.

A prompt finds the blocks with which it begins, up to the first that is not there.  Of prompts of the same age the last
blocks are dropped before the first ones, since those are the ones that others share.

Source: https://docs.vllm.ai/en/stable/design/prefix_caching.html
"""

from collections import OrderedDict
from hashlib import blake2b

BLOCK_TOKENS = 16
"""vLLM's default."""
BYTES_PER_TOKEN = 4
"""As the simulated server counts prompts."""


class PrefixCache:
    """
    The blocks that are kept.

    Args:
        tokens: Of all prompts together that fit, at least one block.
    """

    def __init__(self, tokens: int) -> None:
        self._capacity = max(1, tokens // BLOCK_TOKENS)
        self._blocks: OrderedDict[bytes, None] = OrderedDict()
        self.asked_tokens = 0
        """Of whole blocks of all prompts so far."""
        self.found_tokens = 0

    def take(self, prompt: bytes) -> int:
        """Return how many tokens of a prompt are there, and keep all of its whole blocks from now on."""
        size = BLOCK_TOKENS * BYTES_PER_TOKEN
        before, keys = b"", []
        for start in range(0, len(prompt) - size + 1, size):
            before = blake2b(before + prompt[start : start + size], digest_size=16).digest()
            keys.append(before)
        found = next((number for number, key in enumerate(keys) if key not in self._blocks), len(keys))
        for key in reversed(keys):
            self._blocks[key] = None
            self._blocks.move_to_end(key)
        while len(self._blocks) > self._capacity:
            self._blocks.popitem(last=False)
        self.asked_tokens += len(keys) * BLOCK_TOKENS
        self.found_tokens += found * BLOCK_TOKENS
        return found * BLOCK_TOKENS
