"""Bad rules: every fault stops the start and is named."""

import pytest

from tests.support.policy import rules_of
from worker.errors import SettingsError
from worker.policy.rules.load import RulesError, parse_rules


def faults_of(rules: str) -> list[str]:
    """The faults that loading names."""
    with pytest.raises(RulesError) as caught:
        rules_of(rules)
    return caught.value.faults


FAULTS = {
    "unknown key": ("- match: {status: 500}\n  do: hold\n  retries: 3\n", "policy.rules[0].retries: unknown key"),
    "unknown match key": ("- do: hold\n  match:\n    stats: 500\n", "policy.rules[0].match.stats: unknown key"),
    "camel case": ("- match: {messageRegex: x}\n  do: hold\n", "policy.rules[0].match.messageRegex: unknown key"),
    "no match": ("- do: hold\n", "policy.rules[0].match: field required"),
    "empty match": ("- do: hold\n  match: {}\n", "policy.rules[0].match: is empty and would match everything"),
    "no action": ("- match: {status: 500}\n", "policy.rules[0]: does nothing"),
    "bad class": (
        "- match: {status: 500}\n  class: oops\n",
        "policy.rules[0].class: input should be 'content_filter'",
    ),
    "class nobody judges": (
        "- match:\n    class: bad_message\n  do: hold\n",
        "policy.rules[0].match: class bad_message is",
    ),
    "bad do": ("- match: {status: 500}\n  do: drop\n", "policy.rules[0].do: input should be 'reply'"),
    "bad status": (
        "- do: hold\n  match:\n    status: [500, 999]\n",
        "policy.rules[0].match.status: 999 is not a status",
    ),
    "status text": ("- do: hold\n  match: {status: many}\n", "policy.rules[0].match.status: 'many' is not a status"),
    "status bool": ("- do: hold\n  match: {status: true}\n", "policy.rules[0].match.status: true is not a status"),
    "no status": ("- do: hold\n  match: {status: []}\n", "policy.rules[0].match.status: names no status"),
    "no words": (
        "- do: hold\n  match: {code: []}\n",
        "policy.rules[0].match.code: value should have at least 1 item",
    ),
    "bad regex": (
        "- do: hold\n  match: {body_regex: '('}\n",
        "policy.rules[0].match.body_regex: not a usable regular expression: missing ): (",
    ),
    "back reference": (
        "- do: hold\n  match: {message_regex: '(a)\\1'}\n",
        "policy.rules[0].match.message_regex: not a usable regular",
    ),
    "look-ahead": (
        "- do: hold\n  match: {message_regex: '(?=a)'}\n",
        "policy.rules[0].match.message_regex: not a usable regular",
    ),
    "huge regex": (
        "- do: hold\n  match: {message_regex: '(.{900}){900}'}\n",
        "policy.rules[0].match.message_regex: not a usable regular",
    ),
    "large regex": (
        "- do: hold\n  match: {message_regex: 'x.{900}'}\n",
        "policy.rules[0].match.message_regex: not a usable regular expression: too large",
    ),
    "long regex": (
        f"- do: hold\n  match: {{body_regex: '{'x' * 1001}'}}\n",
        "policy.rules[0].match.body_regex: not a usable regular expression: longer than 1000",
    ),
    "contradiction": (
        "- match: {status: 500}\n  do: hold\n  counts: true\n",
        "policy.rules[0]: counts: true contradicts do: hold",
    ),
    "success": ("- match: {status: 200}\n  do: nack\n", "policy.rules[0]: matches a success status"),
    "reply success": (
        "- match: {status: 500}\n  reply: {status: 200}\n",
        "policy.rules[0].reply.status: input should be greater",
    ),
    "reply code": (
        "- match: {status: 500}\n  reply: {code: 'a b'}\n",
        "policy.rules[0].reply.code: string should match pattern",
    ),
    "negative": (
        "- match: {status: 500}\n  hold_max_s: -1\n",
        "policy.rules[0].hold_max_s: input should be greater",
    ),
    "infinite": (
        "- match: {status: 500}\n  hold_max_s: .inf\n",
        "policy.rules[0].hold_max_s: input should be a finite number",
    ),
    "backoff": (
        "- match: {status: 500}\n  backoff: {base_s: 9, max_s: 1}\n",
        "policy.rules[0].backoff: base_s is above max_s",
    ),
    "jitter": (
        "- match: {status: 500}\n  backoff: {jitter: none}\n",
        "policy.rules[0].backoff.jitter: input should be 'full'",
    ),
    "breaker success": ("- match: {status: 500}\n  breaker: success\n", "policy.rules[0].breaker: input should be"),
    "range": (
        "- do: hold\n  match: {attempts: {min: 3, max: 1}}\n",
        "policy.rules[0].match.attempts: min is above max",
    ),
    "empty range": ("- do: hold\n  match: {attempts: {}}\n", "policy.rules[0].match.attempts: needs min or max"),
    "name": (
        "- name: a b\n  match: {status: 500}\n  do: hold\n",
        "policy.rules[0].name: string should match pattern",
    ),
    "names twice": (
        "- {name: a, match: {status: 500}, do: hold}\n- {name: a, match: {status: 501}, do: hold}\n",
        "policy.rules[1].name: 'a' is the name of an earlier rule too",
    ),
    "name of a faulty rule": (
        "- {name: a, match: {status: 500}, do: [hold]}\n- {name: a, match: {status: 501}, do: hold}\n",
        "policy.rules[1].name: 'a' is the name of an earlier rule too",
    ),
    "not a mapping": ("- hold\n", "policy.rules[0]: input should be a valid dictionary"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_bad_rules_fail_at_start(case):
    """Whatever is wrong is named with its key."""
    text, expected = FAULTS[case]
    faults = faults_of(text)
    assert len(faults) == 1 + (case == "name of a faulty rule"), faults
    assert faults[-1].startswith(expected)


def test_every_fault_is_named_at_once():
    """An operator repairs a file in one go; the exception is one of the settings'."""
    faults = faults_of("- {match: {status: 1}, do: x}\n- {match: {status: 500}, oops: 1}\n- 7\n")
    keys = [fault.split(": ")[0] for fault in faults]
    assert keys == ["policy.rules[0].match.status", "policy.rules[0].do", "policy.rules[1].oops", "policy.rules[2]"]
    assert issubclass(RulesError, SettingsError)


def test_a_rule_without_a_name_is_called_by_its_place():
    """Log and `policy explain` can name every rule."""
    (rule,) = parse_rules([{"match": {"status": 500}, "do": "hold"}])
    assert rule.name == "rules[0]"
