"""
A complete set-up for tests from outside: a broker, the simulated backend, worker processes, and a count of the answers.

Used by `tests/e2e`, `tests/chaos` and the benchmarks.  The requests carry their index in the metadata; the counting
knows by it what was lost, what was answered twice, and what the answers were.
"""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.admin import Admin
from tests.support.waiting import until
from worker.emulators.openai import SimBackendThread, SimOptions


def chat(index: int, text: str = "hello", **body: Any) -> bytes:
    """Return a request message; every index has a body of its own, so that repeats can be told apart."""
    content = {"model": "m", "messages": [{"role": "user", "content": f"{text} {index}"}], **body}
    return json.dumps({"path": "/v1/chat/completions", "metadata": {"index": index}, "body": content}).encode()


@dataclass
class Answers:
    """What came back."""

    by_index: dict[Any, list[dict[str, Any]]] = field(default_factory=lambda: defaultdict(list))
    attributes: dict[Any, list[dict[str, str]]] = field(default_factory=lambda: defaultdict(list))
    malformed: int = 0
    times: list[float] = field(default_factory=list)
    """Monotonic seconds of every first answer."""
    seen: set[str] = field(default_factory=set)
    """Ids of the answers' own messages: one that is delivered again is no second answer."""

    def add(self, message_id: str, data: bytes, attributes: dict[str, str]) -> None:
        if message_id in self.seen:
            return
        self.seen.add(message_id)
        try:
            answer = json.loads(data)
            index = answer["metadata"].get("index", attributes.get("request_message_id"))
            assert set(answer) >= {"status_code", "metadata"}
            assert ("body" in answer) is not ("body_uri" in answer)
        except (ValueError, KeyError, AssertionError):
            self.malformed += 1
            return
        if index not in self.by_index:
            self.times.append(time.monotonic())
        self.by_index[index].append(answer)
        self.attributes[index].append(attributes)

    @property
    def count(self) -> int:
        """Requests with at least one answer."""
        return len(self.by_index)

    @property
    def duplicates(self) -> int:
        """Answers beyond the first of each request."""
        return sum(len(answers) - 1 for answers in self.by_index.values())

    @property
    def statuses(self) -> Counter[int]:
        """Status codes of the first answers."""
        return Counter(answers[0]["status_code"] for answers in self.by_index.values())

    @property
    def attempts(self) -> Counter[int]:
        """Delivery attempts that the first answers needed."""
        return Counter(int(items[0].get("delivery_attempt", "1")) for items in self.attributes.values())


