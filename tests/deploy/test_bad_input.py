"""
What an installation gets wrong, tried on the running program with the rendered pod's own environment and configuration.

Each time the pod's log says in one line what is wrong and what to do, `/startupz` never succeeds, and the exit code is
the documented one.
"""

import asyncio
import json
import os
import re
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest

from tests.deploy import manifests
from tests.deploy.cluster import free_port
from tests.support.guarded_pubsub import GuardedPubSub
from worker.emulators.pubsub import LocalPubSub

pytestmark = [pytest.mark.slow, pytest.mark.timeout(60)]

SUBSCRIPTION = "projects/my-project/subscriptions/inference-requests-worker"
TOPIC = "projects/my-project/topics/inference-responses"
TERMINATION_MESSAGE_BYTES = 2048
"""What the kubelet keeps of a log's end: https://kubernetes.io/docs/tasks/debug/debug-application/determine-reason-pod-failure/"""
MAY_PULL = {SUBSCRIPTION: ["pubsub.subscriptions.consume"]}


@dataclass
class Pod:
    """The worker as its manifest starts it, except for the addresses."""

    folder: Path
    values: dict[str, str] = field(default_factory=dict)
    """Replacements in the text of values.yaml."""
    components: tuple[str, ...] = ("api-key", "values")
    environ: dict[str, str] = field(default_factory=dict)

    async def run(self) -> tuple[int, list[dict[str, Any]], set[int]]:
        """Run it to its end; return the exit code, the lines of its log, and what `/startupz` answered meanwhile."""
        port = free_port()
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "worker", "run", "--set", f"http.port={port}", "--set", "http.host=127.0.0.1",
            env={**os.environ, **self._manifest(), **self.environ}, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        probing = asyncio.create_task(_probe(f"http://127.0.0.1:{port}/startupz"))
        try:
            _, log = await process.communicate()
        finally:
            probing.cancel()
            if process.returncode is None:
                process.kill()
        (answers,) = await asyncio.gather(probing)
        assert process.returncode is not None
        return process.returncode, [json.loads(line) for line in log.splitlines()], answers

    def _manifest(self) -> dict[str, str]:
        folder = self.folder / "overlay"
        folder.mkdir()
        manifests.compose(folder, self.components)
        values = (folder / "values.yaml").read_text()
        for right, wrong in self.values.items():
            assert right in values
            values = values.replace(right, wrong)
        (folder / "values.yaml").write_text(values)
        pod = manifests.parse(manifests.kustomize(folder))
        (self.folder / "worker.yaml").write_text(pod.config)
        return {**pod.environ, "WORKER_CONFIG": str(self.folder / "worker.yaml")}


async def _probe(url: str) -> set[int]:
    """Ask like the kubelet, only oftener; return the statuses once cancelled."""
    answers: set[int] = set()
    try:
        async with aiohttp.ClientSession() as session:
            while True:
                try:
                    async with session.get(url) as answer:
                        answers.add(answer.status)
                except aiohttp.ClientError:
                    answers.add(0)  # nothing listens: for the kubelet a failure too
                await asyncio.sleep(0.02)
    except asyncio.CancelledError:
        return answers


@pytest.fixture
async def guarded() -> AsyncIterator[GuardedPubSub]:
    """Pub/Sub with access control and no permission given."""
    async with GuardedPubSub() as server:
        yield server


def _is_told(found: tuple[int, list[dict[str, Any]], set[int]], code: int, pattern: str) -> None:
    exit_code, log, answers = found
    assert exit_code == code
    last = log[-1]
    assert (last["event"], last["level"]) == ("startup_failed", "error")
    assert re.search(pattern, last["error"]), last["error"]
    assert "\n" not in last["error"]
    assert len(json.dumps(last)) < TERMINATION_MESSAGE_BYTES
    assert not [line for line in log if "exception" in line], "a traceback is of no help here"
    assert answers <= {0, 503}, "never started"


