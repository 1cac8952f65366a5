"""
A worker among faults for half an hour: `python -m tests.chaos.soak [--minutes 30] [--plot docs/img/soak.svg]`.

One worker works through a steady stream of requests while the backend and the broker break and recover in turns, each
fault of `FAULTS` for `BROKEN_S` and a pause of `MENDED_S` after it.  Resident memory, descriptors, threads and tasks are
read every `SAMPLE_S`.  They must be flat: after the first third, in which caches and pools fill, the last sixth may
exceed the sixth in the middle by no more than `Bounds` allows.  Everything must be answered, once.

The first fault of each kind is over when the comparison begins, so each costs memory before it, not after.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from tests.chaos.server import ChaosServer
from tests.chaos.stage import QUICK
from tests.support.rig import Rig, rig

RATE = 40
"""Requests a second."""
BROKEN_S = 10.0
MENDED_S = 8.0
SAMPLE_S = 5.0
PUBLISHING_REFUSED = "publishing refused"
"""The server cannot tell the worker's publishing from ours: no request is published meanwhile."""

_COUNTING_TASKS = """
import asyncio, pathlib, sys, threading, time
def count(path):
    alive = asyncio.tasks._scheduled_tasks if hasattr(asyncio.tasks, "_scheduled_tasks") else asyncio.tasks._all_tasks
    while True:
        try:
            path.write_text(str(len(alive)))
        except RuntimeError:  # the set changed while it was counted
            pass
        time.sleep(1)
threading.Thread(target=count, args=(pathlib.Path(sys.argv.pop(1)),), daemon=True).start()
from worker.__main__ import main
main()
"""


@dataclass(frozen=True)
class Bounds:
    """By how much the last sixth may exceed the middle one, in medians."""

    rss_mb: float = 3.0
    descriptors: float = 8
    threads: float = 2
    tasks: float = 40


@dataclass(frozen=True)
class Sample:
    """The process at one moment."""

    at_s: float
    """Since the first sample."""
    rss_mb: float
    descriptors: int
    threads: int
    tasks: int
    answered: int


def _backend(behaviour: dict[str, Any]) -> Callable[[Rig, ChaosServer], None]:
    def breaks(rig: Rig, _: ChaosServer) -> None:
        rig.sim.control({"behaviours": [behaviour]})

    return breaks


def _drop_streams(_: Rig, server: ChaosServer) -> None:
    server.faults.fail("StreamingPull", grpc.StatusCode.UNAVAILABLE, times=2)
    server.faults.break_streams(grpc.StatusCode.UNAVAILABLE)


def _refuse(method: str, code: grpc.StatusCode) -> Callable[[Rig, ChaosServer], None]:
    return lambda _, server: server.faults.fail(method, code)


FAULTS: Sequence[tuple[str, Callable[[Rig, ChaosServer], None]]] = (
    ("connections refused", _backend({"mode": "refuse"})),
    ("500", _backend({"mode": "outage_5xx"})),
    ("HTML 502", _backend({"mode": "html_502"})),
    ("model is loading", _backend({"mode": "not_ready"})),
    ("10 % reset", _backend({"mode": "reset", "probability": 0.1})),
    ("10 % empty 200", _backend({"mode": "empty_200", "probability": 0.1})),
    ("10 % truncated JSON", _backend({"mode": "truncated_json", "probability": 0.1})),
    ("10 % cut streams", _backend({"mode": "stream", "break": "rst", "after_events": 4, "probability": 0.1})),
    ("streams dropped by the broker", _drop_streams),
    ("acks fail", _refuse("Acknowledge", grpc.StatusCode.UNAVAILABLE)),
    (PUBLISHING_REFUSED, _refuse("Publish", grpc.StatusCode.UNAVAILABLE)),
)


class Soak:
    """One run; samples are taken while requests are published and answers collected."""

    def __init__(
        self,
        rig: Rig,
        server: ChaosServer,
        folder: Path,
        *,
        broken_s: float = BROKEN_S,
        mended_s: float = MENDED_S,
    ) -> None:
        self._rig = rig
        self._server = server
        self._broken_s = broken_s
        self._mended_s = mended_s
        self._tasks_file = folder / "tasks"
        self._tasks_file.write_text("0", "ascii")
        rig.sim.control({"settings": {"latency": "200ms"}})
        command = [sys.executable, "-c", _COUNTING_TASKS, str(self._tasks_file), "run"]
        self._worker = rig.worker(**QUICK, backend__stream="auto", _command=command)
        self._worker.wait_started()
        self._started = time.monotonic()
        self._published_until = self._started
        self.samples: list[Sample] = []

    def spend(self, seconds: float, *, publishes: bool = True) -> None:
        """Publish at the rate, collect, and sample, for a while."""
        end = time.monotonic() + seconds
        while (now := time.monotonic()) < end:
            due = int((now - self._published_until) * RATE)
            if due:
                if publishes:
                    self._rig.publish(due)
                self._published_until += due / RATE
            self._rig.collect_during(0.5)
            if not self.samples or now - self._started - self.samples[-1].at_s >= SAMPLE_S:
                self.samples.append(self._sample())

    def run(self, seconds: float) -> None:
        """Break and mend in turns until the time is over, then wait for every answer."""
        while time.monotonic() - self._started < seconds:
            for name, breaks in FAULTS:
                print(f"{self.samples[-1] if self.samples else ''} next: {name}", file=sys.stderr, flush=True)
                breaks(self._rig, self._server)
                self.spend(self._broken_s, publishes=name != PUBLISHING_REFUSED)
                self._rig.sim.control({"behaviours": []})
                self._server.faults.clear()
                self.spend(self._mended_s)
                if time.monotonic() - self._started >= seconds:
                    break
        self._rig.collect(limit_s=120)
        self._rig.collect_rest(3)

    def _sample(self) -> Sample:
        proc = Path(f"/proc/{self._worker.process.pid}")
        status = dict(line.split(":", 1) for line in (proc / "status").read_text("ascii").splitlines())
        return Sample(
            at_s=time.monotonic() - self._started,
            rss_mb=int(status["VmRSS"].split()[0]) / 1024,
            descriptors=len(list((proc / "fd").iterdir())),
            threads=int(status["Threads"]),
            tasks=int(self._tasks_file.read_text("ascii") or 0),
            answered=self._rig.answers.count,
        )


