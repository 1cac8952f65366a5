"""
One rendered overlay played by podman, with Google's emulator and the simulated backend beside it.

What a cluster would do, done by hand: the objects get names of this run, the pod's ports are bound to the loopback
address (podman would publish them on every address), and a container that was stopped is started again.  One that was killed comes back by the engine's own
restart policy, as with a kubelet.
"""

import json
import os
import signal
import socket
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml
from google.pubsub_v1 import types

from tests.deploy.engine import Engine
from tests.deploy.manifests import Variant
from tests.support.admin import Admin, seconds
from tests.support.rig import Answers, chat
from tests.support.waiting import until

EMULATOR_COMMAND = ["gcloud", "beta", "emulators", "pubsub", "start", "--project=local", "--host-port=0.0.0.0:8085"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Cluster:
    """The overlay's pod on a network of its own with `pubsub` and `backend`."""

    def __init__(self, engine: Engine, image: str, variant: Variant, folder: Path) -> None:
        self.engine = engine
        self.image = image
        self.network = f"inference-{uuid.uuid4().hex[:8]}"
        self.port = free_port()
        self.worker = f"{self.network}-deployment-pod-0-{variant.container['name']}"
        self.answers = Answers()
        self.sent = 0
        self._variant = variant
        self._manifest = folder / "manifest.yaml"
        self._others: list[str] = []
        self._broker = ""

    def start(self, *backend: str, broker: str = "emulator") -> None:
        """Start the broker, Google's emulator or the embedded server, and the backend; the pod comes with `play`."""
        self._broker = broker
        self.engine("network", "create", self.network)
        image, *command = {
            "emulator": (self.engine.images["emulator"], *EMULATOR_COMMAND),
            "embedded": (self.image, "localpubsub", "--host=0.0.0.0", "--port=8085"),
        }[broker]
        self.address = self._beside("pubsub", 8085, image, *command)
        simulated = ("simbackend", "--host=0.0.0.0", "--port=8000", *backend)
        self.backend = self._beside("backend", 8000, self.image, *simulated)
        if broker == "emulator":
            until(lambda: self._get(f"http://{self.address}/"), 60, "the emulator serves")
        until(lambda: self._get(f"http://{self.backend}/sim/stats"), 30, "the backend serves")
        self.admin = Admin(self.address, "local")

    def _beside(self, alias: str, port: int, image: str, *command: str) -> str:
        name = f"{self.network}-{alias}"
        self._others.append(name)
        self.engine(
            "run", "--detach", "--pull=never", f"--name={name}", f"--network={self.network}", f"--network-alias={alias}",
            f"--publish=127.0.0.1::{port}", image, *command,
        )  # fmt: skip
        return self.engine("port", name, str(port))

    def create_resources(self) -> None:
        """Create what deploy/terraform creates, with leases and backoffs short enough for a test."""
        settings = self._variant.settings().pubsub
        root = f"projects/{settings.project_id}"
        self.requests, responses, dead = (
            f"{root}/topics/{name}" for name in ("inference-requests", settings.response_topic, "dead")
        )
        self._reader = f"{root}/subscriptions/reader"
        for topic in (self.requests, responses, dead):
            self.admin.publisher.create_topic(request={"name": topic})
        create = self.admin.subscriber.create_subscription
        create(request={"name": self._reader, "topic": responses, "ack_deadline_seconds": 60})
        self.requested = f"{root}/subscriptions/{settings.request_subscription}"
        create(
            request={
                "name": self.requested,
                "topic": self.requests,
                "ack_deadline_seconds": 10,
                "retry_policy": types.RetryPolicy(minimum_backoff=seconds(1), maximum_backoff=seconds(10)),
                "dead_letter_policy": types.DeadLetterPolicy(dead_letter_topic=dead, max_delivery_attempts=20),
            }
        )

    def play(self) -> None:
        """Start the pod from the rendered manifest."""
        documents = json.loads(json.dumps(self._variant.of_kind("ConfigMap", "Deployment")))
        names = {item["metadata"]["name"]: f"{self.network}-{item['kind'].lower()}" for item in documents}
        for item in documents:
            item["metadata"]["name"] = names[item["metadata"]["name"]]
            spec = item.get("spec", {}).get("template", {}).get("spec", {})
            for volume in spec.get("volumes", ()):
                volume["name"] = f"{self.network}-{volume['name']}"  # podman makes an emptyDir a volume of this name
                if "configMap" in volume:
                    volume["configMap"]["name"] = names[volume["configMap"]["name"]]
            for container in spec.get("containers", ()):
                for mount in container.get("volumeMounts", ()):
                    mount["name"] = f"{self.network}-{mount['name']}"
                container["ports"] = [
                    {**port, "hostIP": "127.0.0.1", "hostPort": self.port} for port in container["ports"]
                ]
        self._manifest.write_text(yaml.safe_dump_all(documents))
        self.engine("play", "kube", f"--network={self.network}", self._manifest)

    def kill(self) -> None:
        """SIGKILL the worker behind the engine's back, as the kernel does: its restart policy brings it back."""
        os.kill(self.engine.inspect(self.worker)["State"]["Pid"], signal.SIGKILL)
        self._end_dead_streams()

    def terminate(self, limit_s: int) -> tuple[int, float]:
        """SIGTERM the worker and start it again; return its exit code and the seconds it took to end."""
        begun = time.monotonic()
        self.engine("stop", f"--time={limit_s}", self.worker)
        took = time.monotonic() - begun
        code = int(self.engine.inspect(self.worker)["State"]["ExitCode"])
        self.engine("start", self.worker)
        return code, took

    def _end_dead_streams(self) -> None:
        if self._broker == "emulator":
            self.admin.end_dead_streams(self.requested)

    def logs(self) -> list[dict[str, Any]]:
        """Return the worker's log, over every start of the container."""
        entries = []
        for line in self.engine.output("logs", self.worker).splitlines():
            with suppress(ValueError):
                entries.append(json.loads(line))
        return entries

    def event(self, name: str) -> dict[str, Any] | None:
        """Return the latest line of an event."""
        return next((entry for entry in reversed(self.logs()) if entry.get("event") == name), None)

    def _get(self, url: str) -> str | None:
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                return str(answer.read().decode())
        except (urllib.error.URLError, OSError):
            return None

    def probe(self, path: str) -> str | None:
        """Return what a probe answers, `None` unless it is 200."""
        return self._get(f"http://127.0.0.1:{self.port}{path}")

    def wait_ready(self) -> None:
        until(lambda: self.probe("/readyz"), 60, "the worker is ready")

    def stats(self) -> dict[str, Any]:
        return dict(json.loads(self._get(f"http://{self.backend}/sim/stats") or "{}"))

    def publish(self, count: int) -> None:
        """Publish the next requests."""
        wanted = range(self.sent, self.sent + count)
        for future in [self.admin.publisher.publish(self.requests, chat(index)) for index in wanted]:
            future.result(60)
        self.sent += len(wanted)

    def exchange(self, total: int, *, until: int, per_s: float = 20.0, limit_s: float = 60.0) -> int:
        """
        Publish at this pace, up to so many requests altogether, and take answers until so many have one.

        Paced, because Google's emulator ignores flow control and would lease everything to the one worker.

        Returns:
            How many requests have an answer.
        """
        begun, first = time.monotonic(), self.sent
        while self.answers.count < until and (passed := time.monotonic() - begun) < limit_s:
            due = min(total, first + int(passed * per_s) + 1)
            self.publish(due - self.sent)
            self.take(2.0)
        return self.answers.count

    def take(self, limit_s: float) -> int:
        messages = self.admin.take_once(self._reader, limit_s)
        for message in messages:
            self.answers.add(message.message_id, message.data, dict(message.attributes))
        return len(messages)

    def close(self) -> None:
        """Remove everything that was started."""
        if hasattr(self, "admin"):
            self.admin.close()
        if self._manifest.exists():
            self.engine("play", "kube", "--down", self._manifest, check=False)
            for kind in ("configmap", "tmp"):  # `--down` leaves them
                self.engine("volume", "rm", "--force", f"{self.network}-{kind}", check=False)
        for name in self._others:
            self.engine("rm", "--force", "--time=0", name, check=False)
        self.engine("network", "rm", "--force", self.network, check=False)


@contextmanager
def cluster(engine: Engine, image: str, variant: Variant, folder: Path) -> Iterator[Cluster]:
    """Yield a cluster in which nothing runs yet; remove everything in the end."""
    built = Cluster(engine, image, variant, folder)
    try:
        yield built
    finally:
        built.close()
