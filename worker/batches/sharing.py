"""
How many lines of which batch are published next; pure.

Tenants get equal shares of the lines that are outstanding, and each tenant's batches equal shares of the tenant's: the
next lines always go to the one that has the fewest.  A batch that has none outstanding gets a few even when there is no
room, so that a small one does not wait until a large one has made room.
"""

import heapq
from collections import defaultdict
from collections.abc import Iterable

import msgspec

STEP = 25
"""Lines that are given away at a time: fine enough for fairness, coarse enough to be quick."""
FIRST_LINES = 20
"""Beyond the limit, for each batch that has none outstanding."""


class Demand(msgspec.Struct, frozen=True, kw_only=True):
    """A batch with lines to publish."""

    batch_id: str
    tenant: str
    outstanding: int
    """Lines that are published and have no result."""
    remaining: int
    """Lines that are not published."""


def share(demands: Iterable[Demand], room: int, *, extra: int) -> dict[str, int]:
    """
    Return how many lines each batch may publish now; those that may publish none are left out.

    Args:
        demands: Batches that are in progress, oldest first.
        room: Lines that may be published, all together; may be negative.
        extra: Lines beyond it for batches that have none outstanding.
    """
    given: dict[str, int] = defaultdict(int)
    wanted = {demand.batch_id: demand for demand in demands if demand.remaining > 0}
    of_tenant: dict[str, int] = defaultdict(int)
    heaps: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
    for age, demand in enumerate(wanted.values()):
        of_tenant[demand.tenant] += demand.outstanding
        heapq.heappush(heaps[demand.tenant], (demand.outstanding, age, demand.batch_id))
    tenants = [(count, tenant) for tenant, count in of_tenant.items()]
    heapq.heapify(tenants)
    room = max(0, room)
    while room and tenants:
        count, tenant = heapq.heappop(tenants)
        outstanding, age, batch_id = heapq.heappop(heaps[tenant])
        lines = min(STEP, room, wanted[batch_id].remaining - given[batch_id])
        given[batch_id] += lines
        room -= lines
        if wanted[batch_id].remaining > given[batch_id]:
            heapq.heappush(heaps[tenant], (outstanding + lines, age, batch_id))
        if heaps[tenant]:
            heapq.heappush(tenants, (count + lines, tenant))
    for batch_id, demand in wanted.items():
        if extra <= 0:
            break
        if demand.outstanding == 0 and given[batch_id] == 0:
            given[batch_id] = min(FIRST_LINES, demand.remaining, extra)
            extra -= given[batch_id]
    return {batch_id: lines for batch_id, lines in given.items() if lines}
