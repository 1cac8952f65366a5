"""One worker that drains several subscriptions: people first, batches with what is left."""

import json
from pathlib import Path

import pytest

from tests.support.rig import chat, rig
from tests.support.waiting import until
from worker.emulators.openai import SimOptions
from worker.emulators.pubsub import LocalPubSubThread

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


def test_what_people_wait_for_overtakes_a_batch(tmp_path: Path) -> None:
    """Both are answered, each once; the late ones of level 0 before nearly all of level 1, and each has its cap."""
    options = SimOptions.of(latency="100ms", control_port=0)
    with LocalPubSubThread() as server, rig(server.address, tmp_path, options) as built:
        people_topic = built.admin.topic("people")
        people = built.admin.subscription(people_topic, dead_letter=(built.dead, 20))
        several = [
            {"name": people, "level": 0, "max_in_flight": 10},
            {"name": built.request_subscription, "level": 1, "max_in_flight": 40},
        ]
        worker = built.worker(
            pubsub__request_subscription="",
            pubsub__subscriptions=json.dumps(several),
            backend__window__initial=2,
            backend__window__max=2,
        )
        built.publish(60)
        built.collect(5)
        assert worker.metric("inference_worker_leased_messages") <= 50
        for index in range(100, 110):
            built.admin.publish(people_topic, chat(index))
        built.sent += 10
        built.collect(70)
        built.collect_rest(1)
        assert (built.answers.count, built.answers.duplicates) == (70, 0)
        assert built.answers.statuses == {200: 70}
        order = list(built.answers.by_index)
        late = max(order.index(index) for index in range(100, 110))
        assert late < 45, order
        worker.terminate()
        assert worker.wait(30) == 0
        until(lambda: built.admin.is_empty(people, 1.0), 20, "nothing is left")
