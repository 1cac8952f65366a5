"""
The table of `benchmarks.mixed` against the clock: `inference-worker run`, the embedded Pub/Sub server, a real backend.

The backend is the simulated one, told to fail the requests whose body holds a mark; every failure goes over a real
connection.  A cell takes minutes, so only fresh traffic, the one failing message and the model that is away for ten
minutes are run so.
"""

import math
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.mixed_model import (
    RETRY_MAX_S,
    RETRY_MIN_S,
    TOKENS_PER_S,
    WINDOW,
    Kind,
    Message,
    Plan,
    Run,
    healthy_s,
)
from tests.chaos.server import ChaosServer
from tests.support.rig import Rig, WorkerProcess, rig
from worker.emulators.openai import SimOptions
from worker.policy.model import Fault

MARK = "always fails"
ANSWER_LIMIT_S = 240.0
"""How long after the last message answers are waited for: five deliveries take 150 s of backoff."""
LONGEST = 10_000
"""Tokens that the model would say; each request asks for as many as its time holds."""
PULL_S, LOOK_S = 0.5, 5.0


@dataclass(frozen=True, kw_only=True)
class RealRun:
    """What one run on processes gave."""

    run: Run
    most_calls: int
    """Of any one message."""
    extra_calls: int
    """Calls for healthy messages beyond one each."""


def behaviour(kind: Kind) -> dict[str, Any]:
    """Return what the simulated backend is told, so that marked requests fail in this way."""
    answer = kind.answer
    match = {"match": {"body": MARK}}
    if answer.fault is Fault.CONNECTION_LOST:
        return {"mode": "reset", **match}
    if answer.fault is Fault.TOTAL_TIMEOUT:
        return {"mode": "hang", **match}
    if answer.fault is Fault.STREAM_BROKEN:
        return {"mode": "stream", "break": "rst", "after_events": 4, **match}
    if answer.result.get("in_stream"):
        return {"mode": "stream", "break": "error_event", "after_events": 0, **match}
    return {
        "mode": "raw",
        "status": answer.status,
        "body": answer.body.decode(),
        "content_type": "application/json" if answer.body[:1] == b"{" else "text/html",
        "headers": dict(answer.headers),
        **match,
    }


def play_real(plan: Plan, kind: Kind, attempts: int) -> RealRun:
    """Run a plan; stops when every message has its answer, or four minutes after the last one was sent."""
    options = SimOptions.of(control_port=0, tokens_per_s=TOKENS_PER_S, answer_tokens=LONGEST)
    with (
        tempfile.TemporaryDirectory() as folder,
        ChaosServer() as server,
        rig(server.address, Path(folder), options, attempts=attempts, backoff=(RETRY_MIN_S, RETRY_MAX_S)) as built,
    ):
        built.sim.control({"behaviours": [behaviour(kind)]})
        return _Real(plan, kind, built).play()


