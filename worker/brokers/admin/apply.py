"""
`inference-worker setup`: make the topics and subscriptions a worker needs, or bring them to what the settings say.

For those without Terraform, and for emulators.  It looks first (`plan` compares), prints what it would do, and
does it; run again it finds nothing to do.  Nothing is ever deleted, and no protection is taken away without `--force`.
Roles are named but not granted: who may grant them is seldom who may create topics.

Exit codes: 0 everything is as wanted, or `--dry-run` has printed what would be done (whether that is much or nothing);
1 nothing or not all of it can be done, also in a dry run, and one line says why; 2 unusable settings.  Roles that are
missing do not change the exit code: they are printed with the commands that grant them.
"""

import asyncio
from collections.abc import Callable

from worker.brokers.admin.desired import PLACEHOLDERS, Desired, desired_by
from worker.brokers.admin.iam import Need, State, control_commands, grant_command, judge
from worker.brokers.admin.infrastructure import Infrastructure
from worker.brokers.admin.plan import Plan, Step, Verb, plan, show
from worker.brokers.admin.resources import Subscription, Topic, UnsupportedField
from worker.brokers.connection import async_channel, resolve
from worker.errors import WorkerError
from worker.settings.schema import Settings

Say = Callable[[str], object]
"""Takes text for standard output."""


async def run_setup(settings: Settings, *, dry_run: bool, force: bool, say: Say) -> int:
    """
    Print the plan and carry it out; return the exit code.

    Args:
        settings: In force.
        dry_run: Only look and print.
        force: Also carry out what weakens a policy.
        say: Takes the text.

    Raises:
        SettingsError: Names, numbers, credentials; permanent.
        WorkerError: It would weaken a policy, or something is in the way; permanent, nothing was changed.
        BrokerError: Refused (permanent) or unreachable (retryable); what was done until then stays, and setup can be
            run again.

    Cancellation: what was done until then stays.
    """
    names, credentials = await asyncio.to_thread(resolve, settings.pubsub)
    wanted = desired_by(settings, subscriptions=names.subscriptions, topic=names.topic)
    channel = async_channel(settings.pubsub, credentials)
    try:
        infrastructure = Infrastructure(channel, is_emulator=settings.pubsub.emulator_host is not None)
        steps = await _look(infrastructure, wanted)
        say(steps.render())
        _refuse(steps, force=force)
        if not dry_run:
            await _carry_out(infrastructure, steps, say)
        await _check_grants(infrastructure, wanted, say)
    finally:
        await channel.close(None)
    return 0


async def _look(infrastructure: Infrastructure, wanted: Desired) -> Plan:
    topics = {each.name: await infrastructure.find_topic(each.name) for each in wanted.topics}
    found = {each.name: await infrastructure.find_subscription(each.name) for each in wanted.subscriptions}
    return plan(wanted.topics, topics, wanted.subscriptions, found)


def _refuse(steps: Plan, *, force: bool) -> None:
    if steps.obstacles:
        names = ", ".join(step.name for step in steps.obstacles)
        raise WorkerError(f"nothing was changed, since something is in the way: {names}")
    if steps.weakenings and not force:
        fields = ", ".join(dict.fromkeys(f"setup.{change.field}" for _, change in steps.weakenings))
        raise WorkerError(
            f"nothing was changed, since it would weaken what exists; change {fields}, or repeat with --force"
        )


async def _carry_out(infrastructure: Infrastructure, steps: Plan, say: Say) -> None:
    lacks: list[UnsupportedField] = []
    for step in steps.steps:
        lacks += await _do(infrastructure, step)
    for lack in lacks:
        changes = next(step.changes for step in steps.steps if step.name == lack.name)
        value = show(lack.field, next(change.new for change in changes if change.field is lack.field))
        say(f"This server does not take {lack.field} {value} of {lack.name}: {lack.text}\n")
    lacking = {(lack.name, lack.field) for lack in lacks}
    done = [step for step in steps.steps if step.verb is Verb.CREATE]
    done += [
        step
        for step in steps.steps
        if step.verb is Verb.CHANGE and any((step.name, change.field) not in lacking for change in step.changes)
    ]
    say(f"{len(done)} created or changed.\n" if done else "Nothing to do.\n")


async def _do(infrastructure: Infrastructure, step: Step) -> list[UnsupportedField]:
    match step.verb, step.wanted:
        case Verb.CREATE, Topic() as topic:
            return await infrastructure.create_topic(topic)
        case Verb.CHANGE, Topic() as topic:
            return await infrastructure.update_topic(topic)
        case Verb.CREATE, Subscription() as subscription:
            return await infrastructure.create_subscription(subscription)
        case Verb.CHANGE, Subscription() as subscription:
            return await infrastructure.update_subscription(subscription, [change.field for change in step.changes])
    return []


async def _check_grants(infrastructure: Infrastructure, wanted: Desired, say: Say) -> None:
    """Say which roles are there and which are missing, with the command that grants them."""
    needs = wanted.needs
    if not await infrastructure.has_access_control(needs[0].resource, needs[0].permission):
        say("This server has no access control: no role is needed.\n")
        return
    for need in needs:
        say(await _grant(infrastructure, need))
    if wanted.control is not None:
        say(control_commands(wanted.control))
    members = {need.member for need in needs}
    for placeholder, (who, key) in PLACEHOLDERS.items():
        if placeholder in members:
            say(f"The roles of {who} are those of the credentials of this command; {key} names another.\n")


async def _grant(infrastructure: Infrastructure, need: Need) -> str:
    if need.member in PLACEHOLDERS:
        own = await infrastructure.own_permissions(need.resource, [need.permission])
        state, who = State.MET if own else State.MISSING, PLACEHOLDERS[need.member][0]
    else:
        state, who = judge(need, await infrastructure.bindings(need.resource)), need.who
    if state is State.MET:
        return f"= {need.role} on {need.resource}: {who}\n"
    known = "it is not granted there" if state is State.MISSING else "the IAM policy may not be looked at"
    return f"? {need.role} on {need.resource}: {who} needs it {need.reason}; {known}\n{grant_command(need)}\n"
