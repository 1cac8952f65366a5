"""
Text of bounded length out of anything: what the envelope, the logs and the rules may hold of a backend's words.

Bounds are in bytes of UTF-8, since that is what a message on a topic is billed and limited in.
"""


def bounded(text: str, limit_bytes: int) -> str:
    """
    Return the beginning of a text, at most `limit_bytes` long as UTF-8, free of lone surrogates.

    A character is never cut; a lone surrogate, which UTF-8 cannot carry, becomes `?`.
    """
    data = text[:limit_bytes].encode("utf-8", "replace")
    return data[:limit_bytes].decode("utf-8", "ignore")


def bounded_bytes(data: bytes, limit_bytes: int) -> str:
    """Return the beginning of what may or may not be UTF-8 as text; what is not becomes U+FFFD."""
    return bounded(data[:limit_bytes].decode("utf-8", "replace"), limit_bytes)