class _Real:
    """One run."""

    def __init__(self, plan: Plan, kind: Kind, built: Rig) -> None:
        self._plan, self._kind, self._rig = plan, kind, built
        self._messages = [Message(send) for send in sorted(plan.sends, key=lambda send: send.at_s)]
        self._left = len(self._messages)
        self._run = Run(plan, self._messages)

    def play(self) -> RealRun:
        worker = self._start()
        self._began, self._began_unix = time.monotonic(), time.time()
        sending = threading.Thread(target=self._send)
        sending.start()
        is_away = math.isfinite(self._plan.fails_until_s)
        end_s = self._plan.sent_s + ANSWER_LIMIT_S + (self._plan.fails_until_s if is_away else 0.0)
        watched_s = self._plan.sent_s + 30.0
        while self._left and (now := self._now()) < end_s:
            self._take()
            if is_away and now >= self._plan.fails_until_s:
                self._rig.sim.control({"behaviours": []})
                is_away = False
            if now < watched_s and now >= len(self._run.windows) * LOOK_S:
                self._run.open_s = worker.metric("inference_worker_paused_seconds_total")
                self._run.windows.append(int(worker.metric("inference_worker_window_limit")))
        sending.join()
        self._run.ended_s = self._now()
        stats = self._rig.stats()
        failing_calls = stats["by_mode"].get(behaviour(self._kind)["mode"], 0)
        called = sum(m.status == 200 for m in self._messages)
        repeated = stats["bodies"]["most_repeated"].values()
        return RealRun(
            run=self._run,
            most_calls=max(repeated, default=1),
            extra_calls=max(0, stats["requests"] - failing_calls - called),
        )

    def _start(self) -> WorkerProcess:
        hangs = self._kind.answer.fault is Fault.TOTAL_TIMEOUT
        worker = self._rig.worker(
            backend__window__initial=WINDOW,
            backend__timeouts__total_s=self._kind.answer.seconds if hangs else 60,
            drain__grace_s=90,
        )
        worker.wait_started()
        return worker

    def _now(self) -> float:
        return time.monotonic() - self._began

    def _send(self) -> None:
        for index, message in enumerate(self._messages):
            time.sleep(max(0.0, message.send.at_s - self._now()))
            self._rig.admin.publisher.publish(self._rig.requests, self._request(index, message))

    def _request(self, index: int, message: Message) -> bytes:
        fails = message.send.fails
        body: dict[str, Any] = {
            "model": self._kind.model if fails else "m",
            "max_tokens": max(1, round(TOKENS_PER_S * healthy_s(message.send.name))),
            "messages": [{"role": "user", "content": f"{MARK if fails else 'hello'} {index}"}],
        }
        if self._kind.streamed:
            body["stream"] = True
        return msgspec.json.encode({"path": "/v1/chat/completions", "metadata": {"index": index}, "body": body})

    def _take(self) -> None:
        for answer in self._rig.admin.take_once(self._rig.response_subscription, PULL_S):
            content = msgspec.json.decode(answer.data)
            at_s = answer.publish_time.timestamp() - self._began_unix
            self._note(self._messages[content["metadata"]["index"]], content, answer.attributes, at_s)

    def _note(self, message: Message, content: Mapping[str, Any], attributes: Mapping[str, str], at_s: float) -> None:
        message.answers += 1
        if message.answered_at is not None:
            return
        self._left -= 1
        message.answered_at = at_s
        message.status = content["status_code"]
        message.error_class = attributes.get("error_class")
        message.nacks = int(attributes.get("delivery_attempt", "1")) - 1


HEADER = (
    "scenario", "kind", "share", "healthy answered", "their p50 s", "p99 s", "breaker not closed s", "window",
    "failing answered", "with", "after s, last", "calls most", "healthy: errors/calls/attempts",
)  # fmt: skip


def row_real(scenario: str, kind: str | None, share: int | None, result: RealRun) -> str:
    """Return a line of the published table; without a kind, of the healthy messages alone."""
    run = result.run
    answered = [m for m in run.failing if m.answered_at is not None]
    ends = Counter((m.status, m.error_class) for m in answered)
    healthy = run.healthy
    columns = (
        scenario,
        kind or "alone",
        "" if share is None else f"{share} %",
        f"{sum(m.status == 200 for m in healthy)}/{len(healthy)}",
        f"{run.healthy_wait_s(0.5):.2f}",
        f"{run.healthy_wait_s(0.99):.2f}",
        f"{run.open_s:.0f}",
        f"{run.window:.0f}",
        f"{len(answered)}/{len(run.failing)}",
        ", ".join(f"{count} {status} {name}" for (status, name), count in ends.most_common()) or "-",
        f"{max((m.waited_s for m in run.failing), default=0.0):.0f}",
        str(result.most_calls),
        f"{sum(m.status not in (200, None) for m in healthy)}/{result.extra_calls}/{sum(m.nacks for m in healthy)}",
    )
    return "| " + " | ".join(columns).replace("inf", "never") + " |"
