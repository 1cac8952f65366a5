"""Setup against a server with access control: what is done, what is refused, which roles are named."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc
import pytest

from tests.support.guarded_pubsub import GuardedPubSub
from worker.brokers.admin import run_setup
from worker.brokers.admin.infrastructure import Infrastructure
from worker.brokers.admin.resources import Field, Subscription, Topic
from worker.errors import BrokerError, BrokerResourceError, WorkerError
from worker.settings.schema import Settings

REQUESTS, RESPONSES = "projects/p/topics/requests", "projects/p/topics/responses"
PULLED, DEAD = "projects/p/subscriptions/worker", "projects/p/topics/requests-dead-letters"
AGENT = "serviceAccount:service-42@gcp-sa-pubsub.iam.gserviceaccount.com"
WORKER = "serviceAccount:worker@p.iam.gserviceaccount.com"
CHANGING = ("CreateTopic", "UpdateTopic", "CreateSubscription", "UpdateSubscription")


@dataclass
class Bench:
    """A server and what setup said about it."""

    server: GuardedPubSub

    async def setup(
        self, *, dry_run: bool = False, force: bool = False, sections: dict[str, Any] | None = None, **setup: Any
    ) -> str:
        said: list[str] = []
        sections = sections or {}
        settings = Settings.model_validate(
            {
                "pubsub": {
                    "project_id": "p",
                    "request_subscription": "worker",
                    "response_topic": "responses",
                    "emulator_host": self.server.address,
                    **sections.pop("pubsub", {}),
                },
                **sections,
                "setup": {"request_topic": "requests", **setup},
            }
        )
        assert await run_setup(settings, dry_run=dry_run, force=force, say=said.append) == 0
        return "".join(said)

    def changes(self) -> int:
        """How many changing calls the server has seen."""
        return sum(self.server.calls[name] for name in CHANGING)


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    """A server that holds nothing."""
    async with GuardedPubSub() as server:
        yield Bench(server)


@pytest.fixture
async def cloud(bench: Bench) -> AsyncIterator[Infrastructure]:
    """The same server, taken for the real service."""
    async with grpc.aio.insecure_channel(bench.server.address) as channel:
        yield Infrastructure(channel, is_emulator=False)


async def test_a_second_run_changes_nothing(bench: Bench, cloud: Infrastructure) -> None:
    """The first makes everything, as wanted; the second finds it so."""
    assert "+ subscription" in await bench.setup()
    found = await cloud.find_subscription(PULLED)
    assert found is not None
    assert (found.topic, found.policy[Field.DEAD_LETTER_TOPIC], found.policy[Field.EXPIRY]) == (REQUESTS, DEAD, None)
    made = bench.changes()
    assert "5 as wanted\nNothing to do.\n" in await bench.setup()
    assert bench.changes() == made == 5


async def test_a_dry_run_only_looks(bench: Bench) -> None:
    """It prints what the real one prints before its result, and nothing exists afterwards."""
    dry = await bench.setup(dry_run=True)
    assert bench.changes() == 0
    plan, _, _ = dry.partition("?")
    assert plan.endswith("5 to create\n")
    assert (await bench.setup()).startswith(plan)


async def test_only_what_differs_is_changed(bench: Bench, cloud: Infrastructure) -> None:
    """One update for one subscription; its other fields stay what they were."""
    await bench.setup()
    told = await bench.setup(ack_deadline_s=90, max_delivery_attempts=30)
    assert "max_delivery_attempts  20 -> 30" in told
    assert bench.server.calls["UpdateSubscription"] == 2, "request and hold subscription have the deadline"
    found = await cloud.find_subscription(PULLED)
    assert found is not None
    assert [
        found.policy[each] for each in (Field.ACK_DEADLINE, Field.MAX_DELIVERY_ATTEMPTS, Field.MAXIMUM_BACKOFF)
    ] == [
        90,
        30,
        600,
    ]


async def test_nothing_is_weakened_without_force(bench: Bench, cloud: Infrastructure) -> None:
    """Not even what else could have been changed; the settings to change are named. With force it is done."""
    await bench.setup()
    made = bench.changes()
    with pytest.raises(WorkerError, match=r"setup\.retention_s, setup\.max_delivery_attempts, or repeat with --force"):
        await bench.setup(retention_s=3600, max_delivery_attempts=5, ack_deadline_s=90)
    assert bench.changes() == made
    with pytest.raises(WorkerError, match="would weaken"):
        await bench.setup(dry_run=True, retention_s=3600)
    await bench.setup(retention_s=3600, max_delivery_attempts=5, force=True)
    found = await cloud.find_subscription(PULLED)
    assert found is not None
    assert (found.policy[Field.RETENTION], found.policy[Field.MAX_DELIVERY_ATTEMPTS]) == (3600, 5)


async def test_a_dead_letter_policy_goes_by_force_only(bench: Bench, cloud: Infrastructure) -> None:
    """And then it is gone, both fields of it."""
    await bench.setup()
    with pytest.raises(WorkerError, match=r"setup\.dead_letter_topic"):
        await bench.setup(dead_letter_topic="")
    await bench.setup(dead_letter_topic="", force=True)
    found = await cloud.find_subscription(PULLED)
    assert found is not None
    assert found.policy[Field.DEAD_LETTER_TOPIC] is found.policy[Field.MAX_DELIVERY_ATTEMPTS] is None


async def test_a_subscription_to_another_topic_stops_it(bench: Bench, cloud: Infrastructure) -> None:
    """Whatever the force: what is in the way is named, and nothing is made around it."""
    await cloud.create_topic(Topic(RESPONSES))
    await cloud.create_subscription(Subscription(PULLED, RESPONSES, {}))
    made = bench.changes()
    with pytest.raises(WorkerError, match=f"in the way: {PULLED}"):
        await bench.setup(force=True)
    assert bench.changes() == made


async def test_missing_roles_are_named_with_their_commands(bench: Bench) -> None:
    """Each need once, who has it already without a command."""
    bench.server.bind(PULLED, "roles/pubsub.subscriber", AGENT, WORKER)
    bench.server.bind(RESPONSES, "roles/pubsub.publisher", WORKER, condition="request.time < timestamp('2020-01-01')")
    told = await bench.setup(worker_member=WORKER)
    roles = [line for line in told.splitlines() if "roles/" in line and line[0] in "=?"]
    assert [(line[0], *line[2:].partition(":")[0].split(" on ")) for line in roles] == [
        ("?", "roles/pubsub.publisher", DEAD),
        ("=", "roles/pubsub.subscriber", PULLED),
        ("=", "roles/pubsub.subscriber", PULLED),
        ("?", "roles/pubsub.publisher", RESPONSES),
        ("?", "roles/pubsub.viewer", PULLED),
    ], "a role under a condition does not count"
    assert told.count("add-iam-policy-binding") == 3
    assert f'--member="{WORKER}" --role=roles/pubsub.viewer' in told


async def test_without_a_member_the_own_permissions_are_looked_at(bench: Bench) -> None:
    """And it is said whose they are; the command has a placeholder."""
    bench.server.permissions[PULLED] = ["pubsub.subscriptions.consume"]
    told = await bench.setup()
    assert f"= roles/pubsub.subscriber on {PULLED}: the worker\n" in told
    assert f"? roles/pubsub.publisher on {RESPONSES}: the worker needs it to publish answers" in told
    assert '--member="WORKER_MEMBER"' in told
    assert "are those of the credentials of this command; setup.worker_member names another" in told


async def test_a_policy_that_may_not_be_looked_at_is_no_failure(bench: Bench) -> None:
    """The commands are printed all the same."""
    bench.server.refusals["GetIamPolicy"] = (grpc.StatusCode.PERMISSION_DENIED, "no")
    told = await bench.setup(worker_member=WORKER)
    assert told.count("the IAM policy may not be looked at") == told.count("add-iam-policy-binding") == 5


@pytest.mark.parametrize(
    ("method", "code", "kind", "words"),
    [
        ("GetTopic", grpc.StatusCode.UNAVAILABLE, BrokerError, "cannot be reached, run setup again later"),
        ("GetTopic", grpc.StatusCode.UNAUTHENTICATED, BrokerResourceError, "UNAUTHENTICATED: words"),
        ("CreateTopic", grpc.StatusCode.PERMISSION_DENIED, BrokerResourceError, "roles/pubsub.editor"),
        ("CreateTopic", grpc.StatusCode.ALREADY_EXISTS, BrokerError, "created meanwhile by another caller"),
        ("CreateSubscription", grpc.StatusCode.RESOURCE_EXHAUSTED, BrokerResourceError, "RESOURCE_EXHAUSTED: words"),
        ("TestIamPermissions", grpc.StatusCode.INTERNAL, BrokerResourceError, "INTERNAL: words"),
    ],
)
async def test_a_refusal_is_a_sentence(
    bench: Bench, method: str, code: grpc.StatusCode, kind: type[BrokerError], words: str
) -> None:
    """With the name of what it is about, and what to do where that is known; after it setup can be run again."""
    bench.server.refusals[method] = (code, "words")
    with pytest.raises(kind, match=words) as caught:
        await bench.setup()
    assert "projects/p/" in str(caught.value)
    bench.server.refusals.clear()
    assert "pubsub" in await bench.setup()


async def test_the_real_service_may_not_leave_a_field_out(cloud: Infrastructure) -> None:
    """What an emulator does not take is skipped and told; from the service it is an error."""
    await cloud.create_topic(Topic(REQUESTS))
    with pytest.raises(BrokerResourceError, match="INVALID_ARGUMENT"):
        await cloud.create_subscription(Subscription(PULLED, REQUESTS, {Field.ACK_DEADLINE: 700}))
    assert await cloud.find_subscription(PULLED) is None


async def test_an_emulator_may_lack_several_fields(bench: Bench) -> None:
    """It gets the subscription with what it takes, and what it lacks is listed in its own words."""
    async with grpc.aio.insecure_channel(bench.server.address) as channel:
        emulator = Infrastructure(channel, is_emulator=True)
        await emulator.create_topic(Topic(REQUESTS))
        wanted = {Field.ACK_DEADLINE: 700, Field.RETENTION: 1, Field.MINIMUM_BACKOFF: 3, Field.MAXIMUM_BACKOFF: 4}
        lacks = await emulator.create_subscription(Subscription(PULLED, REQUESTS, wanted))
        assert {lack.field for lack in lacks} == {Field.ACK_DEADLINE, Field.RETENTION}
        assert all(lack.text for lack in lacks)
        found = await emulator.find_subscription(PULLED)
    assert found is not None
    assert (found.policy[Field.ACK_DEADLINE], found.policy[Field.MAXIMUM_BACKOFF]) == (10, 4)


async def test_the_control_topic_is_made_and_made_to_keep_its_messages(bench: Bench, cloud: Infrastructure) -> None:
    """Only where the settings name one; and what its workers need is said."""
    control = "projects/p/topics/control"
    told = await bench.setup()
    assert "control" not in told
    named = {"pubsub": {"control_topic": "control"}}
    told = await bench.setup(sections=named)
    assert f"+ topic {control}\n    retention_s            86400 (1 days)\n" in told
    assert await cloud.find_topic(control) == Topic(control, 86_400)
    assert f"? roles/pubsub.subscriber on {control}: the worker needs it to make a subscription to it" in told
    assert "pubsub.subscriptions.create, pubsub.subscriptions.delete in p: the worker needs them" in told
    assert '--member="WORKER_MEMBER" --role=projects/p/roles/inferenceControl' in told
    made = bench.changes()
    assert "Nothing to do." in await bench.setup(sections={"pubsub": {"control_topic": "control"}})
    assert bench.changes() == made
    longer = {"pubsub": {"control_topic": "control", "control_remember_s": 172_800}}
    assert "86400 (1 days) -> 172800 (2 days)" in await bench.setup(sections=longer)
    assert await cloud.find_topic(control) == Topic(control, 172_800)


async def test_an_emulator_may_not_keep_messages_of_a_topic(bench: Bench) -> None:
    """The topic is made without, and it is said."""
    async with grpc.aio.insecure_channel(bench.server.address) as channel:
        emulator = Infrastructure(channel, is_emulator=True)
        lacks = await emulator.create_topic(Topic("projects/p/topics/control", 5))
        assert [(lack.name, lack.field) for lack in lacks] == [("projects/p/topics/control", Field.RETENTION)]
        assert await emulator.find_topic("projects/p/topics/control") == Topic("projects/p/topics/control")
        lacks = await emulator.update_topic(Topic("projects/p/topics/control", 5))
        assert [lack.field for lack in lacks] == [Field.RETENTION]


async def test_subscriptions_of_batches_are_made(bench: Bench, cloud: Infrastructure) -> None:
    """With the filter for their lines; the roles are those of an account of its own."""
    sections = {"batches": {"response_subscription": "batches", "dead_letter_subscription": "dead-batches"}}
    bench.server.bind("projects/p/subscriptions/batches", "roles/pubsub.subscriber", WORKER)
    told = await bench.setup(sections=sections, batches_member=WORKER)
    for name, topic in (("batches", RESPONSES), ("dead-batches", DEAD)):
        found = await cloud.find_subscription(f"projects/p/subscriptions/{name}")
        assert found is not None
        assert (found.topic, found.filter) == (topic, 'hasPrefix(attributes.run_id, "batch_")')
        assert found.policy[Field.EXPIRY] is None
    assert f"= roles/pubsub.subscriber on projects/p/subscriptions/batches: {WORKER}\n" in told
    assert f"? roles/pubsub.publisher on {REQUESTS}: {WORKER} needs it to publish lines of batches" in told
