"""
Who needs which role on what, who has it, and the command that grants it.  Pure.

Pub/Sub itself dead-letters through a service agent of the subscription's project, which needs two roles that it
does not have by default; without them a message that used up its attempts is delivered for ever
(https://cloud.google.com/pubsub/docs/handling-failures#grant_forwarding_permissions).
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from worker.brokers.admin.resources import Binding

SUBSCRIBER, PUBLISHER, VIEWER = "roles/pubsub.subscriber", "roles/pubsub.publisher", "roles/pubsub.viewer"
PERMISSIONS = {
    SUBSCRIBER: "pubsub.subscriptions.consume",
    PUBLISHER: "pubsub.topics.publish",
    VIEWER: "pubsub.subscriptions.get",
}
"""What each role is needed for (https://cloud.google.com/pubsub/docs/access-control#roles)."""
ATTACH = "pubsub.topics.attachSubscription"
"""What the subscriber's role on a topic is needed for: to make a subscription to it."""
CONTROL_PERMISSIONS = ("pubsub.subscriptions.consume", "pubsub.subscriptions.create", "pubsub.subscriptions.delete")
"""What a worker needs in the project to hear the control topic; no predefined role has these three alone."""
AGENT_DOMAIN = "gcp-sa-pubsub.iam.gserviceaccount.com"
EVERYBODY = frozenset({"allUsers", "allAuthenticatedUsers"})

_WIDER = frozenset({"roles/pubsub.editor", "roles/pubsub.admin"})
"""Roles that contain each of the three."""
_AGENT = re.compile(rf"serviceAccount:service-\d+@{re.escape(AGENT_DOMAIN)}")


@dataclass(frozen=True, slots=True)
class Need:
    """A role that an account needs on one topic or subscription."""

    resource: str
    """Full name."""
    role: str
    member: str | None
    """As IAM writes it; `None`: Pub/Sub's service agent of `project`."""
    project: str
    """Project id of the request subscription."""
    reason: str

    @property
    def permission(self) -> str:
        """What the role is needed for."""
        if self.role == SUBSCRIBER and self.resource.split("/")[2] == "topics":
            return ATTACH
        return PERMISSIONS[self.role]

    @property
    def who(self) -> str:
        """The member for people."""
        return self.member or f"Pub/Sub's service agent of {self.project}"


class State(StrEnum):
    """What is known about a need."""

    MET = "met"
    MISSING = "missing"
    UNKNOWN = "unknown"
    """The IAM policy may not be looked at."""


def judge(need: Need, bindings: Iterable[Binding] | None) -> State:
    """
    Say whether a resource's own IAM policy meets a need.

    Roles given on the project, to a group or by a custom role are not seen, so `MISSING` means "not here".

    Args:
        need: For the service agent (no member) any project's counts, since a policy shows numbers and not ids.
        bindings: Without those under a condition; `None`: the policy may not be looked at.
    """
    if bindings is None:
        return State.UNKNOWN
    for binding in bindings:
        if binding.role == need.role or binding.role in _WIDER:
            if binding.members & EVERYBODY or need.member in binding.members:
                return State.MET
            if need.member is None and any(_AGENT.fullmatch(member) for member in binding.members):
                return State.MET
    return State.MISSING


def grant_command(need: Need) -> str:
    """Return the shell command that meets a need."""
    _, project, collection, short = need.resource.split("/")
    who = need.member
    if who is None:
        number = f"$(gcloud projects describe {need.project} --format='value(projectNumber)')"
        who = f"serviceAccount:service-{number}@{AGENT_DOMAIN}"
    return (
        f"    gcloud pubsub {collection} add-iam-policy-binding {short} --project={project} \\\n"
        f'        --member="{who}" --role={need.role}'
    )


@dataclass(frozen=True, slots=True)
class Control:
    """Who makes subscriptions to the control topic, and where."""

    project: str
    member: str


def control_commands(control: Control) -> str:
    """Return what is said about the permissions of a worker that hears the control topic: they are not checked."""
    return (
        f"? {', '.join(CONTROL_PERMISSIONS)} in {control.project}: the worker needs them to hear the control topic; "
        "not checked\n"
        f"    gcloud iam roles create inferenceControl --project={control.project} \\\n"
        f"        --permissions={','.join(CONTROL_PERMISSIONS)}\n"
        f"    gcloud projects add-iam-policy-binding {control.project} \\\n"
        f'        --member="{control.member}" --role=projects/{control.project}/roles/inferenceControl\n'
    )
