"""Hooks: chained by name, bounded in time and threads, and never able to make things worse than the table."""

import asyncio
import gc
import importlib
import sys
import threading
from dataclasses import replace
from importlib.metadata import EntryPoint, distributions

import pytest

from worker.errors import SettingsError
from worker.policy.engine import ErrorPolicy
from worker.policy.hook import GROUP, Hook, HookError, HookOutcome, HookRunner, chain, load_hooks
from worker.policy.model import Decision, Disposition, ErrorClass, ErrorEvent, Phase

EVENT = ErrorEvent(backend="b", path="/v1/chat/completions", phase=Phase.BODY, status=500)
DEFAULT = Decision(
    disposition=Disposition.NACK, error_class=ErrorClass.SERVER_ERROR, rule="builtin:server_error", reply_status=500
)


def to(disposition: Disposition, name: str = "h", **changes) -> Hook:
    """A hook that wants something else done."""
    return Hook(name, lambda _, default: replace(default, disposition=disposition, **changes))


def raising(error: BaseException, name: str = "bad") -> Hook:
    """A hook that fails."""

    def decide(_event, _default):
        raise error

    return Hook(name, decide)


class Hanging:
    """A hook that does not come back before it is let go."""

    def __init__(self) -> None:
        self.entered = threading.Semaphore(0)
        self.released = threading.Event()

    def __call__(self, event: ErrorEvent, default: Decision) -> None:
        self.entered.release()
        self.released.wait(30)


async def until_none_hangs(runner: HookRunner) -> None:
    """Wait until every thread that hung has come back."""
    async with asyncio.timeout(5):
        while runner.hanging:  # noqa: ASYNC110 the runner offers a number, no event
            await asyncio.sleep(0)


@pytest.fixture
def hanging():
    """A hanging hook, let go at the end."""
    hook = Hanging()
    yield hook
    hook.released.set()


def test_a_hook_may_overrule():
    """What a hook decides stands, and the rule names the hook."""
    report = chain([to(Disposition.REPLY)], EVENT, DEFAULT)
    assert (report.decision.disposition, report.decision.rule) == (Disposition.REPLY, "hook:h")
    assert (report.outcome, report.hook) == (HookOutcome.OVERRIDDEN, "h")


def test_none_and_the_default_itself_leave_the_default():
    """A hook that has nothing to say returns `None` or what it was given."""
    for hook in (Hook("n", lambda *_: None), Hook("same", lambda _, default: default)):
        report = chain([hook], EVENT, DEFAULT)
        assert report.decision is DEFAULT
        assert report.outcome is HookOutcome.DEFAULT


def test_each_hook_sees_what_the_one_before_it_decided():
    """A chain refines: the second hook is shown the first one's decision as the default."""
    seen = []
    second = Hook("b", lambda _, default: seen.append(default.rule))
    report = chain([to(Disposition.HOLD, "a"), second], EVENT, DEFAULT)
    assert seen == ["hook:a"]
    assert (report.decision.rule, report.hook) == ("hook:a", "a")


@pytest.mark.parametrize("result", ["reply", 7, Disposition.REPLY, {}])
def test_something_else_than_a_decision_is_a_failure(result):
    """Only a decision counts; anything else falls back to the default and is counted."""
    report = chain([Hook("h", lambda *_: result)], EVENT, DEFAULT)
    assert report.decision is DEFAULT
    assert (report.outcome, report.hook) == (HookOutcome.RAISED, "h")


def test_a_failure_discards_the_whole_chain():
    """Half of a chain is what nobody configured: the default decides."""
    report = chain([to(Disposition.REPLY, "a"), raising(KeyError("k"), "b")], EVENT, DEFAULT)
    assert report.decision is DEFAULT
    assert (report.outcome, report.hook, report.detail) == (HookOutcome.RAISED, "b", "KeyError: 'k'")


