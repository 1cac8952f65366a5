"""What `policy explain` says: the decision, the rule that made it, and every step on the way."""

import json
from dataclasses import replace

import pytest
from msgspec import structs

from tests.support.policy import NOW, rules_of
from worker.policy.blame import UNKNOWN, Blame
from worker.policy.budgets import Budget
from worker.policy.engine import ErrorPolicy
from worker.policy.explain import explain
from worker.policy.hook import Hook
from worker.policy.judge import HEALTHY, AttemptEnd, BackendHealth, judge
from worker.policy.model import Disposition, ErrorClass, ErrorEvent, Fault, Phase

FIRST = Budget(max_delivery_attempts=5, delivery_attempt=1, lease_left_s=600.0, hold_max_s=600.0)
LAST = structs.replace(FIRST, delivery_attempt=5)


def an_event(status: int | None, body: bytes = b"", **changes) -> ErrorEvent:
    """An attempt's end on the chat path."""
    given = {"backend": "b", "path": "/v1/chat/completions", "phase": Phase.BODY, "status": status, "body": body}
    return ErrorEvent(**(given | changes))


def a_policy(rules: str = "[]", hooks: tuple[Hook, ...] = ()) -> ErrorPolicy:
    """A policy with a fixed clock."""
    return ErrorPolicy(rules_of(rules), hooks, now_unix=lambda: NOW)


def stages(explanation) -> dict[str, str]:
    """The text of each stage."""
    return {step.stage: step.text for step in explanation.steps}


@pytest.mark.parametrize("status", [200, 401, 403, 429, 500, 503])
@pytest.mark.parametrize("stopped_by", [None, ErrorClass.SERVER_ERROR])
@pytest.mark.parametrize("budget", [FIRST, LAST, structs.replace(FIRST, is_draining=True)])
@pytest.mark.parametrize(
    "blame", [UNKNOWN, Blame(failures=3, is_contradicted=True, is_served_since=True), Blame(others_failing=9)]
)
def test_it_decides_as_the_worker_does(status, stopped_by, budget, blame):
    """Explained or not, the same end under the same circumstances leads to the same verdict."""
    policy = a_policy("[{name: r, match: {status: 503}, do: nack}]", (Hook("h", lambda *_: None),))
    event, health = an_event(status, b'{"choices": [{}]}'), BackendHealth(stopped_by=stopped_by)
    end = AttemptEnd(event=event, decision=policy.decide(event), blame=blame, is_outage_checked=True)
    assert explain(policy, event, budget, health, blame=blame).verdict == judge(end, budget, health)


def test_a_known_sign_names_its_source():
    """An operator sees why a 500 is a context length, and where a server says so."""
    body = b'{"error": {"code": 500, "message": "Context size has been exceeded.", "type": "server_error"}}'
    text = stages(explain(a_policy(), an_event(500, body), FIRST))
    assert text["table"] == "context_length, by a known sign (https://github.com/ggml-org/llama.cpp/issues/19774)"
    assert "type 'server_error'" in text["facts"]
    assert text["rules"] == "none fits; the table's row applies"


def test_a_bare_status_is_named_as_such():
    """Without a known word the status is the reason."""
    assert (
        stages(explain(a_policy(), an_event(500, b"oops"), FIRST))["table"] == "server_error, by status, fault or phase"
    )
    lost = an_event(None, fault=Fault.CONNECTION_LOST)
    assert stages(explain(a_policy(), lost, FIRST))["event"].startswith(
        "/v1/chat/completions on b, phase body; no response; fault connection_lost"
    )


def test_every_step_is_told():
    """Rule, hook, gate and circumstances each say what they did, in their order."""
    hook = Hook("acme", lambda _, default: replace(default, disposition=Disposition.NACK))
    policy = a_policy("[{name: mine, match: {status: 500}, do: hold}]", (hook,))
    explanation = explain(policy, an_event(500), LAST)
    stages_told = [step.stage for step in explanation.steps]
    assert stages_told == ["event", "facts", "table", "rules", "hooks", "blame", "gate", "outage", "delivery"]
    text = stages(explanation)
    assert text["rules"] == "'mine' fits"
    assert text["hooks"] == "asked acme: overridden by acme"
    assert text["gate"] == "one failure in a row for the breaker of the model"
    assert text["delivery"] == "nack becomes reply: last_attempt"
    assert explanation.decision.rule == "hook:acme+budget:last_attempt"


def test_a_failing_hook_is_told():
    """The exception is shown, and that the default stands."""

    def fail(*_):
        raise KeyError("k")

    text = stages(explain(a_policy(hooks=(Hook("bad", fail),)), an_event(500), FIRST))
    assert text["hooks"] == "asked bad: raised by bad (KeyError: 'k')"


