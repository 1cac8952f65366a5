"""Disasters of the worker's own process and machine: signals, clocks, disks, memory."""

import sys
from pathlib import Path

from tests.chaos.stage import QUICK, Stage
from tests.support.rig import WorkerProcess

CUT = {"drain__cut_longer_requests": "true", "drain__settle_s": 5}


def sigterm_storm(stage: Stage) -> None:
    """Pods of two seconds' grace come and go."""
    stage.rig.sim.control({"settings": {"latency": "uniform:0.2s,0.6s"}})
    stage.publish(1500)
    for _ in range(stage.count(20, 4)):
        worker = stage.worker(drain__grace_s=2, **CUT)
        worker.wait_started()
        stage.rig.collect(stage.rig.answers.count + 20, 10)
        worker.terminate()
        stage.demand("an exit with 0 within the grace", worker.wait(15) == 0)
    stage.worker()
    stage.rig.collect(limit_s=120)


def sigkills(stage: Stage) -> None:
    """Each pod is killed at a moment of its own: while it starts, pulls, generates, publishes or acks."""
    stage.rig.sim.control({"settings": {"latency": "uniform:0.1s,0.3s"}})
    stage.publish(3000, least=300)
    for _ in range(stage.count(50, 4)):
        worker = stage.worker()
        stage.rig.collect_during(stage.dice.uniform(0.2, 3.5))
        worker.kill()
    stage.worker()
    stage.rig.collect(limit_s=180)


_JUMPING = """
import time
real, began = time.time, time.monotonic()
def jumping():
    passed = time.monotonic() - began
    return real() + (0 if passed < 4 else 3600 if passed < 6 else -3600)
from worker.pipeline.attempt import Attempts
from worker.policy.engine import ErrorPolicy
from worker.pipeline.processor import Processor
from worker.telemetry.record import Recorder
for part in (Attempts, Processor, Recorder):
    part.__init__.__kwdefaults__["wall_clock"] = jumping
ErrorPolicy.__init__.__kwdefaults__["now_unix"] = jumping
from worker.__main__ import main
main()
"""


def clock_jump(stage: Stage) -> None:
    """
    The wall clock of the worker's own code jumps an hour ahead and two back; nothing but deadlines reads it.

    The clock of gRPC stays: the kernel's timers, on which it waits, know no such jump.
    """
    stage.rig.sim.control({"settings": {"latency": "300ms"}})
    stage.publish(1500, least=500)
    worker = stage.rig.worker(**QUICK, _command=[sys.executable, "-c", _JUMPING, "run"])
    worker.wait_started()
    stage.rig.collect(limit_s=90)


def full_disk(stage: Stage) -> None:
    """No line of the log can be written."""
    stage.publish(300, least=60)
    stage.rig.worker(**QUICK, _stderr="/dev/full")
    stage.rig.collect(limit_s=60)


def memory_ceiling(stage: Stage) -> None:
    """Bodies of a megabyte behind a slow backend: what is leased is bounded by bytes, whatever waits."""
    stage.rig.sim.control({"settings": {"latency": "200ms", "context_window": 10_000_000}})
    worker = stage.worker(pubsub__max_in_flight_bytes=8_000_000)
    worker.wait_started()
    idle = _memory_mb(worker, "VmRSS")
    stage.publish(300, least=100, text="x" * 1_000_000)
    stage.rig.collect(limit_s=120)
    stage.peak_rss_mb = _memory_mb(worker, "VmHWM")
    stage.demand(
        f"less than 150 MB over {idle:.0f} MB (it took {stage.peak_rss_mb:.0f})", stage.peak_rss_mb < idle + 150
    )


def _memory_mb(worker: WorkerProcess, name: str) -> float:
    with Path(f"/proc/{worker.process.pid}/status").open(encoding="ascii") as status:
        return int(next(line for line in status if line.startswith(name)).split()[1]) / 1024
