"""A worker that groups questions by the documents that they are about, at an engine whose cache holds few of them."""

import random
from pathlib import Path
from typing import Any

import pytest

from tests.support.rig import chat, rig
from tests.support.waiting import until
from worker.emulators.openai import SimOptions
from worker.emulators.pubsub import LocalPubSubThread

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]
DOCUMENTS, QUESTIONS = 8, 6


def question(index: int) -> bytes:
    return chat(index, f"document {index % DOCUMENTS} ".ljust(2000, "x"))


def cached_share(tmp_path: Path, **settings: Any) -> float:
    """Serve mixed questions and return the share of prompt tokens that the engine's cache had."""
    tmp_path.mkdir()
    options = SimOptions.of(control_port=0, prefix_cache=1200)  # two documents
    with LocalPubSubThread() as server, rig(server.address, tmp_path, options) as built:
        order = list(range(DOCUMENTS * QUESTIONS))
        random.Random(1).shuffle(order)
        window = {"backend__window__initial": 1, "backend__window__max": 1}
        built.sim.control({"mode": "hang", "count": 1})
        worker = built.worker(**window, **settings)
        worker.wait_started()
        built.admin.publish(built.requests, chat(1000))
        until(lambda: built.stats()["in_flight"] == 1, 30, "the first request holds the only slot")
        for index in order:
            built.admin.publish(built.requests, question(index))
        built.sent += len(order) + 1
        until(lambda: worker.metric("inference_worker_leased_messages") == len(order) + 1, 30, "all are leased")
        built.sim.reset(("behaviours",))
        built.collect(len(order) + 1)
        assert built.answers.statuses == {200: len(order) + 1}
        prompts = built.stats()["prompts"]
        worker.terminate()
        assert worker.wait(30) == 0
        return float(prompts["cached"] / prompts["tokens"])


def test_questions_about_one_document_find_it_in_the_cache(tmp_path: Path) -> None:
    """Most of the prompts need not be computed; by age most have to be."""
    by_age = cached_share(tmp_path / "by-age")
    grouped = cached_share(tmp_path / "grouped", backend__group_by_prefix_bytes=1000)
    assert by_age < 0.5
    assert grouped > 0.65
