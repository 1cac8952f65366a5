"""What `policy explain` says: the decision, the rule that made it, and every step on the way."""

import json
import time
from dataclasses import replace

from worker.policy.budgets import Budget
from worker.policy.engine import ErrorPolicy
from worker.policy.explain import explain
from worker.policy.hook import Hook
from worker.policy.model import Disposition, ErrorClass, ErrorEvent, Fault, Phase
from worker.policy.rules.load import load_rules

NOW = 1_800_000_000.0
LAST = Budget(max_delivery_attempts=5, delivery_attempt=5, lease_left_s=600.0, hold_max_s=600.0)


def an_event(status: int | None, body: bytes = b"", **changes) -> ErrorEvent:
    """An attempt's end on the chat path."""
    given = {"backend": "b", "path": "/v1/chat/completions", "phase": Phase.BODY, "status": status, "body": body}
    return ErrorEvent(**(given | changes))


def a_policy(rules: str = "[]", hooks: tuple[Hook, ...] = ()) -> ErrorPolicy:
    """A policy with a fixed clock."""
    return ErrorPolicy(load_rules(rules), hooks, now_unix=lambda: NOW)


def stages(explanation) -> dict[str, str]:
    """The text of each stage."""
    return {step.stage: step.text for step in explanation.steps}


async def test_it_decides_as_the_worker_does():
    """Explained or not, the same event leads to the same decision."""
    policy = a_policy("[{name: r, match: {status: 503}, do: nack}]", (Hook("h", lambda *_: None),))
    for status in (200, 401, 429, 500, 503):
        event = an_event(status, b'{"choices": [{}]}')
        assert explain(policy, event).decision == await policy.decide(event)


def test_a_known_sign_names_its_source():
    """An operator sees why a 500 is a context length, and where a server says so."""
    body = b'{"error": {"code": 500, "message": "Context size has been exceeded.", "type": "server_error"}}'
    text = stages(explain(a_policy(), an_event(500, body)))
    assert text["table"] == "context_length, by a known sign (https://github.com/ggml-org/llama.cpp/issues/19774)"
    assert "type 'server_error'" in text["facts"]
    assert text["rules"] == "none fits; the table's row applies"


def test_a_bare_status_is_named_as_such():
    """Without a known word the status is the reason."""
    assert stages(explain(a_policy(), an_event(500, b"oops")))["table"] == "server_error, by status, fault or phase"
    lost = an_event(None, fault=Fault.CONNECTION_LOST)
    assert stages(explain(a_policy(), lost))["event"].startswith(
        "/v1/chat/completions on b, phase body; no response; fault connection_lost"
    )


def test_every_step_is_told():
    """Rule, hook and budget each say what they did, in their order."""
    hook = Hook("acme", lambda _, default: replace(default, disposition=Disposition.NACK))
    policy = a_policy("[{name: mine, match: {status: 500}, do: hold}]", (hook,))
    explanation = explain(policy, an_event(500), LAST)
    assert [step.stage for step in explanation.steps] == ["event", "facts", "table", "rules", "hooks", "budgets"]
    text = stages(explanation)
    assert text["rules"] == "'mine' fits"
    assert text["hooks"] == "asked acme: overridden by acme"
    assert text["budgets"] == "nack becomes reply: last_attempt"
    assert explanation.decision.rule == "hook:acme+budget:last_attempt"


def test_a_hook_that_takes_too_long_is_told_and_overruled():
    """The worker would not wait for it, so its wish does not count here either."""

    def late(_, default):
        time.sleep(0.01)
        return replace(default, disposition=Disposition.REPLY)

    policy = ErrorPolicy((), (Hook("slow", late),), hook_timeout_s=0.001)
    explanation = explain(policy, an_event(500))
    assert stages(explanation)["hooks"].startswith("asked slow: took 0.01")
    assert "s of 0.001 s allowed" in stages(explanation)["hooks"]
    assert (explanation.decision.disposition, explanation.decision.rule) == (Disposition.NACK, "builtin:server_error")


def test_a_failing_hook_is_told():
    """The exception is shown, and that the default stands."""

    def fail(*_):
        raise KeyError("k")

    text = stages(explain(a_policy(hooks=(Hook("bad", fail),)), an_event(500)))
    assert text["hooks"] == "asked bad: raised by bad (KeyError: 'k')"


def test_budgets_that_change_nothing_say_so():
    """Enough left is a step too; without a budget there is none."""
    assert stages(explain(a_policy(), an_event(500), replace(LAST, delivery_attempt=1)))["budgets"] == "enough left"
    assert "budgets" not in stages(explain(a_policy(), an_event(500)))


def test_the_text_is_readable():
    """Every step has its line, and the decision's fields stand below."""
    body = json.dumps({"error": {"message": "Rate limit", "code": "rate_limit_exceeded"}}).encode()
    text = explain(
        a_policy(), an_event(429, body, headers={"retry-after": "7"}), replace(LAST, delivery_attempt=1)
    ).render()
    lines = text.splitlines()
    assert lines[0].startswith("event    /v1/chat/completions on b")
    assert lines[2].startswith("table    rate_limited, by a known sign")
    assert "decision: hold  (by builtin:rate_limited)" in lines
    assert {"  retry_after_s: 7.0", "  breaker: trip", "  backoff: 1 s to 60 s, full jitter"} <= set(lines)


def test_a_good_answer_is_explained_too():
    """Nothing is wrong, and that is said."""
    explanation = explain(a_policy(), an_event(200, b'{"choices": [{"finish_reason": "stop"}]}'), LAST)
    assert stages(explanation)["table"] == "a good answer"
    assert explanation.decision.error_class is None


def test_the_third_403_is_explained_as_credentials():
    """What the worker counts can be given by hand."""
    explanation = explain(a_policy(), an_event(403), consecutive_forbidden=3)
    assert explanation.decision.error_class is ErrorClass.AUTH
