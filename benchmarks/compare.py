"""
Workers side by side: the same broker, the same backend, the same disasters.

A candidate is any program that takes requests from a Pub/Sub subscription and publishes answers to a topic; a YAML file
says how it is started and what its messages look like (`benchmarks/candidates/`, docs/comparison.md).  Each disaster
has a broker and a backend of its own: the embedded Pub/Sub server and the simulated backend.  What is counted is
counted at these two and on the response topic, never by the candidate.

    python -m benchmarks.compare [CANDIDATE.yaml ...] [--only TEXT] [--scale 1]

Scale 1 is the full form, about half an hour a candidate.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from benchmarks.pipeline import cpu_s
from tests.support.admin import Admin
from worker.emulators.openai import SimBackendThread, SimOptions
from worker.emulators.pubsub import LocalPubSubThread

OUTAGE_S = 60.0
LONG_OUTAGE_S = 180.0
GRACE_S = 30.0
"""Between SIGTERM and SIGKILL, as Kubernetes has it by default."""
QUIET_S = 90.0
"""So long without an answer ends a disaster: what has none by then counts as lost.  Longer than any request."""
ACK_DEADLINE_S = 10
"""Of the request subscription, Pub/Sub's default."""
DELIVERIES = 5
"""Of the dead-letter policy, as Pub/Sub has it by default: a message that comes more often is given up, and lost unless
it was answered."""
BIG_ANSWER_BYTES = 11_000_000


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """How a worker is started and talked to; texts may hold `{python} {project} {broker} {subscription} {topic}
    {backend} {folder} {here}`, the last being the folder of the description."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    """Written into `{folder}` before the start, by name."""
    request: Any
    """The request message as JSON; the text `{index}` becomes the request's number, `{body}` the backend's body."""
    attributes: Mapping[str, str] = field(default_factory=dict)
    """Of the request message; `{index}` likewise."""
    answer: Mapping[str, str]
    """Where the answer has `index`, `status` and `body`: paths that begin with `data.` or `attributes.`.  A candidate
    without statuses of its own leaves `status` out: then a body that is a JSON object without `error` is good."""
    here: Path = Path()

    @staticmethod
    def load(path: Path) -> "Candidate":
        """
        Read a description.

        Raises:
            TypeError: A key is missing or not known.
            OSError, yaml.YAMLError: It cannot be read.
        """
        return Candidate(**yaml.safe_load(path.read_text("utf-8")), here=path.parent.resolve())

    def message(self, index: int, body: Any) -> tuple[bytes, dict[str, str]]:
        """Return the data and the attributes of a request."""
        data = json.dumps(_filled(self.request, {"{index}": index, "{body}": body})).encode()
        return data, {key: str(_filled(text, {"{index}": index})) for key, text in self.attributes.items()}


def _filled(template: Any, values: Mapping[str, Any]) -> Any:
    if isinstance(template, dict):
        return {key: _filled(value, values) for key, value in template.items()}
    if isinstance(template, list):
        return [_filled(value, values) for value in template]
    return values.get(template, template) if isinstance(template, str) else template


def find(message: Mapping[str, Any], path: str) -> Any:
    """Return what stands at a dotted path; `None` where there is nothing."""
    value: Any = message
    for key in path.split("."):
        if not isinstance(value, Mapping) or key not in value:
            return None
        value = value[key]
    return value


@dataclass
class Result:
    """What one disaster cost one candidate."""

    candidate: str
    disaster: str
    sent: int = 0
    answered: int = 0
    errors: int = 0
    """Requests whose first answer is an error."""
    malformed: int = 0
    """Messages on the response topic that no request can be found for."""
    duplicates: int = 0
    deliveries: int = 0
    """By the broker's count, of all messages together."""
    calls: int = 0
    """Requests that the backend received."""
    cpu_ms: float = 0.0
    """Of the candidate's processes that were alive at the end, for each request."""
    seconds: float = 0.0
    """From the start of the candidate to the last answer."""

    HEADER = (
        "| candidate | disaster | sent | answered | error answers | lost | duplicates | deliveries | backend calls | "
        "CPU ms/request | requests/s |\n|---|---|---|---|---|---|---|---|---|---|---|"
    )

    def row(self) -> str:
        """Return the line of the table."""
        rate = self.answered / self.seconds if self.seconds else 0.0
        cells = (
            self.candidate, self.disaster, self.sent, self.answered, self.errors, self.sent - self.answered,
            self.duplicates + self.malformed, self.deliveries, self.calls, f"{self.cpu_ms:.2f}", f"{rate:,.1f}",
        )  # fmt: skip
        return "| " + " | ".join(str(cell) for cell in cells) + " |"


