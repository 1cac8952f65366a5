"""
Draws that look random and are not: every number comes from a hash of the seed and of what is drawn for.

The simulated server promises that the same seed and the same request give the same answer in any process and on any
machine, in whatever order requests arrive.  A shared random generator cannot promise that, so there is none: a `Dice`
is a key, and each draw hashes the key with a label.  Nothing here is fit for secrets.
"""

from hashlib import blake2b, shake_128

_TWO_TO_52 = float(1 << 52)
"""52 bits and a half fit a double exactly, so that a draw can be neither 0 nor 1."""

_KEY_BYTES = 16
"""128 bits: two requests of one run share a key with a probability that nobody will live to see."""


class Dice:
    """Deterministic draws for one purpose, for example "the answer to this body" or "the n-th sight of this body"."""

    __slots__ = ("_key",)

    def __init__(self, seed: int, *parts: bytes | str | int) -> None:
        """
        Mix a key from the seed and from what distinguishes this purpose.

        Args:
            seed: The server's seed, any integer.
            parts: What the draws depend on, in order; the same parts give the same draws.
        """
        mixed = blake2b(str(seed).encode(), digest_size=_KEY_BYTES)
        for part in parts:
            data = part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogatepass")
            mixed.update(len(data).to_bytes(8, "big"))
            mixed.update(data)
        self._key = mixed.digest()

    def uniform(self, label: str) -> float:
        """Return a number strictly between 0 and 1; the same label always gives the same number."""
        digest = blake2b(label.encode(), key=self._key, digest_size=8).digest()
        return ((int.from_bytes(digest, "big") >> 12) + 0.5) / _TWO_TO_52

    def between(self, label: str, low: int, high: int) -> int:
        """Return an integer from `low` to `high`, both included."""
        return low + int(self.uniform(label) * (high - low + 1))

    def data(self, label: str, size_bytes: int) -> bytes:
        """Return `size_bytes` pseudo-random bytes; a longer draw begins with the shorter one."""
        return shake_128(self._key + label.encode()).digest(size_bytes)

    def hex(self, label: str, digits: int = 24) -> str:
        """Return `digits` hexadecimal digits, as identifiers need them."""
        return self.data(label, (digits + 1) // 2).hex()[:digits]
