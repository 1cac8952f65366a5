"""Hooks: chained by name, bounded in time, and never able to make things worse than the table."""

import importlib
import sys
import time
from dataclasses import replace
from importlib.metadata import EntryPoint, distributions

import pytest
from msgspec import structs

from worker.errors import SettingsError
from worker.policy.engine import ErrorPolicy
from worker.policy.hook import GROUP, Hook, HookError, HookOutcome, chain, load_hooks
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


def test_a_hook_may_overrule():
    """What a hook decides stands, and the rule names the hook."""
    report = chain([to(Disposition.REPLY)], EVENT, DEFAULT, timeout_s=1.0)
    assert (report.decision.disposition, report.decision.rule) == (Disposition.REPLY, "hook:h")
    assert (report.outcome, report.hook) == (HookOutcome.OVERRIDDEN, "h")


def test_none_and_the_default_itself_leave_the_default():
    """A hook that has nothing to say returns `None` or what it was given."""
    for hook in (Hook("n", lambda *_: None), Hook("same", lambda _, default: default)):
        report = chain([hook], EVENT, DEFAULT, timeout_s=1.0)
        assert report.decision is DEFAULT
        assert report.outcome is HookOutcome.DEFAULT


def test_each_hook_sees_what_the_one_before_it_decided():
    """A chain refines: the second hook is shown the first one's decision as the default."""
    seen = []
    second = Hook("b", lambda _, default: seen.append(default.rule))
    report = chain([to(Disposition.HOLD, "a"), second], EVENT, DEFAULT, timeout_s=1.0)
    assert seen == ["hook:a"]
    assert (report.decision.rule, report.hook) == ("hook:a", "a")


@pytest.mark.parametrize("result", ["reply", 7, Disposition.REPLY, {}])
def test_something_else_than_a_decision_is_a_failure(result):
    """Only a decision counts; anything else falls back to the default and is counted."""
    report = chain([Hook("h", lambda *_: result)], EVENT, DEFAULT, timeout_s=1.0)
    assert report.decision is DEFAULT
    assert (report.outcome, report.hook) == (HookOutcome.RAISED, "h")


def test_a_failure_discards_the_whole_chain():
    """Half of a chain is what nobody configured: the default decides."""
    report = chain([to(Disposition.REPLY, "a"), raising(KeyError("k"), "b")], EVENT, DEFAULT, timeout_s=1.0)
    assert report.decision is DEFAULT
    assert (report.outcome, report.hook, report.detail) == (HookOutcome.RAISED, "b", "KeyError: 'k'")


def test_a_hook_cannot_turn_an_error_into_a_success():
    """Without a class or with a success status the default's stand in: an error is answered as one."""
    decision = chain(
        [to(Disposition.REPLY, error_class=None, reply_status=200)], EVENT, DEFAULT, timeout_s=1.0
    ).decision
    assert (decision.error_class, decision.reply_status) == (ErrorClass.SERVER_ERROR, 500)


def test_a_hook_cannot_uncover_what_is_covered():
    """What a backend says about our credentials stays out of the answer."""
    covered = replace(DEFAULT, error_class=ErrorClass.AUTH, expose_backend=False, verbatim=False)
    decision = chain(
        [to(Disposition.REPLY, expose_backend=True, verbatim=True)], EVENT, covered, timeout_s=1.0
    ).decision
    assert (decision.expose_backend, decision.verbatim) == (False, False)


@pytest.mark.parametrize("error", [ValueError("x"), RecursionError(), AssertionError()])
def test_whatever_a_hook_raises_ends_in_the_default(error):
    """A fault of a hook costs what it would have decided, nothing else."""
    report = chain([raising(error)], EVENT, DEFAULT, timeout_s=1.0)
    assert report.decision is DEFAULT
    assert report.outcome is HookOutcome.RAISED
    assert report.detail.startswith(type(error).__name__)


def test_a_slow_hook_is_overruled_and_named():
    """What took longer than its limit decides nothing: an operator sees in the metric that it slows the worker down."""

    def slow(_event, default):
        until = time.perf_counter() + 0.002
        while time.perf_counter() < until:
            pass
        return replace(default, disposition=Disposition.REPLY)

    report = chain([Hook("slow", slow), to(Disposition.REPLY)], EVENT, DEFAULT, timeout_s=0.001)
    assert report.decision is DEFAULT
    assert (report.outcome, report.hook) == (HookOutcome.TIMED_OUT, "slow")
    assert report.detail.endswith("of 0.001 s allowed")


def test_the_engine_asks_hooks_about_errors_only():
    """Good answers are none of their business; every asked error is reported once."""
    reports = []
    asked = []
    hook = Hook("h", lambda event, _: asked.append(event.status))
    policy = ErrorPolicy(hooks=[hook], on_hook=reports.append)
    good = structs.replace(EVENT, status=200, body=b'{"choices": [{"finish_reason": "stop"}]}')
    assert policy.decide(good).error_class is None
    assert policy.decide(EVENT).rule == "builtin:server_error"
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
    assert chain([hook], EVENT, DEFAULT, timeout_s=1.0).decision.rule == "hook:acme"
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
