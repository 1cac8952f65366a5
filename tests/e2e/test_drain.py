"""Signals in the middle of work: the worker as a process, nothing lost, everything counted."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.rig import Rig, chat, rig
from tests.support.waiting import until
from worker.emulators.openai import SimOptions
from worker.emulators.pubsub import LocalPubSubThread

WORK_S = 5.0
"""What 40 requests of a second take at 16 at once, with the start of a redelivery."""
pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


@contextmanager
def a_slow_rig(folder: Path, **subscription: Any) -> Iterator[Rig]:
    """Run a rig whose requests take about a second each."""
    options = SimOptions.of(latency="uniform:0.8s,1.2s", control_port=0)
    with LocalPubSubThread() as server, rig(server.address, folder, options, **subscription) as built:
        yield built


@pytest.fixture
def slow_rig(tmp_path: Path) -> Iterator[Rig]:
    """A rig whose requests take about a second each."""
    with a_slow_rig(tmp_path) as built:
        yield built


def test_sigterm_in_the_middle_of_500_slow_requests(slow_rig: Rig) -> None:
    """Exit 0 within the grace; each of the 500 is answered exactly once or redelivered and answered by the next pod."""
    slow_rig.publish(500)
    first = slow_rig.worker(backend__window__initial=64, backend__window__max=64, pubsub__max_in_flight=192)
    slow_rig.collect(64, 30)
    first.terminate()
    started = time.monotonic()
    assert first.wait(30) == 0
    assert time.monotonic() - started < 10
    slow_rig.collect_rest(1)
    answered = slow_rig.answers.count
    assert 64 <= answered < 500
    assert slow_rig.answers.duplicates == 0
    assert slow_rig.stats()["requests"] == answered, "what was begun was finished and answered"
    slow_rig.worker(backend__window__initial=64, backend__window__max=64, pubsub__max_in_flight=192)
    slow_rig.collect(500, 90)  # what was on the wire when the first stream closed comes back after its lease
    slow_rig.collect_rest(1)
    assert (slow_rig.answers.count, slow_rig.answers.duplicates) == (500, 0)
    assert slow_rig.answers.statuses == {200: 500}


def test_a_grace_that_is_too_short_hands_back_what_is_unfinished(slow_rig: Rig) -> None:
    """Requests cut by the grace are nacked at once and answered exactly once by the next pod."""
    short = {"drain__grace_s": 0.2, "drain__settle_s": 3, "drain__cut_longer_requests": "true"}
    slow_rig.publish(100)
    first = slow_rig.worker(backend__window__initial=50, **short)
    first.wait_started()
    until(lambda: first.metric("inference_worker_in_flight") >= 40)
    first.terminate()
    started = time.monotonic()
    assert first.wait(20) == 0
    assert time.monotonic() - started < 5
    slow_rig.worker(backend__window__initial=50)
    slow_rig.collect(100, 60)
    slow_rig.collect_rest(1)
    assert (slow_rig.answers.count, slow_rig.answers.duplicates) == (100, 0)


def test_a_second_sigterm_ends_it_at_once(slow_rig: Rig) -> None:
    """The grace of the first signal is cut to nothing by the second."""
    slow_rig.sim.control({"mode": "hang"})
    slow_rig.publish(10)
    worker = slow_rig.worker()
    worker.wait_started()
    until(lambda: worker.metric("inference_worker_in_flight") >= 5)
    worker.terminate()
    until(lambda: worker.get("/readyz")[0] == 503, what="the drain begins")
    assert worker.process.poll() is None, "the first signal waits for what runs"
    worker.terminate()
    started = time.monotonic()
    assert worker.wait(20) == 0
    assert time.monotonic() - started < 8


def test_sigkill_loses_nothing(tmp_path: Path) -> None:
    """After a SIGKILL what was leased is back within the ack deadline; no more than what was in flight runs twice."""
    with a_slow_rig(tmp_path, ack_deadline_seconds=20) as built:
        built.publish(60, lambda index: chat(index, "kill"))
        first = built.worker(backend__window__initial=16, backend__window__max=16, pubsub__max_in_flight=32)
        built.collect(20, 30)
        first.kill()
        killed_at = time.monotonic()
        built.worker(backend__window__initial=16, backend__window__max=16)
        built.collect(60, 100)
        assert built.answers.count == 60
        assert 10 < built.answers.times[-1] - killed_at < 20 + WORK_S
        assert built.answers.statuses == {200: 60}
        assert built.stats()["requests"] <= 60 + 16 + built.answers.duplicates  # published, and the ack was not sent


def test_readiness_and_liveness_while_draining(slow_rig: Rig) -> None:
    """While draining it is alive and not ready; before that it is both, and says what it does."""
    slow_rig.sim.control({"mode": "hang"})
    slow_rig.publish(3)
    worker = slow_rig.worker()
    until(lambda: worker.metric("inference_worker_in_flight") == 3)
    status, text = worker.get("/readyz")
    assert (status, json.loads(text)["backends"]["default"]["in_flight"]) == (200, 3)
    assert worker.get("/startupz")[0] == 200
    worker.terminate()
    until(lambda: worker.get("/readyz")[0] == 503)
    assert worker.get("/livez")[0] == 200