class Stage:
    """One candidate in one disaster."""

    def __init__(self, candidate: Candidate, folder: Path, scale: float) -> None:
        self.candidate = candidate
        self.scale = scale
        self.broker = LocalPubSubThread().__enter__()
        self.sim = SimBackendThread(SimOptions.of(control_port=0)).__enter__()
        self._admin = Admin(self.broker.address)
        self._requests, self._responses = self._admin.topic("requests"), self._admin.topic("responses")
        self._subscription = self._admin.subscription(
            self._requests,
            ack_deadline_seconds=ACK_DEADLINE_S,
            backoff=(1, 10),
            dead_letter=(self._admin.topic("given-up"), DELIVERIES),
        )
        self._collected = self._admin.subscription(self._responses)
        self._folder = folder
        self._processes: list[subprocess.Popen[bytes]] = []
        self._answers: dict[int, list[bool]] = defaultdict(list)
        self._seen: set[str] = set()
        self._malformed = 0
        self.sent = 0
        self._last_at = self._started_at = time.monotonic()

    def close(self) -> None:
        """End everything that was started."""
        for process in self._processes:
            if process.poll() is None:
                process.kill()
                process.wait()
        self._admin.close()
        self.sim.__exit__(None, None, None)
        self.broker.__exit__(None, None, None)

    def publish(self, full: int, least: int = 40) -> None:
        """Publish so many requests, scaled."""
        futures = []
        for _ in range(max(least, round(full * self.scale))):
            content = [{"role": "user", "content": f"request {self.sent} " + "x" * 800}]
            data, attributes = self.candidate.message(self.sent, {"model": "m", "messages": content})
            futures.append(self._admin.publisher.publish(self._requests, data, **attributes))
            self.sent += 1
        for future in futures:
            future.result(60)

    def start(self) -> subprocess.Popen[bytes]:
        """Start the candidate."""
        values = {
            "python": sys.executable,
            "project": self._admin.project,
            "broker": self.broker.address,
            "subscription": self._subscription,
            "topic": self._responses,
            "backend": self.sim.base_url,
            "folder": str(self._folder),
            "here": str(self.candidate.here),
        }
        for name, text in self.candidate.files.items():
            (self._folder / name).write_text(text.format(**values), "utf-8")
        environment = {key: text.format(**values) for key, text in self.candidate.environment.items()}
        with (self._folder / "candidate.log").open("ab") as log:
            process = subprocess.Popen(
                [word.format(**values) for word in self.candidate.command],
                stdout=log,
                stderr=log,
                env={**os.environ, "PUBSUB_EMULATOR_HOST": self.broker.address, **environment},
            )
        self._processes.append(process)
        return process

    def stop(self, process: subprocess.Popen[bytes]) -> None:
        """Do what Kubernetes does: SIGTERM, and SIGKILL after the grace."""
        process.send_signal(signal.SIGTERM)
        until = time.monotonic() + max(5.0, GRACE_S * self.scale)
        while process.poll() is None and time.monotonic() < until:
            self.collect(0.2)
        if process.poll() is None:
            process.kill()
            process.wait()

    def collect(self, seconds: float) -> None:
        """Take answers for a while."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            for message in self._admin.take_once(self._collected, min(1.0, max(0.05, left))):
                self._take(message.message_id, message.data, dict(message.attributes))

    def collect_until(self, share: float) -> None:
        """Take answers until this share of the requests has one, or none has come for `QUIET_S`."""
        self._last_at = time.monotonic()
        while len(self._answers) < self.sent * share:
            if time.monotonic() - self._last_at > max(45.0, QUIET_S * self.scale):
                break
            self.collect(0.5)

    def backend(self, behaviour: dict[str, Any], full_s: float) -> None:
        """Let the backend misbehave for a while."""
        self.sim.control({"behaviours": [behaviour]})
        self.collect(max(3.0, full_s * self.scale))
        self.sim.control({"behaviours": []})

    def result(self, disaster: str) -> Result:
        """Count."""
        self.collect(2.0)
        alive = [process for process in self._processes if process.poll() is None]
        return Result(
            candidate=self.candidate.name,
            disaster=disaster,
            sent=self.sent,
            answered=len(self._answers),
            errors=sum(not answers[0] for answers in self._answers.values()),
            malformed=self._malformed,
            duplicates=sum(len(answers) - 1 for answers in self._answers.values()),
            deliveries=self.broker.faults.inspect(self._subscription).delivered_count,
            calls=self.sim.snapshot()["requests"],
            cpu_ms=sum(cpu_s(process.pid) for process in alive) / max(1, self.sent) * 1000,
            seconds=self._last_at - self._started_at,
        )

    def _take(self, message_id: str, data: bytes, attributes: dict[str, str]) -> None:
        if message_id in self._seen:
            return
        self._seen.add(message_id)
        message: dict[str, Any] = {"attributes": attributes}
        with suppress(ValueError):
            message["data"] = json.loads(data)
        where = self.candidate.answer
        try:
            index = int(find(message, where["index"]))
        except (TypeError, ValueError):
            self._malformed += 1
            return
        body = find(message, where["body"])
        if isinstance(body, str):
            with suppress(ValueError):
                body = json.loads(body)
        is_good = isinstance(body, dict) and "error" not in body
        if "status" in where:
            is_good = is_good and str(find(message, where["status"])).startswith("2")
        if index not in self._answers:
            self._last_at = time.monotonic()
        self._answers[index].append(is_good)


def _outage(behaviour: dict[str, Any], full_s: float) -> Callable[[Stage], None]:
    def run(stage: Stage) -> None:
        stage.sim.control({"settings": {"latency": "200ms"}})
        stage.publish(2000, least=400)
        stage.start()
        stage.collect_until(0.3)
        stage.backend(behaviour, full_s)
        stage.collect_until(1.0)

    return run


def _none(stage: Stage) -> None:
    stage.publish(10_000, least=500)
    stage.start()
    stage.collect_until(1.0)


def _little_room(stage: Stage) -> None:
    stage.sim.control(
        {"settings": {"latency": "100ms", "max_concurrency": 4, "overload": "reject", "retry_after": "1s"}}
    )
    stage.publish(1000)
    stage.start()
    stage.collect_until(1.0)


def _big_answers(stage: Stage) -> None:
    stage.sim.control({"behaviours": [{"mode": "oversize", "bytes": BIG_ANSWER_BYTES, "probability": 0.1}]})
    stage.publish(100)
    stage.start()
    stage.collect_until(1.0)


def _long_requests(stage: Stage) -> None:
    stage.sim.control({"settings": {"latency": f"{ACK_DEADLINE_S * 2.5}s"}})
    stage.publish(100)
    stage.start()
    stage.collect_until(1.0)


def _signals(number: signal.Signals) -> Callable[[Stage], None]:
    def run(stage: Stage) -> None:
        stage.sim.control({"settings": {"latency": "uniform:0.5s,1.5s"}})
        stage.publish(1000, least=100)
        for share in (0.2, 0.5, 0.7):
            process = stage.start()
            stage.collect_until(share)
            if number == signal.SIGTERM:
                stage.stop(process)
            else:
                process.kill()
                process.wait()
        stage.start()
        stage.collect_until(1.0)

    return run


DISASTERS: Mapping[str, Callable[[Stage], None]] = {
    "none": _none,
    "connections refused, 60 s": _outage({"mode": "refuse"}, OUTAGE_S),
    "connections refused, 180 s": _outage({"mode": "refuse"}, LONG_OUTAGE_S),
    "HTML 502, 60 s": _outage({"mode": "html_502"}, OUTAGE_S),
    "503, 60 s": _outage({"mode": "not_ready"}, OUTAGE_S),
    "429 with Retry-After, room for 4": _little_room,
    "11 MB answers, one in ten": _big_answers,
    "requests of 25 s, ack deadline 10 s": _long_requests,
    "SIGTERM, three times": _signals(signal.SIGTERM),
    "SIGKILL, three times": _signals(signal.SIGKILL),
}


def play(candidate: Candidate, disaster: str, scale: float) -> Result:
    """Let one candidate go through one disaster and return what it cost."""
    with tempfile.TemporaryDirectory() as folder:
        stage = Stage(candidate, Path(folder), scale)
        try:
            DISASTERS[disaster](stage)
            return stage.result(disaster)
        finally:
            stage.close()


def main() -> int:
    """Print a line for each candidate and disaster."""
    own = Path(__file__).with_name("candidates") / "inference-worker.yaml"
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare")
    parser.add_argument("candidates", nargs="*", type=Path, default=[own], help="descriptions, YAML")
    parser.add_argument("--only", default="", help="disasters whose name holds this text")
    parser.add_argument("--scale", type=float, default=1.0, help="1 is the full form, 0.05 a quick look")
    options = parser.parse_args()
    candidates = [Candidate.load(path) for path in options.candidates]
    print(Result.HEADER, flush=True)
    for disaster in (name for name in DISASTERS if options.only in name):
        for candidate in candidates:
            print(play(candidate, disaster, options.scale).row(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
