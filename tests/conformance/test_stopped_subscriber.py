"""What comes after a subscriber that has stopped: nothing is given to it any more."""

import asyncio

import pytest

from tests.conformance.conftest import Broker
from tests.conformance.test_subscriber import Exam, ack

pytestmark = pytest.mark.slow

BURSTS, BURST = 8, 3
ROUNDS = 3


async def test_a_stopped_subscriber_is_given_nothing(broker: Broker) -> None:
    """Started again and again, a worker gets all of what is published, at the first attempt and at once."""
    topic = broker.admin.topic()
    subscription = broker.admin.subscription(topic, dead_letter=(broker.admin.topic("dead"), 20))
    for _ in range(ROUNDS):
        exam = Exam(broker, subscription)
        async with exam.run(ack):
            for burst in range(1, BURSTS + 1):  # Google's emulator gives a whole burst to the stream that looks first
                for _ in range(BURST):
                    await asyncio.to_thread(broker.admin.publish, topic, b"x")
                await exam.until(burst * BURST, 5)
        assert {message.delivery_attempt for message in exam.seen} == {1}