def test_a_hook_cannot_turn_an_error_into_a_success():
    """Without a class or with a success status the default's stand in: an error is answered as one."""
    decision = chain([to(Disposition.REPLY, error_class=None, reply_status=200)], EVENT, DEFAULT).decision
    assert (decision.error_class, decision.reply_status) == (ErrorClass.SERVER_ERROR, 500)


def test_a_hook_cannot_uncover_what_is_covered():
    """What a backend says about our credentials stays out of the answer."""
    covered = replace(DEFAULT, error_class=ErrorClass.AUTH, expose_backend=False, verbatim=False)
    decision = chain([to(Disposition.REPLY, expose_backend=True, verbatim=True)], EVENT, covered).decision
    assert (decision.expose_backend, decision.verbatim) == (False, False)


async def test_the_runner_returns_what_the_chain_decides():
    """In its thread a hook decides the same as outside."""
    report = await HookRunner([to(Disposition.REPLY)]).ask(EVENT, DEFAULT)
    assert report.decision.disposition is Disposition.REPLY


@pytest.mark.parametrize("error", [ValueError("x"), SystemExit(3), KeyboardInterrupt(), RecursionError()])
async def test_whatever_a_hook_raises_ends_in_the_default(error):
    """Not even an exit of the interpreter gets out of the thread."""
    report = await HookRunner([raising(error)]).ask(EVENT, DEFAULT)
    assert report.decision is DEFAULT
    assert report.outcome is HookOutcome.RAISED
    assert report.detail.startswith(type(error).__name__)


async def test_a_slow_hook_falls_back_to_the_default(hanging):
    """After the limit the table decides; the report names the hook that was at work."""
    runner = HookRunner([Hook("fine", lambda *_: None), Hook("slow", hanging)], timeout_s=0.01)
    report = await runner.ask(EVENT, DEFAULT)
    assert report.decision is DEFAULT
    assert (report.outcome, report.hook) == (HookOutcome.TIMED_OUT, "slow")
    assert runner.hanging == 1


async def test_hanging_hooks_cannot_exhaust_the_threads(hanging):
    """Only so many threads are ever held; with all of them gone the table decides at once."""
    runner = HookRunner([Hook("slow", hanging)], timeout_s=0.01, max_threads=2)
    before = threading.active_count()
    for _ in range(5):
        assert (await runner.ask(EVENT, DEFAULT)).outcome is HookOutcome.TIMED_OUT
    assert threading.active_count() - before == 2
    report = await HookRunner.ask(runner, EVENT, DEFAULT)
    assert report.detail == "every thread is held by a hook that hangs"


async def test_threads_come_back_when_the_hook_does(hanging):
    """A hook that hung for a while is asked again afterwards."""
    runner = HookRunner([Hook("slow", hanging), to(Disposition.REPLY, "z")], timeout_s=0.01, max_threads=1)
    await runner.ask(EVENT, DEFAULT)
    hanging.released.set()
    await until_none_hangs(runner)
    generous = HookRunner([Hook("slow", hanging), to(Disposition.REPLY, "z")], timeout_s=5)
    assert (await generous.ask(EVENT, DEFAULT)).outcome is HookOutcome.OVERRIDDEN


async def test_a_burst_waits_for_a_thread():
    """More errors at once than threads are all put to the hook as long as it is quick."""
    runner = HookRunner([to(Disposition.REPLY)], timeout_s=10, max_threads=2)
    reports = await asyncio.gather(*(runner.ask(EVENT, DEFAULT) for _ in range(50)))
    assert {report.outcome for report in reports} == {HookOutcome.OVERRIDDEN}


async def test_waiting_for_a_thread_counts_as_time(hanging):
    """An event that finds every thread busy gets the default when its limit is over."""
    runner = HookRunner([Hook("slow", hanging)], timeout_s=0.05, max_threads=1)
    first, second = await asyncio.gather(runner.ask(EVENT, DEFAULT), runner.ask(EVENT, DEFAULT))
    assert {first.detail, second.detail} == {"did not come back in time", "no thread became free"}


