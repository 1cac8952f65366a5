"""Copies of failed requests, and sending them back."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.rig import chat, rig
from tests.support.waiting import until
from worker.emulators.pubsub import LocalPubSubThread

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]


def _replay(address: str, subscription: str, topic: str, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "worker", "replay", subscription, topic, "--quiet", "2"]
    command += ["--set", f"pubsub.emulator_host={address}", "--set", "pubsub.project_id=exam", *more]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)


def test_what_failed_for_good_is_copied_and_can_be_sent_back(tmp_path: Path) -> None:
    """Each request of a broken time is answered with an error, copied, and answered well after a replay."""
    with LocalPubSubThread() as server, rig(server.address, tmp_path) as built:
        copies = built.admin.topic("copies")
        kept = built.admin.subscription(copies, ack_deadline_seconds=60)
        built.sim.control({"mode": "outage_5xx", "match": {"body": "bad"}})
        worker = built.worker(dead_letter__topic=copies, pubsub__max_delivery_attempts=1)
        built.publish(12, lambda index: chat(index, "bad" if index % 4 == 0 else "good"))
        built.collect(12)
        assert built.answers.statuses == {200: 9, 500: 3}
        until(lambda: worker.metric("inference_worker_dead_letter_copies_total", outcome="ok") == 3)
        built.sim.control({"behaviours": []})
        limited = _replay(server.address, kept, built.requests, "--limit", "1")
        assert (limited.returncode, limited.stderr) == (0, f"1 published to {built.requests}, 0 failed\n")
        rest = _replay(server.address, kept, built.requests)
        assert (rest.returncode, rest.stderr) == (0, f"2 published to {built.requests}, 0 failed\n")
        built.collect_rest(2)
        again = {
            index: [each["status_code"] for each in each_answers]
            for index, each_answers in built.answers.by_index.items()
        }
        assert {index: codes for index, codes in again.items() if len(codes) > 1} == {i: [500, 200] for i in (0, 4, 8)}


def test_a_missing_subscription_is_told_in_one_line(tmp_path: Path) -> None:
    """Exit code 1, no traceback."""
    with LocalPubSubThread() as server, rig(server.address, tmp_path) as built:
        done = _replay(server.address, "there-is-none", built.requests)
    assert done.returncode == 1
    assert "there-is-none" in done.stderr
    assert "Traceback" not in done.stderr
