"""
How many messages may be leased beyond `pubsub.max_in_flight` while a backend is stopped.  Pure.

Messages for a stopped lane wait with their leases extended: a nack would cost each a delivery attempt.  If they counted
like all others, `max_in_flight` of them would stop everything else that the worker does.  So they do not count, up to a
bound: an idle message costs its bytes and a part of one request a minute.

Source: ADR 0016.
"""

from collections.abc import Iterable

import msgspec

MAX_EXTRA = 7
"""Bound, in multiples of `max_in_flight`, where others can be served meanwhile."""
MAX_EXTRA_ALONE = 1
"""The same where nothing is known to work: enough to find out whether there are others behind it."""


class RouteLoad(msgspec.Struct, frozen=True, kw_only=True):
    """What one route keeps, at one instant."""

    waiting: int
    """Messages that wait behind an open circuit or a paused window."""
    has_working_lane: bool
    """Some messages could start, as far as circuits and pauses are concerned."""


def extra_leases(loads: Iterable[RouteLoad], max_in_flight: int) -> int:
    """
    Return how many messages more than `max_in_flight` may be leased now.

    Args:
        loads: Of every route.
        max_in_flight: Messages that may be leased otherwise.
    """
    waiting, is_working = 0, False
    for load in loads:
        waiting += load.waiting
        is_working = is_working or load.has_working_lane
    return min(waiting, max_in_flight * (MAX_EXTRA if is_working else MAX_EXTRA_ALONE))
