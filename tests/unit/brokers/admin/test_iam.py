"""Roles: who has which, and the command that grants it."""

import shlex
import subprocess
from pathlib import Path

import pytest

from worker.brokers.admin.iam import PUBLISHER, SUBSCRIBER, Need, State, grant_command, judge
from worker.brokers.admin.resources import Binding

DEAD, PULLED = "projects/q/topics/dead", "projects/p/subscriptions/worker"
AGENT = "serviceAccount:service-123456@gcp-sa-pubsub.iam.gserviceaccount.com"
WORKER = (
    "principal://iam.googleapis.com/projects/1/locations/global/workloadIdentityPools/p.svc.id.goog/subject/ns/n/sa/w"
)
OF_AGENT = Need(DEAD, PUBLISHER, None, "p", "to dead-letter anything")
OF_WORKER = Need(PULLED, SUBSCRIBER, WORKER, "p", "to pull requests")


def bound(role: str, *members: str) -> list[Binding]:
    return [Binding(role, frozenset(members))]


@pytest.mark.parametrize(
    ("need", "bindings", "state"),
    [
        (OF_AGENT, bound(PUBLISHER, AGENT), State.MET),
        (OF_AGENT, bound("roles/pubsub.editor", "user:a@b", AGENT), State.MET),
        (OF_AGENT, bound(SUBSCRIBER, AGENT), State.MISSING),
        (
            OF_AGENT,
            bound(PUBLISHER, "serviceAccount:service-1@gcp-sa-pubsub.iam.gserviceaccount.com.evil"),
            State.MISSING,
        ),
        (OF_AGENT, bound(PUBLISHER, "serviceAccount:service-1@gcp-sa-pubsubXiam.gserviceaccount.com"), State.MISSING),
        (OF_WORKER, bound(SUBSCRIBER, WORKER), State.MET),
        (OF_WORKER, bound(SUBSCRIBER, "allAuthenticatedUsers"), State.MET),
        (OF_WORKER, bound(SUBSCRIBER, AGENT), State.MISSING),
        (OF_WORKER, bound(PUBLISHER, WORKER), State.MISSING),
        (OF_WORKER, [*bound(PUBLISHER, WORKER), *bound("roles/pubsub.admin", WORKER)], State.MET),
        (OF_WORKER, [], State.MISSING),
        (OF_WORKER, None, State.UNKNOWN),
    ],
)
def test_a_policy_meets_a_need_or_not(need: Need, bindings: list[Binding] | None, state: State) -> None:
    """By the exact member and a role that contains what is needed; a policy one may not see says nothing."""
    assert judge(need, bindings) is state


def run_with_fake_gcloud(command: str, folder: Path) -> list[str]:
    """Run the command in a shell whose `gcloud` prints its arguments, or a project's number; return the arguments."""
    fake = folder / "gcloud"
    fake.write_text('#!/bin/sh\nif [ "$1" = projects ]; then echo 4711; else printf "%s\\n" "$@"; fi\n')
    fake.chmod(0o755)
    done = subprocess.run(
        ["/bin/sh", "-ec", command], env={"PATH": f"{folder}:/usr/bin:/bin"}, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


def test_the_command_for_a_known_member_can_be_pasted(tmp_path: Path) -> None:
    """A shell takes it as it stands: resource, its own project, member, role."""
    assert run_with_fake_gcloud(grant_command(OF_WORKER), tmp_path) == [
        *shlex.split("pubsub subscriptions add-iam-policy-binding worker --project=p"),
        f"--member={WORKER}",
        "--role=roles/pubsub.subscriber",
    ]


def test_the_command_for_the_agent_asks_for_the_projects_number(tmp_path: Path) -> None:
    """The agent belongs to the subscription's project, wherever the dead-letter topic is."""
    assert "gcloud projects describe p " in grant_command(OF_AGENT)
    assert run_with_fake_gcloud(grant_command(OF_AGENT), tmp_path) == [
        *shlex.split("pubsub topics add-iam-policy-binding dead --project=q"),
        "--member=serviceAccount:service-4711@gcp-sa-pubsub.iam.gserviceaccount.com",
        "--role=roles/pubsub.publisher",
    ]
