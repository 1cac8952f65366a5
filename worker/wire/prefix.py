"""
What the prompts of several requests have in common: how they begin.

Engines keep what they have computed of a prompt, and reuse it for one that begins alike.  The beginning is compared in
the bytes of the request, not in tokens: equal bytes give equal tokens, and programs that send many requests about the
same text write it in the same way.
"""

from hashlib import blake2b

from worker.wire.body import RequestBody

_PROMPTS = ("messages", "prompt", "input")
"""Where the prompt stands in a chat, a completion, and a response or an embedding."""


def prompt_prefix(body: RequestBody, length: int) -> int | None:
    """
    Return a number that is the same for bodies whose prompts begin alike; `None` for a prompt that is shorter.

    Tools count as well, since templates write them in front of the messages.

    Args:
        body: Of the request.
        length: Bytes of the prompt's JSON that have to be alike.
    """
    prompt = next((raw for raw in map(body.raw, _PROMPTS) if raw), b"")
    if len(prompt) < length:
        return None
    digest = blake2b(prompt[:length], digest_size=8)
    digest.update(body.raw("tools"))
    return int.from_bytes(digest.digest())
