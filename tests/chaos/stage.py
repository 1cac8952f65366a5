"""
What a scenario works with: the rig, the scale, the broker it may break, and a notebook.

Times and numbers are given for the full form and scaled down for the short one.  What a scenario must bring about for
its score to mean anything (that messages did come twice, that the pull did pause) it `demand`s; what was not
shown is told like any other complaint.
"""

import random
import time
from dataclasses import dataclass, field
from typing import Any

from tests.chaos.server import ChaosServer
from tests.support.rig import Rig, WorkerProcess, chat

QUICK = {"backend__window__initial": 16, "backend__window__max": 32, "pubsub__max_in_flight": 96}


@dataclass
class Stage:
    """One run of a scenario."""

    rig: Rig
    scale: float
    """1 for the full form."""
    server: ChaosServer | None
    """The embedded server; `None` on Google's emulator."""
    dice: random.Random = field(default_factory=lambda: random.Random(7))
    broken_at: float | None = None
    """Monotonic seconds of the breaking."""
    mended_at: float | None = None
    """Monotonic seconds of the mending."""
    peak_rss_mb: float = 0.0
    unmet: list[str] = field(default_factory=list)
    """What was demanded and not shown."""

    @property
    def broker(self) -> ChaosServer:
        """The embedded server, in scenarios that run on no other."""
        assert self.server is not None
        return self.server

    def seconds(self, full: float, least: float = 1.0) -> float:
        """Return a time of the full form, scaled."""
        return max(least, full * self.scale)

    def count(self, full: int, least: int = 60) -> int:
        """Return a number of the full form, scaled."""
        return max(least, round(full * self.scale))

    def worker(self, **settings: Any) -> WorkerProcess:
        """Start a worker with a window that is soon found."""
        return self.rig.worker(**{**QUICK, **settings})

    def publish(self, full: int, least: int = 200, text: str = "hello") -> None:
        """Publish so many requests, scaled."""
        self.rig.publish(self.count(full, least), lambda index: chat(index, text))

    def answer_some(self, share: float, limit_s: float = 60.0) -> None:
        """Let this share of what was published be answered."""
        self.rig.collect(round(self.rig.sent * share), limit_s)

    def broken(self) -> None:
        """Note the moment of the breaking: the rate until now is what must come back."""
        self.broken_at = time.monotonic()

    def mended(self) -> None:
        """Note the moment of the mending."""
        self.mended_at = time.monotonic()

    def backend(self, behaviour: dict[str, Any], *, during_s: float) -> None:
        """Let the backend misbehave for a while."""
        self.broken()
        self.rig.sim.control({"behaviours": [behaviour]})
        self.rig.collect_during(during_s)
        self.rig.sim.control({"behaviours": []})
        self.mended()

    def demand(self, what: str, met: object) -> None:
        """Complain unless something that the scenario is about has happened."""
        if not met:
            self.unmet.append(f"not shown: {what}")
