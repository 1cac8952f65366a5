"""
How many messages may be leased beyond `pubsub.max_in_flight` while a backend is stopped.  Pure.

Messages for a stopped lane wait with their leases extended: a nack would cost each a delivery attempt.  If they counted
like all others, `max_in_flight` of them would stop everything else that the worker does.  So they do not count, up to a
bound: an idle message costs its bytes and a part of one request a minute.  The same goes for messages that failed and
wait for their next attempt beside others that are served: a block of them at the head of a queue must not fill every
lease.

Source: ADR 0016.
"""

from collections.abc import Iterable

import msgspec

MAX_EXTRA = 7
"""Bound, in multiples of `max_in_flight`, where others can be served meanwhile."""
MAX_EXTRA_ALONE = 1
"""The same where nothing is known to work: enough to find out whether there are others behind it.  Allowed at once,
also before so many wait: a block of messages that fail may be just longer than what waits."""


class RouteLoad(msgspec.Struct, frozen=True, kw_only=True):
    """What one route keeps, at one instant."""

    waiting: int
    """Messages that wait behind an open circuit or a paused window, because they failed, or for a limit of their
    tenant."""
    has_working_lane: bool
    """Some messages could start, as far as circuits and pauses are concerned."""
    many_fail: bool = False
    """In a lane that works so many messages fail that more of them may stand in a block at the head of the queue."""


def extra_leases(loads: Iterable[RouteLoad], max_in_flight: int) -> int:
    """
    Return how many messages more than `max_in_flight` may be leased now.

    Args:
        loads: Of every route.
        max_in_flight: Messages that may be leased otherwise.
    """
    waiting, is_working, many_fail = 0, False, False
    for load in loads:
        waiting += load.waiting
        is_working = is_working or load.has_working_lane
        many_fail = many_fail or load.many_fail
    if is_working:
        return min(waiting + max_in_flight * many_fail, max_in_flight * MAX_EXTRA)
    return max_in_flight * MAX_EXTRA_ALONE if waiting else 0
