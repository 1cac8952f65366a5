"""Disasters of the backend: everything a model server, a proxy or an account can do to a request."""

from collections.abc import Callable
from typing import Any

from tests.chaos.stage import Stage
from tests.support.rig import chat


def outage(behaviour: dict[str, Any], *, full_s: float = 60.0, **settings: Any) -> Callable[[Stage], None]:
    """Return a scenario in which the backend fails for everybody, in the middle of steady work."""

    def run(stage: Stage) -> None:
        stage.rig.sim.control({"settings": {"latency": "200ms"}})
        stage.publish(3000, least=900)
        stage.worker(**settings)
        stage.answer_some(0.4)
        stage.backend(behaviour, during_s=stage.seconds(full_s, 5))
        stage.rig.collect(limit_s=120)
        assert stage.broken_at is not None
        assert stage.mended_at is not None
        middle = (stage.broken_at + stage.mended_at) / 2
        stage.demand("the outage", not any(middle < moment < stage.mended_at for moment in stage.rig.answers.times))

    return run


def some(behaviour: dict[str, Any], **settings: Any) -> Callable[[Stage], None]:
    """Return a scenario in which some answers are broken while the others are good."""

    def run(stage: Stage) -> None:
        stage.rig.sim.control({"behaviours": [{**behaviour, "probability": 0.1}]})
        stage.publish(500, least=60)
        stage.worker(**settings)
        stage.answer_some(0.8, 90)
        stage.rig.sim.control({"behaviours": []})
        stage.mended()
        stage.rig.collect(limit_s=90)
        stage.demand("the fault", stage.rig.stats()["by_mode"].get(behaviour["mode"]))

    return run


def storm_of_429(retry_after: str | None) -> Callable[[Stage], None]:
    """Return a scenario in which the backend takes far less than the window would send."""

    def run(stage: Stage) -> None:
        settings: dict[str, Any] = {"latency": "100ms", "max_concurrency": 4, "overload": "reject"}
        settings["retry_after"] = retry_after
        stage.rig.sim.control({"settings": settings})
        stage.publish(1500, least=60)
        stage.worker()
        stage.rig.collect(limit_s=120)
        stage.demand("a 429", stage.rig.stats()["by_status"].get("429"))

    return run


def key_rotation(stage: Stage) -> None:
    """The key is revoked; the new one comes as a file that takes the old one's place."""
    key = stage.rig.folder / "key"
    key.write_text("old")
    stage.rig.sim.control({"settings": {"api_key": "old", "latency": "200ms"}})
    stage.publish(2000, least=600)
    stage.worker(backend__api_key_file=key)
    stage.answer_some(0.4)
    stage.broken()
    stage.rig.sim.control({"settings": {"api_key": "new"}})
    stage.rig.collect_during(stage.seconds(30, 3))
    fresh = stage.rig.folder / "key.new"
    fresh.write_text("new")
    fresh.replace(key)
    stage.mended()
    stage.rig.collect(limit_s=90)


def hangs(stage: Stage) -> None:
    """Some requests are taken and never answered."""
    stage.rig.sim.control({"behaviours": [{"mode": "hang", "probability": 0.05, "count": stage.count(20, 5)}]})
    stage.publish(500, least=60)
    stage.worker(backend__timeouts__total_s=2)
    stage.rig.collect(limit_s=120)


def slow_first_byte(stage: Stage) -> None:
    """Some answers begin late."""
    stage.rig.sim.control({"behaviours": [{"mode": "slow_first_byte", "delay_s": "3s", "probability": 0.2}]})
    stage.publish(300, least=60)
    stage.worker(backend__timeouts__total_s=20)
    stage.rig.collect(limit_s=120)


def oversize(stage: Stage) -> None:
    """Some answers are larger than a message may be."""
    stage.rig.sim.control({"behaviours": [{"mode": "oversize", "bytes": 11_000_000, "match": {"body": "large"}}]})
    stage.rig.publish(stage.count(100), lambda index: chat(index, "large" if index % 10 == 0 else "small"))
    stage.worker()
    stage.rig.collect(limit_s=90)


def poison(stage: Stage) -> None:
    """Some prompts kill their connection, always; others go on coming, which tells a poison from an outage."""
    stage.rig.sim.control({"behaviours": [{"mode": "reset", "match": {"body": "poison"}}]})
    stage.rig.publish(stage.count(400, 100), lambda index: chat(index, "poison" if index % 50 == 7 else "good"))
    stage.worker(pubsub__max_delivery_attempts=3)
    for _ in range(120):
        stage.rig.collect(limit_s=1)
        if stage.rig.answers.count == stage.rig.sent:
            break
        stage.rig.publish(1)
    stage.rig.collect(limit_s=120)
