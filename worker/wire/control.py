"""
Control messages: what an operator or a program asks of all workers, on a topic of its own.

One kind so far, `{"cancel": {"message_ids": ["…"], "attributes": {"run_id": "…"}}}`: no answer is wanted any more for
the requests with one of these ids, and for those that have all of these attributes and were published before.  With
`"let_running_finish": true` in it, attempts that run are not cut.
"""

from collections.abc import Mapping

import msgspec

from worker.errors import MessageError

MAX_IDS = 10_000
"""Ids in one control message."""


class _Cancel(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    message_ids: list[str] = []
    attributes: dict[str, str] = {}
    let_running_finish: bool = False


class _Control(msgspec.Struct, forbid_unknown_fields=True):
    cancel: _Cancel


class CancelRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Which requests are cancelled."""

    message_ids: frozenset[str] = frozenset()
    attributes: Mapping[str, str] = {}
    """All of them must be a request's; empty: none is meant by its attributes."""
    let_running_finish: bool = False
    """An attempt that runs goes on; everything else of the request is cancelled."""
    published_at: float = 0.0
    """Unix seconds; requests that were published later are not meant by their attributes."""


_decode = msgspec.json.Decoder(_Control).decode


def decode_control(data: bytes, published_at: float) -> CancelRequest:
    """
    Return what a control message asks for.

    Raises:
        MessageError: It is none, or cancels nothing; permanent.
    """
    try:
        cancel = _decode(data).cancel
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MessageError(f"the control message cannot be read: {error}") from None
    if not cancel.message_ids and not cancel.attributes:
        raise MessageError("the control message cancels nothing: it has neither message_ids nor attributes")
    if len(cancel.message_ids) > MAX_IDS:
        raise MessageError(f"the control message has more than {MAX_IDS:,} ids")
    return CancelRequest(
        message_ids=frozenset(cancel.message_ids),
        attributes=cancel.attributes,
        let_running_finish=cancel.let_running_finish,
        published_at=published_at,
    )


def encode_cancel(message_ids: list[str], attributes: Mapping[str, str], *, let_running_finish: bool = False) -> bytes:
    """Return the data of a control message that cancels requests; see `CancelRequest`."""
    return msgspec.json.encode(_Control(_Cancel(message_ids, dict(attributes), let_running_finish)))
