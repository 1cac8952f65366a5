"""`inference-worker setup`, as a person runs it, against every broker there is."""

import json
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from google.api_core import exceptions

from tests.conformance.conftest import Broker
from worker.cli.main import run_command

Setup = Callable[..., int]
MAX_EMULATOR_RETENTION_S = 604_800
"""Google's emulator takes no longer one; the service takes 31 days."""


@pytest.fixture
def tag() -> str:
    """What makes the names of this test new."""
    return uuid.uuid4().hex[:12]


@pytest.fixture
def setup(broker: Broker, tag: str, tmp_path: Path) -> Setup:
    """Run the command with these settings of the section `setup`; return its exit code."""

    def run(*flags: str, **section: object) -> int:
        config = tmp_path / "worker.yaml"
        config.write_text(
            yaml.safe_dump(
                {
                    "pubsub": {
                        "project_id": broker.admin.project,
                        "emulator_host": broker.address,
                        "request_subscription": f"worker-{tag}",
                        "response_topic": f"responses-{tag}",
                    },
                    "setup": {
                        "request_topic": f"requests-{tag}",
                        "response_subscription": f"collect-{tag}",
                        "dead_letter_retention_s": MAX_EMULATOR_RETENTION_S,
                        **section,
                    },
                }
            )
        )
        return run_command(["setup", "--config", str(config), *flags])

    return run


def name(broker: Broker, collection: str, short: str) -> str:
    return f"projects/{broker.admin.project}/{collection}/{short}"


def test_it_makes_what_a_worker_needs(
    broker: Broker, tag: str, setup: Setup, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every value is the server's after it; a second run finds nothing to do and says so."""
    assert setup() == 0
    assert "6 to create" in capsys.readouterr().out
    made = broker.admin.subscriber.get_subscription(
        request={"subscription": name(broker, "subscriptions", f"worker-{tag}")}
    )
    assert made.topic == name(broker, "topics", f"requests-{tag}")
    assert made.ack_deadline_seconds == 20
    assert made.message_retention_duration.total_seconds() == 604_800
    assert "ttl" not in made.expiration_policy
    assert (made.retry_policy.minimum_backoff.seconds, made.retry_policy.maximum_backoff.seconds) == (10, 600)
    assert made.dead_letter_policy.dead_letter_topic == name(broker, "topics", f"requests-{tag}-dead-letters")
    assert made.dead_letter_policy.max_delivery_attempts == 20
    assert setup() == 0
    told = capsys.readouterr().out
    assert "6 as wanted\nNothing to do.\nThis server has no access control" in told


def test_a_dry_run_makes_nothing(broker: Broker, tag: str, setup: Setup, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit 0, the plan, and the server as empty as before."""
    assert setup("--dry-run") == 0
    assert f"+ topic {name(broker, 'topics', f'requests-{tag}')}\n" in capsys.readouterr().out
    with pytest.raises(exceptions.NotFound):
        broker.admin.publisher.get_topic(request={"topic": name(broker, "topics", f"requests-{tag}")})


def test_an_older_setup_is_brought_up_to_date(
    broker: Broker, tag: str, setup: Setup, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is stricter is set without asking; what is weaker only by force, with exit 1 and the reason before."""
    assert setup(max_delivery_attempts=10, retention_s=3600) == 0
    assert setup() == 0
    assert "max_delivery_attempts  10 -> 20\n" in capsys.readouterr().out
    assert setup(max_delivery_attempts=10) == 1
    told = capsys.readouterr()
    assert told.err.startswith("inference-worker: nothing was changed, since it would weaken what exists")
    assert "Traceback" not in told.err
    assert setup("--force", max_delivery_attempts=10) == 0
    made = broker.admin.subscriber.get_subscription(
        request={"subscription": name(broker, "subscriptions", f"worker-{tag}")}
    )
    assert made.dead_letter_policy.max_delivery_attempts == 10


def test_a_retention_the_server_lacks_is_told_and_the_rest_is_made(
    broker: Broker, tag: str, setup: Setup, capsys: pytest.CaptureFixture[str]
) -> None:
    """31 days are too many for Google's emulator: it is said in its words, and the hold subscription stands all the same."""
    assert setup(dead_letter_retention_s=2_678_400) == 0
    hold = name(broker, "subscriptions", f"requests-{tag}-dead-letters-hold")
    made = broker.admin.subscriber.get_subscription(request={"subscription": hold})
    is_lacking = f"does not take retention_s 2678400 (31 days) of {hold}: " in capsys.readouterr().out
    assert is_lacking == (made.message_retention_duration.total_seconds() == 604_800)
    assert is_lacking == (broker.name == "emulator")
    assert setup(dead_letter_retention_s=2_678_400) == 0
    assert "Nothing to do.\n" in capsys.readouterr().out, "what cannot be had is no change"


@pytest.mark.slow
def test_what_runs_out_of_attempts_lies_in_the_hold_subscription(broker: Broker, tag: str, setup: Setup) -> None:
    """The whole way of a dead letter, with five attempts and no backoff worth the name."""
    assert setup(max_delivery_attempts=5, minimum_backoff_s=0, maximum_backoff_s=0, ack_deadline_s=10) == 0
    worker = name(broker, "subscriptions", f"worker-{tag}")
    broker.admin.publish(name(broker, "topics", f"requests-{tag}"), json.dumps({"poison": 1}).encode())
    until = time.monotonic() + 30
    hold = name(broker, "subscriptions", f"requests-{tag}-dead-letters-hold")
    dead: list[bytes] = []
    while not dead and time.monotonic() < until:
        for item in broker.admin.pull(worker, timeout=2.0):
            broker.admin.subscriber.modify_ack_deadline(
                request={"subscription": worker, "ack_ids": [item.ack_id], "ack_deadline_seconds": 0}
            )
        dead = [message.data for message in broker.admin.take_once(hold, timeout=0.2)]
    assert dead == [b'{"poison": 1}']


def test_a_push_subscription_is_in_the_way(
    broker: Broker, tag: str, setup: Setup, capsys: pytest.CaptureFixture[str]
) -> None:
    """The worker could not pull from it: exit 1, the reason, nothing made. The embedded server cannot push at all."""
    topic = name(broker, "topics", f"requests-{tag}")
    broker.admin.publisher.create_topic(request={"name": topic})
    fields = {"name": name(broker, "subscriptions", f"worker-{tag}"), "topic": topic}
    try:
        broker.admin.subscriber.create_subscription(request={**fields, "push_config": {"push_endpoint": "http://x/"}})
    except exceptions.MethodNotImplemented:
        broker.admin.publisher.create_topic(request={"name": topic + "-other"})
        broker.admin.subscriber.create_subscription(request={**fields, "topic": topic + "-other"})
    assert setup() == 1
    told = capsys.readouterr()
    assert "! subscription" in told.out
    assert "in the way" in told.err
    with pytest.raises(exceptions.NotFound):
        broker.admin.publisher.get_topic(request={"topic": name(broker, "topics", f"responses-{tag}")})
