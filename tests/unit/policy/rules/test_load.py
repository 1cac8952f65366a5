"""Operators' rules: what they match, what they change, and the faults that stop a start."""

import json
import time

import pytest

from tests.support.policy import classify, rules_of
from worker.policy.model import BreakerAction, Decision, Disposition, ErrorClass, ErrorEvent, Fault, Phase, Scope
from worker.policy.rules.regex import occurs
from worker.policy.table import accept


def an_event(status: int | None = 500, body: bytes = b"", **changes) -> ErrorEvent:
    """An attempt's end on the chat path."""
    given = {
        "backend": "default",
        "path": "/v1/chat/completions",
        "model": "qwen",
        "phase": Phase.BODY,
        "status": status,
        "body": body,
    }
    return ErrorEvent(**(given | changes))


def decide(rules: str, event: ErrorEvent) -> Decision:
    """Decide with rules given as YAML."""
    return classify(event, rules=rules)


def test_a_rule_that_reclassifies_takes_the_row_of_its_class():
    """A firewall's 403 becomes a content filter's answer, with everything that row says."""
    rules = """
    - name: corp-waf
      match: {backend: "*", status: [403], body_regex: "^Request blocked by WAF"}
      class: content_filter
    """
    decision = decide(rules, an_event(403, b"Request blocked by WAF, id 7"))
    assert (decision.error_class, decision.disposition) == (ErrorClass.CONTENT_FILTER, Disposition.REPLY)
    assert (decision.rule, decision.breaker, decision.reply_status) == ("corp-waf", BreakerAction.NONE, 403)
    assert decide(rules, an_event(403, b"blocked")).rule == "builtin:forbidden"


def test_a_rule_on_a_class_overrides_its_row():
    """LoRA adapters are rolled out while the queue drains: a missing model is held, for its own time."""
    rules = "[{match: {class: model_not_found}, do: hold, hold_max_s: 600, breaker: trip}]"
    body = json.dumps({"error": {"code": "model_not_found", "message": "x"}}).encode()
    decision = decide(rules, an_event(404, body, headers={"retry-after": "9"}))
    assert (decision.error_class, decision.disposition) == (ErrorClass.MODEL_NOT_FOUND, Disposition.HOLD)
    assert (decision.hold_max_s, decision.breaker, decision.scope) == (600.0, BreakerAction.TRIP, Scope.MODEL)
    assert (decision.retryable, decision.retry_after_s, decision.rule) == (True, 9.0, "rules[0]")


def test_the_first_match_wins():
    """Rules are tried in their order, before the table."""
    rules = """
    - {name: first, match: {status: 5xx}, max_attempts: 7}
    - {name: second, match: {status: [404, 500]}, do: reply}
    """
    decision = decide(rules, an_event(500))
    assert (decision.rule, decision.max_attempts, decision.disposition) == ("first", 7, Disposition.NACK)


def test_every_action_reaches_the_decision():
    """What a rule sets stands in the decision; what it leaves is the row's."""
    rules = """
    - name: all
      match: {status: 429}
      do: nack
      backoff: {base_s: 2, max_s: 8, jitter: full}
      honor_retry_after: false
      max_attempts: 4
      breaker: count
      scope: model
      reply: {status: 503, code: come_back}
    """
    decision = decide(rules, an_event(429, headers={"retry-after": "60"}))
    assert (decision.backoff.base_s, decision.backoff.max_s) == (2.0, 8.0)
    assert (decision.disposition, decision.retry_after_s, decision.max_attempts) == (Disposition.NACK, None, 4)
    assert (decision.breaker, decision.scope) == (BreakerAction.COUNT, Scope.MODEL)
    assert (decision.reply_status, decision.reply_code, decision.is_overload) == (503, "come_back", True)


def test_a_wish_that_is_not_honoured_does_not_trip():
    """Without Retry-After being heeded a 429 counts like any other."""
    rules = "[{match: {status: 429}, honor_retry_after: false}]"
    assert decide(rules, an_event(429, headers={"retry-after": "60"})).breaker is BreakerAction.COUNT


@pytest.mark.parametrize(
    ("words", "expected"), [("counts: false", "hold"), ("counts: true", "nack"), ("max_attempts: 3", "nack")]
)
def test_counts_is_another_word_for_what_costs_an_attempt(words, expected):
    """`counts: false` holds, `counts: true` nacks; without either the row decides."""
    assert decide(f"[{{match: {{status: 500}}, {words}}}]", an_event(500)).disposition == expected


