"""Disasters of the broker: it goes away, refuses, forgets what it was told, and delivers twice."""

import time

import grpc

from tests.chaos.stage import Stage

AWAY = ("Publish", "Acknowledge", "ModifyAckDeadline", "StreamingPull")
LEASE_S = 60.0
"""The subscription's ack deadline (`tests.support.rig`), and as far as leases are extended."""


def streams_drop(stage: Stage) -> None:
    """The pull is ended and cannot be opened again at once, over and over."""
    stage.publish(2000)
    stage.worker()
    stage.answer_some(0.2)
    for _ in range(stage.count(10, 3)):
        stage.broker.faults.fail("StreamingPull", grpc.StatusCode.UNAVAILABLE, times=2)
        stage.broker.faults.break_streams(grpc.StatusCode.UNAVAILABLE, subscription_path=stage.rig.request_subscription)
        stage.rig.collect(stage.rig.answers.count + 20, 10)
    stage.mended()
    stage.rig.collect(limit_s=100)


def restarts(stage: Stage) -> None:
    """The server ends with every connection, its port refuses for a while, and it comes back with what it held."""
    stage.rig.sim.control({"settings": {"latency": "200ms"}})
    stage.publish(3000, least=900)
    stage.worker()
    stage.answer_some(0.3)
    for _ in range(stage.count(4, 2)):
        stage.broken()
        stage.broker.go_away()
        time.sleep(stage.seconds(20, 2))
        stage.broker.come_back()
        stage.mended()
        stage.rig.collect(stage.rig.answers.count + 150, 60)
    stage.rig.collect(limit_s=150)


def unreachable(stage: Stage) -> None:
    """Connections stand, and nothing asked of the broker is done: no pull, no publish, no ack, no lease kept."""
    stage.rig.sim.control({"settings": {"latency": "200ms"}})
    stage.publish(1500, least=600)
    stage.worker()
    stage.answer_some(0.3)
    stage.broken()
    for method in AWAY:
        stage.broker.faults.fail(method, grpc.StatusCode.UNAVAILABLE)
    stage.broker.faults.break_streams(grpc.StatusCode.UNAVAILABLE)
    stage.rig.collect_during(stage.seconds(90, 8))
    stage.broker.faults.clear()
    stage.mended()
    stage.rig.collect(limit_s=150)


def acks_fail(stage: Stage) -> None:
    """Acks are refused for a time; what was answered comes again and must not be answered again."""
    stage.broker.faults.fail("Acknowledge", grpc.StatusCode.UNAVAILABLE, times=stage.count(60, 8))
    stage.publish(600, least=60)
    stage.worker()
    stage.rig.collect(limit_s=100)
    stage.rig.collect_rest(3)


def duplicates(stage: Stage) -> None:
    """Every message comes a second time while it is in flight, and again when it is answered: no ack is taken."""
    stage.rig.sim.control({"settings": {"latency": "2s"}})
    stage.publish(200, least=60)
    worker = stage.worker()
    worker.wait_started()
    stage.rig.collect_during(0.7)
    stage.broker.faults.fail("Acknowledge", grpc.StatusCode.INTERNAL, times=stage.count(50, 10))
    for _ in range(3):  # what is in flight, what waits, what was answered a moment ago
        stage.broker.advance(LEASE_S + 1)
        stage.rig.collect_during(1.3)
    stage.rig.collect(limit_s=60)
    stage.broker.faults.clear("Acknowledge")
    stage.mended()
    stage.broker.advance(LEASE_S + 1)
    stage.rig.collect_rest(3)
    for kind in ("in_flight", "answered"):
        stage.demand(f"duplicates {kind}", worker.metric("inference_worker_duplicates_total", kind=kind))


def topic_deleted(stage: Stage) -> None:
    """
    The response topic is gone for a while; nothing is generated meanwhile.

    The worker is frozen while the topic and its subscription come back: what is published to a topic that has no
    subscription yet is kept nowhere, whichever publisher sends it.
    """
    stage.rig.sim.control({"settings": {"latency": "200ms"}})
    stage.publish(1500, least=600)
    worker = stage.worker()
    stage.answer_some(0.3)
    admin, rig = stage.rig.admin, stage.rig
    stage.broken()
    admin.publisher.delete_topic(request={"topic": rig.responses})
    rig.collect_during(stage.seconds(20, 3))
    rig.collect_rest(0.5)  # what the old topic had taken is still in its subscription
    stage.demand("the pause", worker.metric("inference_worker_intake_paused", reason="publish") == 1)
    before = rig.response_subscription
    with worker.frozen():
        rig.collect_during(0.5)  # what was on its way to the broker is refused before the topic is there
        admin.publisher.create_topic(request={"name": rig.responses})
        rig.response_subscription = admin.subscription(rig.responses)
    stage.mended()
    rig.collect(limit_s=60)
    if rig.answers.count < rig.sent:  # a pull that was just given up has some of the old ones: they come again
        rig.response_subscription = before
        rig.collect(limit_s=40)


def publish_refused(stage: Stage) -> None:
    """Publishing is forbidden for a while; nothing is generated meanwhile."""
    stage.rig.sim.control({"settings": {"latency": "200ms"}})
    stage.publish(1500, least=600)
    worker = stage.worker()
    stage.answer_some(0.3)
    stage.broken()
    stage.broker.faults.fail("Publish", grpc.StatusCode.PERMISSION_DENIED)
    stage.rig.collect_during(1.5)
    asked = stage.rig.stats()["requests"]
    stage.rig.collect_during(stage.seconds(30, 3))
    stage.demand("the pause", worker.metric("inference_worker_intake_paused", reason="publish") == 1)
    stage.demand("a backend that is left alone meanwhile", stage.rig.stats()["requests"] == asked)
    stage.broker.faults.clear("Publish")
    stage.mended()
    stage.rig.collect(limit_s=100)
