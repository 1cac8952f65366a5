"""
Images, generated and edited: the JSON that OpenAI answers, around a PNG of one colour.

Pure, like `answers`.  An edit does not look at the images that it is given.
"""

import struct
import zlib
from base64 import b64encode
from typing import Any

from worker.emulators.openai.answers import Identity
from worker.emulators.openai.generation import subject
from worker.emulators.openai.seeded import Draws, count_tokens
from worker.emulators.openai.validation import Call

_DEFAULT_SIZE = "1024x1024"
_PIXELS_PER_TOKEN = 3_855
"""So that an image of 1024 x 1024 has 272 tokens, as OpenAI counts it in low quality;
https://platform.openai.com/docs/guides/image-generation#cost-and-latency."""


def image_body(call: Call, seed: int, identity: Identity) -> dict[str, Any]:
    """Return images: PNGs of the size that was asked for, each of one colour that depends on request and seed."""
    size = str(call.body.get("size") or "auto").replace("auto", _DEFAULT_SIZE)
    width, height = map(int, size.split("x"))
    draws = Draws(seed, call.model, subject(call.body))
    images = [png(width, height, draws.data(f"image{place}", 3)) for place in range(call.n)]
    text = count_tokens(call.body["prompt"])
    generated = call.n * (width * height // _PIXELS_PER_TOKEN)
    return {
        "created": identity.created,
        "data": [{"b64_json": b64encode(image).decode()} for image in images],
        "output_format": "png",
        "quality": "low",
        "size": size,
        "usage": {
            "input_tokens": call.prompt_tokens,
            "input_tokens_details": {"text_tokens": text, "image_tokens": call.prompt_tokens - text},
            "output_tokens": generated,
            "total_tokens": call.prompt_tokens + generated,
        },
    }


def png(width: int, height: int, colour: bytes) -> bytes:
    """
    Return an image of one colour, a few hundred bytes long.

    Args:
        width: Pixels.
        height: Pixels.
        colour: Red, green and blue.

    Source: https://www.w3.org/TR/png-3/, with a palette of one colour and a bit for each pixel.
    """

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 3, 0, 0, 0)
    rows = zlib.compress(bytes((1 + (width + 7) // 8) * height))
    chunks = [(b"IHDR", header), (b"PLTE", colour), (b"IDAT", rows), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(name, data) for name, data in chunks)
