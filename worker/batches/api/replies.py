"""The parts of requests and replies that several routes share: JSON, pages of a list, positions in it."""

from collections.abc import Sequence
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from worker.batches.api.errors import ApiError, body_too_large, wrong_type
from worker.batches.ids import is_id

MAX_JSON_BYTES = 1_000_000
"""Of a body that is no upload; the largest sensible one, sixteen pairs of metadata, has 10 kB."""
_encode = msgspec.json.Encoder().encode


def json_reply(value: Any) -> Response:
    """Return a reply with a JSON value."""
    return Response(_encode(value), headers={"content-type": "application/json"})


async def read_body(request: Request) -> bytes:
    """
    Return the whole body of a request that is no upload.

    Raises:
        ApiError: 413; it is larger than `MAX_JSON_BYTES`, and was not read further.
        ClientDisconnect: The client left.

    Cancellation: the rest is not read.
    """
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_JSON_BYTES:
            raise body_too_large(MAX_JSON_BYTES)
    return bytes(body)


def read_limit(request: Request, default: int, highest: int) -> int:
    """
    Return how many objects a page has: the query's `limit`, brought into its range.

    Raises:
        ApiError: 400; it is no integer.
    """
    text = request.query_params.get("limit")
    if text is None or not text:
        return default
    try:
        limit = int(text)
    except ValueError:
        raise wrong_type("limit", "an integer", text) from None
    return min(max(limit, 1), highest)


def read_after(request: Request, prefix: str) -> str | None:
    """
    Return the id after which a page begins; the object itself may be gone.

    Raises:
        ApiError: 400; it is no id of this API.
    """
    after = request.query_params.get("after")
    if after is None or not after:
        return None
    if not is_id(after, prefix):
        raise ApiError(
            400,
            "Invalid value for after: it must be the id of an object of this list.",
            code="invalid_value",
            param="after",
        )
    return after


def page_ends(objects: Sequence[Any]) -> tuple[str | None, str | None]:
    """Return the ids of the first and the last object of a page, `None` for an empty one."""
    return (objects[0].id, objects[-1].id) if objects else (None, None)