@pytest.mark.parametrize(
    ("budget", "health", "can_resume", "told", "rule"),
    [
        (FIRST, HEALTHY, False, "nack", "builtin:stream_broken"),
        (FIRST, HEALTHY, True, "nack becomes hold: continuation", "builtin:stream_broken+continuation"),
        (
            FIRST,
            BackendHealth(stopped_by=ErrorClass.CONNECT),
            True,
            "nack becomes hold: outage; the attempt does not count against the class's limit",
            "builtin:stream_broken+outage",
        ),
        (
            structs.replace(FIRST, is_draining=True),
            HEALTHY,
            True,
            "nack: continuation, draining",
            "builtin:stream_broken+continuation+budget:draining",
        ),
        (LAST, HEALTHY, False, "nack becomes reply: max_attempts", "builtin:stream_broken+budget:max_attempts"),
        (
            structs.replace(FIRST, deadline_left_s=-1.0),
            HEALTHY,
            False,
            "nack becomes reply: deadline",
            "builtin:stream_broken+budget:deadline",
        ),
    ],
)
def test_the_circumstances_are_explained(budget, health, can_resume, told, rule):
    """Continuation, outage, drain, deadline, attempts: what the log's `rule` shows can be asked for beforehand."""
    event = an_event(200, fault=Fault.STREAM_BROKEN, phase=Phase.STREAM)
    explanation = explain(a_policy(), event, budget, health, can_resume=can_resume)
    assert stages(explanation)["delivery"] == told
    assert explanation.decision.rule == rule


@pytest.mark.parametrize(
    ("blame", "told", "gate", "delivery"),
    [
        (
            UNKNOWN,
            "unknown: no other message was served since it first failed, and no other one failed",
            (
                "one failure in a row for the breaker of the model; the window decreases, once for all that was refused "
                "together"
            ),
            "hold",
        ),
        (
            Blame(others_failing=4),
            "shared: 4 other messages failed as well, and none was served since",
            (
                "one failure in a row for the breaker of the model; the window decreases, once for all that was refused "
                "together; the window pauses for 7 s"
            ),
            "hold",
        ),
        (
            Blame(is_contradicted=True, is_served_since=True, failing_share=0.2),
            "contradicted: others are served, so it says nothing about the backend; its own from failure 3 on",
            "nothing for the breaker",
            "hold",
        ),
        (
            Blame(is_contradicted=True, is_served_since=True, failures=9, failing_share=1.0),
            (
                "contradicted: others are served, so it says nothing about the backend; chance explains any number of "
                "failures"
            ),
            "nothing for the breaker",
            "hold",
        ),
        (
            Blame(is_contradicted=True, is_served_since=True, failures=3, failing_share=0.05),
            "its own: others are served, and chance does not explain 3 failures in a row",
            "nothing for the breaker",
            "hold becomes nack: own",
        ),
    ],
)
def test_whose_trouble_it_is_is_explained(blame, told, gate, delivery):
    """From what is known of other messages to what breaker, window and message get."""
    event = an_event(429, headers={"retry-after": "7"})
    text = stages(explain(a_policy(), event, FIRST, blame=blame))
    assert (text["blame"], text["gate"], text["delivery"]) == (told, gate, delivery)


def test_a_message_of_its_own_trouble_ends_in_its_own_error():
    """On the last delivery attempt, or after five failures where attempts are not counted."""
    own = Blame(is_contradicted=True, is_served_since=True, failures=5)
    for budget in (LAST, structs.replace(FIRST, max_delivery_attempts=None, delivery_attempt=None)):
        decision = explain(a_policy(), an_event(401), budget, blame=own).decision
        assert (decision.disposition, decision.error_class) == (Disposition.REPLY, ErrorClass.AUTH)


def test_the_text_is_readable():
    """Every step has its line, and the decision's fields stand below."""
    body = json.dumps({"error": {"message": "Rate limit", "code": "rate_limit_exceeded"}}).encode()
    text = explain(
        a_policy(), an_event(429, body, headers={"retry-after": "7"}), structs.replace(LAST, delivery_attempt=1)
    ).render()
    lines = text.splitlines()
    assert lines[0].startswith("event     /v1/chat/completions on b")
    assert lines[2].startswith("table     rate_limited, by a known sign")
    assert "decision: hold  (by builtin:rate_limited)" in lines
    assert {"  retry_after_s: 7.0", "  breaker: count", "  backoff: 1 s to 60 s, full jitter"} <= set(lines)


def test_a_good_answer_is_explained_too():
    """Nothing is wrong, and that is said."""
    explanation = explain(a_policy(), an_event(200, b'{"choices": [{"finish_reason": "stop"}]}'), LAST)
    assert stages(explanation)["table"] == "a good answer"
    assert "blame" not in stages(explanation)
    assert explanation.decision.error_class is None


def test_the_third_403_is_explained_as_credentials():
    """What the worker counts can be given by hand."""
    explanation = explain(a_policy(), an_event(403), FIRST, forbidden_in_a_row=3)
    assert explanation.decision.error_class is ErrorClass.AUTH