def growth(samples: Sequence[Sample], name: str) -> float:
    """Return by how much the median of the last sixth exceeds that of the sixth in the middle."""
    values = [getattr(sample, name) for sample in samples]
    sixth = max(1, len(values) // 6)
    middle = len(values) // 2
    return statistics.median(values[-sixth:]) - statistics.median(values[middle - sixth // 2 : middle + sixth // 2 + 1])


def complaints(samples: Sequence[Sample], bounds: Bounds) -> list[str]:
    """Return what grew by more than the bounds allow."""
    found = []
    for name in ("rss_mb", "descriptors", "threads", "tasks"):
        grown, allowed = growth(samples, name), getattr(bounds, name)
        if grown > allowed:
            found.append(f"{name} grew by {grown:g}, allowed are {allowed:g}")
    return found


def plot(samples: Sequence[Sample]) -> str:
    """Return the curves as an SVG picture: one panel for each quantity, minutes below."""
    width, height, left, gap = 760, 110, 64, 26
    panels = (("rss_mb", "RSS, MB"), ("descriptors", "descriptors"), ("threads", "threads"), ("tasks", "tasks"))
    end = max(samples[-1].at_s, 1.0)
    parts = []
    for number, (name, label) in enumerate(panels):
        values = [getattr(sample, name) for sample in samples]
        top, ceiling = number * (height + gap) + 10, max(*values, 1) * 1.1
        points = " ".join(
            f"{left + sample.at_s / end * (width - left - 10):.1f},{top + height - value / ceiling * height:.1f}"
            for sample, value in zip(samples, values, strict=True)
        )
        parts.append(
            f'<path d="M{left},{top} V{top + height} H{width - 10}" fill="none" stroke="#888"/>'
            f'<polyline points="{points}" fill="none" stroke="#1f6feb" stroke-width="1.5"/>'
            f'<text x="{left}" y="{top - 5}" font-weight="600">{label}</text>'
            f'<text x="{left - 6}" y="{top + 10}" text-anchor="end">{ceiling:.0f}</text>'
            f'<text x="{left - 6}" y="{top + height}" text-anchor="end">0</text>'
        )
    foot = len(panels) * (height + gap) + 4
    parts.append(f'<text x="{left}" y="{foot}">0</text>')
    parts.append(f'<text x="{width - 10}" y="{foot}" text-anchor="end">{end / 60:.0f} min</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 -12 {width} {foot + 22}" font-family="sans-serif" '
        f'font-size="12"><rect y="-12" width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


def main() -> int:
    """Run the soak, print what it took, return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.soak")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--plot", type=Path, help="write the curves to this SVG file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as text, ChaosServer() as server, rig(server.address, Path(text)) as built:
        soak = Soak(built, server, Path(text))
        soak.run(options.minutes * 60)
        answers, samples = built.answers, soak.samples
        if options.plot is not None:
            options.plot.write_text(plot(samples), "utf-8")
        found = complaints(samples, Bounds())
        if answers.count < built.sent:
            found.append(f"{built.sent - answers.count} of {built.sent} without an answer")
        if answers.malformed:
            found.append(f"{answers.malformed} malformed answers")
        print(
            f"{built.sent} requests, {answers.count} answered, {answers.duplicates} duplicates, "
            f"statuses {dict(answers.statuses)}"
        )
    for name in ("rss_mb", "descriptors", "threads", "tasks"):
        values = [getattr(sample, name) for sample in samples]
        middle = values[len(values) // 2]
        print(f"{name}: first {values[0]:.0f}, middle {middle:.0f}, last {values[-1]:.0f}, most {max(values):.0f}, "
              f"growth of the second half {growth(samples, name):+.1f}")  # fmt: skip
    for complaint in found:
        print(f"NOT ALLOWED: {complaint}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
