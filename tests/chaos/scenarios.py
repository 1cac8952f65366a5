"""
The catalogue of disasters: each breaks one thing under a running worker and mends it again.

A scenario is a function that publishes, breaks, mends and lets answers be collected; what is measured is the same for
all (`score`).  Times are given for the full form and are scaled down for the short one.
"""

import json
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from tests.rig import Rig, WorkerProcess, chat
from worker.localpubsub.faults import Faults

STUCK = "emulator 0.8.20 never gives back what it redelivered, after a nack under a retry policy, to a stream that then closes"
"""Shown with generated stubs alone: pull 100 messages by stream, nack them, close the stream a second later, and nothing
comes any more."""
QUICK = {"backend__window__initial": 16, "backend__window__max": 32, "pubsub__max_in_flight": 96}
CUT = {"drain__cut_longer_requests": "true", "drain__settle_s": 5}


@dataclass
class Stage:
    """What a scenario works with."""

    rig: Rig
    scale: float
    """1 for the full form."""
    faults: Faults | None
    """Only the embedded server has them."""
    dice: random.Random = field(default_factory=lambda: random.Random(7))
    mended_at: float | None = None
    """Monotonic seconds of the mending."""
    peak_rss_mb: float = 0.0

    def seconds(self, full: float, least: float = 1.0) -> float:
        """Return a time of the full form, scaled."""
        return max(least, full * self.scale)

    def count(self, full: int, least: int = 60) -> int:
        """Return a number of messages of the full form, scaled."""
        return max(least, round(full * self.scale))

    def worker(self, **settings: Any) -> WorkerProcess:
        return self.rig.worker(**{**QUICK, **settings})

    def mended(self) -> None:
        self.mended_at = time.monotonic()

    def backend(self, *behaviours: dict[str, Any], during_s: float) -> None:
        """Let the backend misbehave for a while."""
        self.rig.sim.control({"behaviours": list(behaviours)})
        self.rig.collect_during(during_s)
        self.rig.sim.control({"behaviours": []})
        self.mended()


@dataclass(frozen=True)
class Scenario:
    """One disaster and what it may cost."""

    name: str
    text: str
    run: Callable[[Stage], None]
    error_replies: bool = False
    """Whether answers may be errors (the message's own fault, or a class with a limit of tries)."""
    attempts: bool = False
    """Whether delivery attempts may be spent."""
    wasted: int | None = 0
    """Generations that may run twice; `None`: bounded by what was in flight per kill, told in the table."""
    duplicates: bool = False
    recovery_s: float = 5.5
    """Longest time to the first answer after the mending.  Quota is probed every 30 s: it seldom comes back sooner."""
    needs_faults: bool = False
    """Needs the embedded server's test interface."""
    emulator_flaw: str = ""
    """Why the emulator cannot show it: a fault of its own."""


def _steady(
    stage: Stage, full: int, make: Callable[[int], bytes] = chat, *, before: float = 0.3, least: int = 200
) -> None:
    """Publish, start a worker and let some of it be answered."""
    stage.rig.publish(stage.count(full, least), make)
    stage.worker()
    stage.rig.collect(round(stage.rig.sent * before), 60)


def outage(*behaviours: dict[str, Any], full_s: float = 60.0) -> Callable[[Stage], None]:
    """Return a scenario in which the backend fails for everybody."""

    def run(stage: Stage) -> None:
        stage.rig.sim.control({"settings": {"latency": "200ms"}})
        _steady(stage, 3000, least=400)
        stage.backend(*behaviours, during_s=stage.seconds(full_s, 5))
        stage.rig.collect(limit_s=90)

    return run