MATCHING = [
    ("backend: default", True),
    ("backend: [a, def*]", True),
    ("backend: other", False),
    ("path: /v1/*", True),
    ("path: /v1/embeddings", False),
    ("model: 'q?en'", True),
    ("model: llama*", False),
    ("phase: body", True),
    ("phase: [connect, send]", False),
    ("status: 429", True),
    ("status: [500, 4xx]", True),
    ("status: 5xx", False),
    ("type: throttled", True),
    ("type: Throttled", False),
    ("code: [1, 429]", True),
    ("code: '430'", False),
    ("param: p", True),
    ("param: q", False),
    ("exception: connection_lost", True),
    ("exception: connect", False),
    ("message_regex: 'slow +down'", True),
    ("message_regex: '^down'", False),
    ("body_regex: '(?i)SLOW'", True),
    ("body_regex: 'fast'", False),
    ("class: rate_limited", True),
    ("class: [quota, auth]", False),
    ("delivery_attempt: 2", True),
    ("delivery_attempt: {min: 3}", False),
    ("attempts: {min: 2, max: 5}", True),
    ("attempts: {max: 3}", False),
    ("status: 429, model: llama*", False),
]


@pytest.mark.parametrize(("match", "expected"), MATCHING, ids=[match for match, _ in MATCHING])
def test_match_key(match, expected):
    """Each key of a match, fitting and not; of several all must fit."""
    body = json.dumps(
        {"error": {"message": "please slow  down", "type": "throttled", "code": 429, "param": "p"}}
    ).encode()
    event = an_event(429, body, fault=Fault.CONNECTION_LOST, delivery_attempt=2, attempts=4)
    assert (decide(f"[{{name: it, match: {{{match}}}, max_attempts: 9}}]", event).rule == "it") is expected


def test_what_is_unknown_fits_no_match():
    """A request without a model and a delivery without a count are matched by no pattern on them."""
    event = an_event(500, model=None, delivery_attempt=None)
    assert decide("[{match: {model: '*'}, do: reply}]", event).rule == "builtin:server_error"
    assert decide("[{match: {delivery_attempt: {min: 1}}, do: reply}]", event).rule == "builtin:server_error"


def test_inside_a_stream_the_status_is_the_one_the_event_names():
    """The HTTP status of a stream is always 200 and says nothing."""
    body = b'{"error": {"message": "x", "code": 503}}'
    event = an_event(200, body, in_stream=True, has_partial=True, phase=Phase.STREAM)
    assert decide("[{name: it, match: {status: 503}, do: hold}]", event).rule == "it"


def test_behind_sagemaker_the_containers_status_fits():
    """A ModelError is matched by its own status and by the container's."""
    body = json.dumps({"OriginalStatusCode": 422, "OriginalMessage": "no"}).encode()
    for status in (424, 422):
        assert decide(f"[{{name: it, match: {{status: {status}}}, do: hold}}]", an_event(424, body)).rule == "it"


def test_good_answers_are_left_alone_unless_named():
    """A broad rule never touches an answer; one that names a success status may call it an error."""
    good = an_event(200, b'{"choices": [{"finish_reason": "stop", "message": {"content": "blocked by policy"}}]}')
    assert decide("[{match: {backend: '*'}, do: hold}]", good).error_class is None
    rules = "[{name: hidden, match: {status: 200, body_regex: 'blocked by policy'}, class: content_filter}]"
    decision = decide(rules, good)
    assert (decision.error_class, decision.reply_status, decision.rule) == (ErrorClass.CONTENT_FILTER, 400, "hidden")
    other = an_event(200, b'{"choices": [{"finish_reason": "stop"}]}')
    for text in (rules, f"[{{match: {{backend: '*'}}, do: hold}}, {rules[1:]}"):
        assert decide(text, other) == accept(other)


def test_refused_credentials_stay_covered_under_any_class():
    """Re-classifying a 401 does not publish what the backend said about the key."""
    body = b'{"error": {"message": "Incorrect API key provided: sk-1"}}'
    decision = decide("[{match: {status: 401}, class: not_ready}]", an_event(401, body))
    assert (decision.error_class, decision.verbatim, decision.expose_backend) == (ErrorClass.NOT_READY, False, False)
    assert "sk-1" not in decision.message


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|aa)*c", "(.*)*x", "^(([a-z])+.)+[A-Z]([a-z])+$", "(?:a?){50}a{50}x"])
def test_a_catastrophic_pattern_is_harmless(pattern):
    """Patterns that take Python's engine years are searched in linear time, on the largest text there is."""
    event = an_event(500, b"a" * 1_000_000)
    rules = json.dumps([{"match": {"body_regex": pattern}, "do": "hold"}])
    started = time.perf_counter()
    decide(rules, event)
    assert time.perf_counter() - started < 0.25


def test_a_search_sees_8_kib():
    """What stands behind the first 8 KiB identifies nothing; invalid UTF-8 does not fail a search."""
    rules = "[{name: it, match: {body_regex: 'needle'}, do: hold}]"
    assert decide(rules, an_event(500, b"\xff" * 8000 + b"needle")).rule == "it"
    assert decide(rules, an_event(500, b"\xff" * 8192 + b"needle")).rule == "builtin:server_error"
    assert not occurs("needle", "ä" * 5000 + "needle")
    assert occurs("needle$", "\ud800" * 5000 + "needle")


def test_no_rules_is_no_fault():
    """An empty list is what most operators have."""
    assert rules_of("[]") == ()
