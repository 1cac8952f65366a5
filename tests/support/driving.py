"""A window under load, for its tests."""

from tests.support.fakeclock import FakeClock
from worker.flow.window.adaptive import AdaptiveWindow, Outcome, Ticket


class Driver:
    """A window under a load without end, one flight after another."""

    def __init__(self, clock: FakeClock, initial: int = 8, maximum: int = 64) -> None:
        self.clock = clock
        self.window = AdaptiveWindow(initial, 1, maximum, now=clock.now)

    def start(self, count: int | None = None, *, streamed: bool = False) -> list[Ticket]:
        """Start so many, or as many as there is room for."""
        tickets = []
        while self.window.has_room() if count is None else len(tickets) < count:
            tickets.append(self.window.start(streamed=streamed))
        return tickets

    def serve(self, tickets: list[Ticket], seconds: float, work: float | None = None) -> None:
        """Answer all of them after this time, starting another for each as a worker does."""
        self.clock.advance(seconds)
        for ticket in tickets:
            self.window.finish(ticket, Outcome.OK, work=work)

    def flights(self, count: int, seconds: float, work: float | None = None) -> list[int]:
        """Run so many full flights; return the limits after each."""
        limits = []
        for _ in range(count):
            self.serve(self.start(), seconds, work)
            self.clock.advance(1.0)  # growth takes effect
            limits.append(self.window.limit)
        return limits

    def set_limit(self, limit: int) -> None:
        """Put the window at a limit, whatever it has learned."""
        self.window._limit.set(limit)

    def refuse(self, ticket: Ticket, pause_s: float | None = None) -> bool:
        """Refuse it; return whether that was news."""
        is_fresh = self.window.is_refusal_fresh(ticket)
        self.window.finish(ticket, Outcome.OVERLOAD, pause_s=pause_s)
        return is_fresh