def some(behaviour: dict[str, Any], **settings: Any) -> Callable[[Stage], None]:
    """Return a scenario in which some answers are broken while the others are good."""

    def run(stage: Stage) -> None:
        stage.rig.sim.control({"behaviours": [{**behaviour, "probability": 0.1}]})
        stage.rig.publish(stage.count(500))
        stage.worker(**settings)
        stage.rig.collect(stage.rig.sent * 8 // 10, 90)
        stage.rig.sim.control({"behaviours": []})
        stage.mended()
        stage.rig.collect(limit_s=90)

    return run


def storm_of_429(retry_after: str | None) -> Callable[[Stage], None]:
    """Return a scenario in which the backend takes far less than the window would send."""

    def run(stage: Stage) -> None:
        settings: dict[str, Any] = {"latency": "100ms", "max_concurrency": 4, "overload": "reject"}
        settings["retry_after"] = retry_after
        stage.rig.sim.control({"settings": settings})
        stage.rig.publish(stage.count(1500))
        stage.worker()
        stage.rig.collect(limit_s=120)

    return run


def key_rotation(stage: Stage) -> None:
    key = stage.rig.folder / "key"
    key.write_text("old")
    stage.rig.sim.control({"settings": {"api_key": "old", "latency": "200ms"}})
    stage.rig.publish(stage.count(2000, 300))
    stage.worker(backend__api_key_file=key)
    stage.rig.collect(stage.rig.sent // 4, 60)
    stage.rig.sim.control({"settings": {"api_key": "new"}})
    stage.rig.collect_during(stage.seconds(30, 3))
    fresh = stage.rig.folder / "key.new"
    fresh.write_text("new")
    fresh.replace(key)
    stage.mended()
    stage.rig.collect(limit_s=90)


def hangs(stage: Stage) -> None:
    stage.rig.sim.control({"behaviours": [{"mode": "hang", "probability": 0.05, "count": stage.count(20, 5)}]})
    stage.rig.publish(stage.count(500))
    stage.worker(backend__timeouts__total_s=2)
    stage.rig.collect(limit_s=120)


def slow_first_byte(stage: Stage) -> None:
    stage.rig.sim.control({"behaviours": [{"mode": "slow_first_byte", "delay_s": "3s", "probability": 0.2}]})
    stage.rig.publish(stage.count(300))
    stage.worker(backend__timeouts__total_s=20)
    stage.rig.collect(limit_s=120)


def sigterm_storm(stage: Stage) -> None:
    stage.rig.sim.control({"settings": {"latency": "uniform:0.2s,0.6s"}})
    stage.rig.publish(stage.count(1500, 200))
    for _ in range(stage.count(20, 4)):
        worker = stage.worker(drain__grace_s=2, **CUT)
        worker.wait_started()
        stage.rig.collect(stage.rig.answers.count + 20, 10)
        worker.terminate()
        assert worker.wait(15) == 0
    stage.worker()
    stage.rig.collect(limit_s=120)


def sigkills(stage: Stage) -> None:
    stage.rig.sim.control({"settings": {"latency": "uniform:0.1s,0.3s"}})
    stage.rig.publish(stage.count(3000, 300))
    for _ in range(stage.count(50, 4)):
        worker = stage.worker()
        worker.wait_started()
        stage.rig.collect(stage.rig.answers.count + stage.dice.randrange(40), 5)
        worker.kill()
    stage.worker()
    stage.rig.collect(limit_s=150)


def broker_restart(stage: Stage) -> None:
    assert stage.faults is not None
    _steady(stage, 2000, before=0.2)
    for _ in range(stage.count(10, 3)):
        stage.faults.fail("StreamingPull", grpc.StatusCode.UNAVAILABLE, times=2)
        stage.faults.break_streams(grpc.StatusCode.UNAVAILABLE, subscription_path=stage.rig.request_subscription)
        stage.rig.collect(stage.rig.answers.count + 20, 10)
    stage.mended()
    stage.rig.collect(limit_s=100)


def broker_unreachable(stage: Stage) -> None:
    assert stage.faults is not None
    stage.rig.sim.control({"settings": {"latency": "200ms"}})
    _steady(stage, 1500, before=0.3)
    away = ("Publish", "Acknowledge", "ModifyAckDeadline", "StreamingPull")
    for method in away:
        stage.faults.fail(method, grpc.StatusCode.UNAVAILABLE)
    stage.faults.break_streams(grpc.StatusCode.UNAVAILABLE)
    stage.rig.collect_during(stage.seconds(90, 8))
    stage.faults.clear()
    stage.mended()
    stage.rig.collect(limit_s=150)


def acks_fail(stage: Stage) -> None:
    assert stage.faults is not None
    stage.faults.fail("Acknowledge", grpc.StatusCode.UNAVAILABLE, times=stage.count(60, 8))
    stage.rig.publish(stage.count(600))
    stage.worker()
    stage.rig.collect(limit_s=100)
    stage.rig.collect_rest(3)


def topic_deleted(stage: Stage) -> None:
    stage.rig.sim.control({"settings": {"latency": "200ms"}})
    _steady(stage, 1500, before=0.3)
    admin, rig = stage.rig.admin, stage.rig
    rig.collect_rest(0.3)
    admin.publisher.delete_topic(request={"topic": rig.responses})
    stage.rig.collect_during(stage.seconds(20, 3))
    admin.publisher.create_topic(request={"name": rig.responses})
    rig.admin.subscriber.delete_subscription(request={"subscription": rig.response_subscription})
    rig.response_subscription = admin.subscription(rig.responses, ack_deadline_seconds=60)
    stage.mended()
    rig.collect(limit_s=100)


def publish_refused(stage: Stage) -> None:
    assert stage.faults is not None
    stage.rig.sim.control({"settings": {"latency": "200ms"}})
    _steady(stage, 1500, before=0.3)
    stage.faults.fail("Publish", grpc.StatusCode.PERMISSION_DENIED)
    stage.rig.collect_during(stage.seconds(30, 3))
    stage.faults.clear("Publish")
    stage.mended()
    stage.rig.collect(limit_s=100)


def oversize(stage: Stage) -> None:
    stage.rig.sim.control({"behaviours": [{"mode": "oversize", "bytes": 11_000_000, "match": {"body": "large"}}]})
    stage.rig.publish(stage.count(100), lambda index: chat(index, "large" if index % 10 == 0 else "small"))
    stage.worker()
    stage.rig.collect(limit_s=90)


def poison(stage: Stage) -> None:
    stage.rig.sim.control({"behaviours": [{"mode": "reset", "match": {"body": "poison"}}]})
    stage.rig.publish(stage.count(400, 100), lambda index: chat(index, "poison" if index % 50 == 7 else "good"))
    stage.worker(pubsub__max_delivery_attempts=3)
    stage.rig.collect(limit_s=120)


def duplicates(stage: Stage) -> None:
    """Every ack is refused once after the broker has forgotten it: the same message comes again while it is known."""
    assert stage.faults is not None
    stage.rig.sim.control({"settings": {"latency": "100ms"}})
    stage.rig.publish(stage.count(300))
    stage.faults.fail("Acknowledge", grpc.StatusCode.INTERNAL)
    stage.worker()
    stage.rig.collect(limit_s=60)
    stage.faults.clear("Acknowledge")
    stage.mended()
    stage.rig.collect_rest(stage.seconds(65, 6))


_JUMPING = """
import time
real, began = time.time, time.monotonic()
def jumping():
    passed = time.monotonic() - began
    return real() + (0 if passed < 4 else 3600 if passed < 6 else -3600)
from worker.attempts import Attempts
from worker.policy.engine import ErrorPolicy
from worker.processor import Processor
from worker.record import Recorder
for part in (Attempts, Processor, Recorder):
    part.__init__.__kwdefaults__["wall_clock"] = jumping
ErrorPolicy.__init__.__kwdefaults__["now_unix"] = jumping
from worker.__main__ import main
main()
"""


def clock_jump(stage: Stage) -> None:
    """
    The wall clock of the worker's own code jumps an hour ahead and two back; nothing but deadlines reads it.

    The clock of gRPC and of the client library stays: the kernel's timers, on which they wait, know no such jump.
    """
    stage.rig.sim.control({"settings": {"latency": "300ms"}})
    stage.rig.publish(stage.count(1500, 500))
    worker = stage.rig.worker(**QUICK, _command=[sys.executable, "-c", _JUMPING, "run"])
    worker.wait_started()
    stage.rig.collect(limit_s=90)


def full_disk(stage: Stage) -> None:
    stage.rig.publish(stage.count(300))
    stage.rig.worker(**QUICK, _stderr="/dev/full")
    stage.rig.collect(limit_s=60)


def memory_ceiling(stage: Stage) -> None:
    """Bodies of a megabyte behind a slow backend: what is leased is bounded by bytes."""
    stage.rig.sim.control({"settings": {"latency": "200ms", "context_window": 10_000_000}})
    stage.rig.publish(stage.count(200, 60), lambda index: chat(index, "x" * 1_000_000))
    worker = stage.worker(pubsub__max_in_flight_bytes=20_000_000)
    stage.rig.collect(limit_s=120)
    with Path(f"/proc/{worker.process.pid}/status").open(encoding="ascii") as status:
        stage.peak_rss_mb = int(next(line for line in status if line.startswith("VmHWM")).split()[1]) / 1024
    assert stage.peak_rss_mb < 400, stage.peak_rss_mb


SCENARIOS = (
    Scenario("backend refuses connections", "60 s", outage({"mode": "refuse"})),
    Scenario("backend answers 500", "60 s", outage({"mode": "outage_5xx"})),
    Scenario("proxy answers HTML 502", "60 s", outage({"mode": "html_502"})),
    Scenario("model is loading, 503", "60 s", outage({"mode": "not_ready"})),
    Scenario("quota is used up", "60 s", outage({"mode": "quota"}), recovery_s=40),
    Scenario("empty 200, 10 %", "one in ten", some({"mode": "empty_200"}), attempts=True, error_replies=True),
    Scenario(
        "truncated JSON, 10 %",
        "one in ten",
        some({"mode": "truncated_json"}, backend__stream="never"),
        attempts=True,
        wasted=None,
    ),
    Scenario(
        "stream cut, 10 %",
        "in the middle of the text",
        some({"mode": "stream", "break": "rst", "after_events": 4}),
        attempts=True,
        wasted=None,
    ),
    Scenario(
        "stream stalls, 10 %",
        "comments only, no data",
        some({"mode": "stream", "break": "comments", "after_events": 3}, backend__timeouts__idle_s=1),
        attempts=True,
        wasted=None,
    ),
    Scenario("connection reset, 10 %", "one in ten", some({"mode": "reset"}), attempts=True),
    Scenario("429 storm", "room for 4, window 32", storm_of_429(None)),
    Scenario("429 storm, Retry-After", "the same with a hint of 1 s", storm_of_429("1s")),
    Scenario("key revoked, then rotated", "30 s", key_rotation),
    Scenario("requests hang", "5 % never answered", hangs, attempts=True, error_replies=True, wasted=None),
    Scenario("slow first byte", "20 % wait 3 s", slow_first_byte),
    Scenario("SIGTERM storm", "20 pods of 2 s grace", sigterm_storm, attempts=True, wasted=None, emulator_flaw=STUCK),
    Scenario("SIGKILL storm", "50 kills", sigkills, attempts=True, wasted=None, duplicates=True, emulator_flaw=STUCK),
    Scenario("broker drops the stream", "10 times", broker_restart, needs_faults=True, attempts=True, wasted=None),
    Scenario(
        "broker unreachable", "90 s", broker_unreachable, needs_faults=True, attempts=True, duplicates=True, wasted=None
    ),
    Scenario("acks fail", "60 times", acks_fail, needs_faults=True, attempts=True),
    Scenario("response topic deleted", "20 s", topic_deleted),
    Scenario("publish refused", "30 s", publish_refused, needs_faults=True),
    Scenario("oversize answers", "one in ten over 10 MB", oversize, error_replies=True),
    Scenario("poison messages", "2 % kill their connection", poison, attempts=True, error_replies=True),
    Scenario("duplicate deliveries", "no ack arrives", duplicates, needs_faults=True, attempts=True),
    Scenario("clock jumps", "+1 h, -2 h", clock_jump),
    Scenario("full disk for logs", "/dev/full", full_disk),
    Scenario("memory ceiling", "1 MB bodies", memory_ceiling),
)


@dataclass(frozen=True)
class Score:
    """What one disaster cost."""

    scenario: str
    broker: str
    sent: int
    answered: int
    lost: int
    duplicates: int
    malformed: int
    error_replies: int
    attempts_burned: int
    """Delivery attempts beyond the first, over all messages."""
    backend_calls: int
    wasted: int
    """Generations completed more than once for the same message."""
    recovery_s: float | None
    """From the mending to the first answer after it."""
    peak_rss_mb: float = 0.0

    def row(self) -> str:
        """Return the line of the table."""
        recovery = "-" if self.recovery_s is None else f"{self.recovery_s:.1f}"
        cells = (
            f"{self.scenario} ({self.broker})", self.sent, self.lost, self.duplicates, self.error_replies,
            self.attempts_burned, self.backend_calls, self.wasted, recovery,
        )  # fmt: skip
        return "| " + " | ".join(str(cell) for cell in cells) + " |"


HEADER = (
    "| scenario (broker) | sent | lost | duplicates | error answers | attempts burned | backend calls | "
    "generated twice | recovery s |\n|---|---|---|---|---|---|---|---|---|"
)


def score(scenario: Scenario, broker: str, stage: Stage) -> Score:
    """Measure after the run."""
    rig = stage.rig
    rig.collect_rest(1.0)
    answers, stats = rig.answers, rig.stats()
    burned = sum(times * (attempt - 1) for attempt, times in answers.attempts.items())
    after = [moment for moment in answers.times if stage.mended_at is not None and moment >= stage.mended_at]
    return Score(
        scenario=scenario.name,
        broker=broker,
        sent=rig.sent,
        answered=answers.count,
        lost=rig.sent - answers.count,
        duplicates=answers.duplicates,
        malformed=answers.malformed,
        error_replies=sum(count for status, count in answers.statuses.items() if status >= 400),
        attempts_burned=burned,
        backend_calls=stats["requests"],
        wasted=stats["generations"]["wasted"],
        recovery_s=min(after) - stage.mended_at if after and stage.mended_at is not None else None,
        peak_rss_mb=stage.peak_rss_mb,
    )


def play(scenario: Scenario, rig: Rig, broker: str, scale: float, faults: Faults | None) -> Score:
    """Run one scenario and return what it cost."""
    stage = Stage(rig, scale, faults)
    scenario.run(stage)
    return score(scenario, broker, stage)


def complaints(scenario: Scenario, result: Score) -> list[str]:
    """Return what the score has that the scenario does not allow."""
    found = []
    if result.lost:
        found.append(f"{result.lost} lost")
    if result.malformed:
        found.append(f"{result.malformed} malformed answers")
    if result.duplicates and not scenario.duplicates:
        found.append(f"{result.duplicates} duplicates")
    if result.error_replies and not scenario.error_replies:
        found.append(f"{result.error_replies} error answers")
    if result.attempts_burned and not scenario.attempts:
        found.append(f"{result.attempts_burned} delivery attempts burned")
    if scenario.wasted is not None and result.wasted > scenario.wasted:
        found.append(f"{result.wasted} generations wasted")
    if result.recovery_s is not None and result.recovery_s > scenario.recovery_s:
        found.append(f"{result.recovery_s:.1f} s to recover")
    return found


def as_json(results: list[Score]) -> str:
    """Return the scores for further use."""
    return json.dumps([vars(result) for result in results], indent=1)