@pytest.mark.parametrize(
    ("right", "wrong", "pattern"),
    [
        ("requestsPerPod: 16", "requestsPerPod: 4", r"backend\.window: needs min <= initial <= max"),
        ("requestsPerPod: 16", "requestsPerPod: many", r"backend\.window\.max .*WORKER_BACKEND__WINDOW__MAX.*'many'"),
        ("maxInFlight: 20", "maxInFlight: 0", r"pubsub\.max_in_flight .*greater than or equal to 1 \(got '0'\)"),
        ("baseUrl: http://", "baseUrl: ftp://", r"backend\.base_url"),
    ],
)
async def test_a_wrong_overlay_value_is_named(tmp_path: Path, right: str, wrong: str, pattern: str):
    """The setting, the variable it came from and the value, before anything is asked; exit code 2."""
    found = await Pod(tmp_path, values={right: wrong}, environ={"PUBSUB_EMULATOR_HOST": "127.0.0.1:1"}).run()
    _is_told(found, 2, pattern)


async def test_every_wrong_value_is_on_the_one_line(tmp_path: Path):
    """Two faults, one line: one mended fault does not uncover the next."""
    wrong = {"requestsPerPod: 16": "requestsPerPod: many", "maxInFlight: 20": "maxInFlight: few"}
    found = await Pod(tmp_path, values=wrong, environ={"PUBSUB_EMULATOR_HOST": "127.0.0.1:1"}).run()
    _is_told(found, 2, r"^unusable settings: .*'few'.*; .*'many'|^unusable settings: .*'many'.*; .*'few'")
    assert len(found[1]) == 1


async def test_a_missing_secret_is_named(tmp_path: Path):
    """Its file, though Pub/Sub cannot be reached at all; exit code 2."""
    key = tmp_path / "api-key"
    environ = {"PUBSUB_EMULATOR_HOST": "127.0.0.1:1", "WORKER_BACKEND__API_KEY_FILE": str(key)}
    _is_told(await Pod(tmp_path, environ=environ).run(), 2, rf"backend\.api_key_file: {key}: No such file or directory")


async def test_missing_credentials_are_named(tmp_path: Path):
    """Google's own words, and exit code 2."""
    environ = {"GOOGLE_APPLICATION_CREDENTIALS": str(tmp_path / "none.json")}
    found = await Pod(tmp_path, components=("values",), environ=environ).run()
    _is_told(found, 2, r"no Google Cloud credentials: .*none\.json")


async def test_a_missing_subscription_is_named(tmp_path: Path):
    """In full, with what creates it; exit code 1."""
    async with LocalPubSub() as server:
        found = await Pod(tmp_path, components=("values",), environ={"PUBSUB_EMULATOR_HOST": server.address}).run()
    _is_told(found, 1, rf"^the subscription {SUBSCRIPTION} does not exist; create it.*deploy/")


@pytest.mark.parametrize(
    ("permissions", "pattern"),
    [
        ({}, rf"^{SUBSCRIPTION}: pubsub\.subscriptions\.consume is not granted; roles/pubsub\.subscriber has it$"),
        (MAY_PULL, rf"^{TOPIC}: pubsub\.topics\.publish is not granted; roles/pubsub\.publisher has it$"),
    ],
    ids=["subscription", "topic"],
)
async def test_missing_iam_is_named(
    tmp_path: Path, guarded: GuardedPubSub, permissions: dict[str, list[str]], pattern: str
):
    """The resource, the permission and the role to grant; exit code 1."""
    guarded.permissions.update(permissions)
    found = await Pod(tmp_path, components=("values",), environ={"PUBSUB_EMULATOR_HOST": guarded.address}).run()
    _is_told(found, 1, pattern)


@pytest.mark.parametrize(
    ("code", "text"),
    [(grpc.StatusCode.PERMISSION_DENIED, "API disabled"), (grpc.StatusCode.UNAUTHENTICATED, "expired")],
    ids=lambda value: getattr(value, "name", value),
)
async def test_a_refused_call_is_named(tmp_path: Path, guarded: GuardedPubSub, code: grpc.StatusCode, text: str):
    """Where nothing may even be asked, the server's own words; exit code 1."""
    for method in ("TestIamPermissions", "GetSubscription", "GetTopic", "StreamingPull"):
        guarded.refusals[method] = (code, text)
    found = await Pod(tmp_path, components=("values",), environ={"PUBSUB_EMULATOR_HOST": guarded.address}).run()
    _is_told(found, 1, rf"{SUBSCRIPTION}.*{text}")