async def test_cancelling_leaves_the_thread_accounted_for(hanging):
    """A cancelled caller does not lose the thread: it counts as hanging until the hook is done."""
    runner = HookRunner([Hook("slow", hanging)], timeout_s=30, max_threads=1)
    task = asyncio.create_task(runner.ask(EVENT, DEFAULT))
    await asyncio.to_thread(hanging.entered.acquire)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert runner.hanging == 1
    hanging.released.set()
    await until_none_hangs(runner)


def test_a_hanging_hook_does_not_hold_up_the_end_of_the_loop(hanging):
    """The loop closes while a hook still hangs, and the late result disturbs nobody."""
    runner = HookRunner([Hook("slow", hanging)], timeout_s=0.01)
    report = asyncio.run(runner.ask(EVENT, DEFAULT))
    assert report.outcome is HookOutcome.TIMED_OUT
    (thread,) = [thread for thread in threading.enumerate() if thread.name == "error-policy-hook"]
    assert thread.daemon
    hanging.released.set()
    thread.join(5)
    gc.collect()
    assert not thread.is_alive()


async def test_the_engine_asks_hooks_about_errors_only():
    """A good answer never costs a thread; every asked error is reported once."""
    reports = []
    asked = []
    hook = Hook("h", lambda event, _: asked.append(event.status))
    policy = ErrorPolicy(hooks=[hook], on_hook=reports.append)
    good = replace(EVENT, status=200, body=b'{"choices": [{"finish_reason": "stop"}]}')
    assert (await policy.decide(good)).error_class is None
    assert (await policy.decide(EVENT)).rule == "builtin:server_error"
    assert asked == [500]
    assert [report.outcome for report in reports] == [HookOutcome.DEFAULT]


def an_entry_point(name: str, value: str) -> EntryPoint:
    """An entry point of our group."""
    return EntryPoint(name, value, GROUP)


def test_hooks_are_found_in_an_installed_package(tmp_path, monkeypatch):
    """A package whose metadata names the group is found, imported and asked."""
    (tmp_path / "acme_policy.py").write_text(
        "from dataclasses import replace\n"
        "from worker.policy.model import Disposition\n"
        "def decide(event, default):\n"
        "    return replace(default, disposition=Disposition.REPLY) if event.status == 500 else None\n"
    )
    info = tmp_path / "acme_policy-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-policy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\nacme = acme_policy:decide\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    assert any(found.metadata["Name"] == "acme-policy" for found in distributions())
    (hook,) = load_hooks()
    assert hook.name == "acme"
    assert chain([hook], EVENT, DEFAULT).decision.rule == "hook:acme"
    sys.modules.pop("acme_policy")


def test_no_hook_installed_is_no_fault():
    """Most workers run without one."""
    assert load_hooks([]) == ()


def test_hooks_are_ordered_by_name():
    """The order of the chain is that of the names, whatever was installed first."""
    points = [an_entry_point("b", "json:dumps"), an_entry_point("a", "json:loads")]
    assert [hook.name for hook in load_hooks(points)] == ["a", "b"]


def test_hooks_that_cannot_be_used_stop_the_start():
    """Every hook that is missing, no function, or named twice is reported at once."""
    points = [
        an_entry_point("gone", "no_such_module:decide"),
        an_entry_point("half", "json:no_such_function"),
        an_entry_point("text", "json:__name__"),
        an_entry_point("twice", "json:dumps"),
        an_entry_point("twice", "json:loads"),
    ]
    with pytest.raises(HookError) as caught:
        load_hooks(points)
    assert issubclass(HookError, SettingsError)
    names = [fault.split("'")[1] for fault in caught.value.faults]
    assert names == ["gone", "half", "text", "twice"]
    assert "ModuleNotFoundError" in caught.value.faults[0]
