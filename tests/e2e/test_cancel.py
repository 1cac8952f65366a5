"""Cancelling over the control topic: two workers, a command, and requests that run, wait, and come later."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.rig import chat, rig
from tests.support.waiting import until
from worker.emulators.openai import SimOptions
from worker.emulators.pubsub import LocalPubSubThread
from worker.wire.message import RUN_ID

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


def test_a_run_is_cancelled_at_all_workers(tmp_path: Path) -> None:
    """What runs is cut, what waits is answered, what comes later too; another run is served; nothing is left behind."""
    options = SimOptions.of(control_port=0)
    with LocalPubSubThread() as server, rig(server.address, tmp_path, options) as built:
        control = built.admin.topic("control")
        settings = {
            "pubsub__control_topic": control,
            "pubsub__max_in_flight": 5,
            "backend__window__max": 2,
            "backend__window__initial": 2,
        }
        workers = [built.worker(**settings) for _ in range(2)]
        for worker in workers:
            worker.wait_started()
        built.sim.control({"mode": "hang"})

        def publish(first: int, count: int, run: str) -> None:
            for index in range(first, first + count):
                built.admin.publish(built.requests, chat(index), **{RUN_ID: run})
            built.sent += count

        publish(0, 12, "a")
        until(lambda: built.stats()["in_flight"] == 4, 30, "both workers run what they may")
        command = [sys.executable, "-m", "worker", "cancel", "--run", "a"]
        environ = {
            "WORKER_PUBSUB__PROJECT_ID": built.admin.project,
            "WORKER_PUBSUB__REQUEST_SUBSCRIPTION": built.request_subscription,
            "WORKER_PUBSUB__RESPONSE_TOPIC": built.responses,
            "WORKER_PUBSUB__CONTROL_TOPIC": control,
            "PUBSUB_EMULATOR_HOST": server.address,
        }
        done = subprocess.run(command, env={**os.environ, **environ}, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "told all workers\n")
        built.collect(12)
        assert built.answers.statuses == {499: 12}
        built.sim.control({"mode": "ok"})
        publish(100, 5, "b")
        built.collect(17)
        built.collect_rest(1)
        assert (built.answers.count, built.answers.duplicates) == (17, 0)
        assert built.answers.statuses == {499: 12, 200: 5}
        for worker in workers:
            worker.terminate()
            assert worker.wait(30) == 0
        assert list(built.admin.publisher.list_topic_subscriptions(request={"topic": control})) == []