class WorkerProcess:
    """One `inference-worker run`."""

    def __init__(
        self,
        log: Path,
        settings: dict[str, Any],
        environ: dict[str, str] | None = None,
        *,
        command: list[str] | None = None,
        stderr: str | None = None,
    ) -> None:
        self.log_path = log
        command = list(command or [sys.executable, "-m", "worker", "run"])
        for key, value in settings.items():
            command += ["--set", f"{key}={value}"]
        env = {name: text for name, text in os.environ.items() if not name.startswith(("WORKER_", "PUBSUB_"))}
        with Path(stderr or log).open("ab") as stream:
            self._offset = stream.tell() if stderr is None else 0
            self.process = subprocess.Popen(command, stderr=stream, env={**env, **(environ or {})})

    def lines(self) -> Iterator[dict[str, Any]]:
        """Yield what it logged, line by line."""
        with self.log_path.open("rb") as stream:
            stream.seek(self._offset)
            for line in stream:
                with suppress(ValueError):
                    entry = json.loads(line)
                    if isinstance(entry, dict):
                        yield entry

    def event(self, name: str) -> dict[str, Any] | None:
        """Return the first line of an event."""
        return next((entry for entry in self.lines() if entry.get("event") == name), None)

    def wait_started(self, limit_s: float = 30.0) -> int:
        """Wait until it pulls; return its HTTP port."""
        until(lambda: self.event("worker_started") or self.process.poll() is not None, limit_s, "the worker starts")
        started = self.event("worker_started")
        assert started is not None, f"the worker did not start:\n{self.log_path.read_text()[-2000:]}"
        return int(started["http_port"])

    def get(self, path: str) -> tuple[int, str]:
        """Ask one of its probes."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.wait_started()}{path}", timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def metric(self, name: str, **labels: str) -> float:
        """Return a metric's value now, summed over the children that have the labels."""
        total = 0.0
        for line in self.get("/metrics")[1].splitlines():
            head, _, value = line.rpartition(" ")
            if head.partition("{")[0] == name and all(f'{key}="{text}"' in head for key, text in labels.items()):
                total += float(value)
        return total

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Let it do nothing inside the block."""
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)

    def wait(self, limit_s: float) -> int:
        return self.process.wait(limit_s)

    def close(self) -> None:
        if self.process.poll() is None:
            self.kill()


class Rig:
    """A broker, a backend, topics and subscriptions; workers are started by the test."""

    def __init__(self, address: str, sim: SimBackendThread, folder: Path, *, attempts: int = 20, **fields: Any) -> None:
        self.address = address
        self.sim = sim
        self.folder = folder
        self.admin = Admin(address)
        self.requests = self.admin.topic("requests")
        self.responses = self.admin.topic("responses")
        self.dead = self.admin.topic("dead")
        self.graves = self.admin.subscription(self.dead)
        self.request_subscription = self.admin.subscription(
            self.requests,
            **{"ack_deadline_seconds": 60, "backoff": (1, 10), "dead_letter": (self.dead, attempts), **fields},
        )
        # Short: what was pulled by a call that had just been given up comes again before a scenario ends.
        self.response_subscription = self.admin.subscription(self.responses)
        self.workers: list[WorkerProcess] = []
        self.answers = Answers()
        self.sent = 0

    def worker(
        self,
        environ: dict[str, str] | None = None,
        *,
        _command: list[str] | None = None,
        _stderr: str | None = None,
        **overrides: Any,
    ) -> WorkerProcess:
        """Start one; keys of settings with `__` for the dot."""
        settings = {
            "pubsub.project_id": self.admin.project,
            "pubsub.emulator_host": self.address,
            "pubsub.request_subscription": self.request_subscription,
            "pubsub.response_topic": self.responses,
            "backend.base_url": self.sim.base_url,
            "http.host": "127.0.0.1",
            "http.port": 0,
            "log.format": "json",
            **{key.replace("__", "."): value for key, value in overrides.items()},
        }
        log = self.folder / f"worker-{len(self.workers)}.log"
        worker = WorkerProcess(log, settings, environ, command=_command, stderr=_stderr)
        self.workers.append(worker)
        return worker

    def publish(self, count: int, make: Callable[[int], bytes] = chat) -> None:
        """Publish requests with the next indices."""
        futures = [self.admin.publisher.publish(self.requests, make(self.sent + offset)) for offset in range(count)]
        for future in futures:
            future.result(60)
        self.sent += count

    def collect(self, count: int | None = None, limit_s: float = 60.0) -> Answers:
        """Take answers until so many requests (default: all) have one, or the time is over."""
        wanted, until = self.sent if count is None else count, time.monotonic() + limit_s
        while self.answers.count < wanted and time.monotonic() < until:
            for worker in self.workers:
                assert worker.process.poll() != 2, worker.log_path.read_text()[-2000:]
            self._take(min(2.0, max(0.1, until - time.monotonic())))
        return self.answers

    def collect_during(self, seconds: float) -> None:
        """Take what comes for a while."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self._take(min(1.0, left))

    def collect_rest(self, quiet_s: float = 2.0) -> Answers:
        """Take what else comes, until nothing has come for this long."""
        while self._take(quiet_s):
            continue
        return self.answers

    def _take(self, limit_s: float) -> int:
        messages = self.admin.take_once(self.response_subscription, limit_s)
        for message in messages:
            self.answers.add(message.message_id, message.data, dict(message.attributes))
        return len(messages)

    def stats(self) -> dict[str, Any]:
        """What the simulated backend counted."""
        return self.sim.snapshot()

    def is_drained(self, limit_s: float = 3.0) -> bool:
        """Whether the request subscription has nothing more to give."""
        return self.admin.is_empty(self.request_subscription, limit_s)

    def close(self) -> None:
        for worker in self.workers:
            worker.close()
        self.admin.close()


@contextmanager
def rig(address: str, folder: Path, options: SimOptions | None = None, **fields: Any) -> Iterator[Rig]:
    """Run a rig against the broker at this address."""
    with SimBackendThread(options or SimOptions.of(control_port=0)) as sim:
        built = Rig(address, sim, folder, **fields)
        try:
            yield built
        finally:
            built.close()
