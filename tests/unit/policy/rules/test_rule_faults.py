"""Bad rules: every fault stops the start and names its line."""

import pytest

from worker.errors import SettingsError
from worker.policy.rules.load import RulesError, load_rules, parse_rules, rule_lines


def faults_of(rules: str) -> list[str]:
    """The faults that loading names."""
    with pytest.raises(RulesError) as caught:
        load_rules(rules, "f.yaml")
    return caught.value.faults


FAULTS = {
    "unknown key": ("- match: {status: 500}\n  do: hold\n  retries: 3\n", "f.yaml:3: rules[0].retries: unknown key"),
    "unknown match key": ("- do: hold\n  match:\n    stats: 500\n", "f.yaml:3: rules[0].match.stats: unknown key"),
    "camel case": ("- match: {messageRegex: x}\n  do: hold\n", "f.yaml:1: rules[0].match.messageRegex: unknown key"),
    "no match": ("- do: hold\n", "f.yaml:1: rules[0].match: field required"),
    "empty match": ("- do: hold\n  match: {}\n", "f.yaml:2: rules[0].match: is empty and would match everything"),
    "no action": ("- match: {status: 500}\n", "f.yaml:1: rules[0]: does nothing"),
    "bad class": (
        "- match: {status: 500}\n  class: oops\n",
        "f.yaml:2: rules[0].class: input should be 'content_filter'",
    ),
    "class nobody judges": (
        "- match:\n    class: bad_message\n  do: hold\n",
        "f.yaml:1: rules[0].match: class bad_message is",
    ),
    "bad do": ("- match: {status: 500}\n  do: drop\n", "f.yaml:2: rules[0].do: input should be 'reply'"),
    "bad status": (
        "- do: hold\n  match:\n    status: [500, 999]\n",
        "f.yaml:3: rules[0].match.status: 999 is not a status",
    ),
    "status text": ("- do: hold\n  match: {status: many}\n", "f.yaml:2: rules[0].match.status: 'many' is not a status"),
    "status bool": ("- do: hold\n  match: {status: true}\n", "f.yaml:2: rules[0].match.status: true is not a status"),
    "no status": ("- do: hold\n  match: {status: []}\n", "f.yaml:2: rules[0].match.status: names no status"),
    "no words": (
        "- do: hold\n  match: {code: []}\n",
        "f.yaml:2: rules[0].match.code: value should have at least 1 item",
    ),
    "bad regex": (
        "- do: hold\n  match: {body_regex: '('}\n",
        "f.yaml:2: rules[0].match.body_regex: not a usable regular expression: missing ): (",
    ),
    "back reference": (
        "- do: hold\n  match: {message_regex: '(a)\\1'}\n",
        "f.yaml:2: rules[0].match.message_regex: not a usable regular",
    ),
    "look-ahead": (
        "- do: hold\n  match: {message_regex: '(?=a)'}\n",
        "f.yaml:2: rules[0].match.message_regex: not a usable regular",
    ),
    "huge regex": (
        "- do: hold\n  match: {message_regex: '(.{900}){900}'}\n",
        "f.yaml:2: rules[0].match.message_regex: not a usable regular",
    ),
    "large regex": (
        "- do: hold\n  match: {message_regex: 'x.{900}'}\n",
        "f.yaml:2: rules[0].match.message_regex: not a usable regular expression: too large",
    ),
    "long regex": (
        f"- do: hold\n  match: {{body_regex: '{'x' * 1001}'}}\n",
        "f.yaml:2: rules[0].match.body_regex: not a usable regular expression: longer than 1000",
    ),
    "contradiction": (
        "- match: {status: 500}\n  do: hold\n  counts: true\n",
        "f.yaml:1: rules[0]: counts: true contradicts do: hold",
    ),
    "success": ("- match: {status: 200}\n  do: nack\n", "f.yaml:1: rules[0]: matches a success status"),
    "reply success": (
        "- match: {status: 500}\n  reply: {status: 200}\n",
        "f.yaml:2: rules[0].reply.status: input should be greater",
    ),
    "reply code": (
        "- match: {status: 500}\n  reply: {code: 'a b'}\n",
        "f.yaml:2: rules[0].reply.code: string should match pattern",
    ),
    "negative": (
        "- match: {status: 500}\n  hold_max_s: -1\n",
        "f.yaml:2: rules[0].hold_max_s: input should be greater",
    ),
    "infinite": (
        "- match: {status: 500}\n  hold_max_s: .inf\n",
        "f.yaml:2: rules[0].hold_max_s: input should be a finite number",
    ),
    "backoff": (
        "- match: {status: 500}\n  backoff: {base_s: 9, max_s: 1}\n",
        "f.yaml:2: rules[0].backoff: base_s is above max_s",
    ),
    "jitter": (
        "- match: {status: 500}\n  backoff: {jitter: none}\n",
        "f.yaml:2: rules[0].backoff.jitter: input should be 'full'",
    ),
    "breaker success": ("- match: {status: 500}\n  breaker: success\n", "f.yaml:2: rules[0].breaker: input should be"),
    "range": (
        "- do: hold\n  match: {attempts: {min: 3, max: 1}}\n",
        "f.yaml:2: rules[0].match.attempts: min is above max",
    ),
    "empty range": ("- do: hold\n  match: {attempts: {}}\n", "f.yaml:2: rules[0].match.attempts: needs min or max"),
    "name": (
        "- name: a b\n  match: {status: 500}\n  do: hold\n",
        "f.yaml:1: rules[0].name: string should match pattern",
    ),
    "names twice": (
        "- {name: a, match: {status: 500}, do: hold}\n- {name: a, match: {status: 501}, do: hold}\n",
        "f.yaml:2: rules[1].name: 'a' is the name of an earlier rule too",
    ),
    "never reached": (
        "- {name: a, match: {status: 500}, do: hold}\n- {name: b, match: {status: [500]}, do: nack}\n",
        "f.yaml:2: rules[1].match: is never reached: 'a' before it matches whatever it does",
    ),
    "never reached, narrower": (
        "- {name: a, match: {status: 5xx}, do: hold}\n- {match: {status: 503, model: m}, do: nack}\n",
        "f.yaml:2: rules[1].match: is never reached: 'a' before it matches whatever it does",
    ),
    "name of a faulty rule": (
        "- {name: a, match: {status: 500}, do: [hold]}\n- {name: a, match: {status: 501}, do: hold}\n",
        "f.yaml:2: rules[1].name: 'a' is the name of an earlier rule too",
    ),
    "not a mapping": ("- hold\n", "f.yaml:1: rules[0]: input should be a valid dictionary"),
    "key twice": ("- match: {status: 500}\n  do: hold\n  do: nack\n", "f.yaml:3: the key 'do' stands twice"),
    "not yaml": ("- match: [\n", "f.yaml:2: is not YAML"),
    "not a list": ("rules: {a: 1}\n", "f.yaml:1: rules must be a list"),
    "no rules": ("policy: {}\n", "f.yaml:1: rules must be a list"),
    "scalar": ("42\n", "f.yaml:1: rules must be a list"),
    "other mapping": ("rule: []\n", "f.yaml:1: holds neither a list of rules nor `rules`"),
    "empty": ("", "f.yaml:1: rules must be a list"),
    "deep": ("[" * 1200, "f.yaml:1: is not YAML: RecursionError"),
    "too long": ("#" * 1_100_000, "f.yaml:1: longer than 1048576 characters"),
    "control character": ("- \x07\n", "f.yaml:1: is not YAML"),
    "bad date": ("- match: {code: 2024-99-99}\n", "f.yaml:1: is not YAML"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_bad_rules_fail_at_start_with_their_line(case):
    """Whatever is wrong is named with file, line and key."""
    text, expected = FAULTS[case]
    faults = faults_of(text)
    assert len(faults) == 1 + (case == "name of a faulty rule"), faults
    assert faults[-1].startswith(expected)


def test_every_fault_is_named_at_once():
    """An operator repairs a file in one go; the exception is one of the settings'."""
    faults = faults_of("- {match: {status: 1}, do: x}\n- {match: {status: 500}, oops: 1}\n- 7\n")
    keys = [fault.split(": ")[1] for fault in faults]
    assert keys == ["rules[0].match.status", "rules[0].do", "rules[1].oops", "rules[2]"]
    assert issubclass(RulesError, SettingsError)


def test_lines_are_those_of_the_whole_file():
    """A fault in the worker's own file names its line in that file."""
    text = "http: {port: 1}\npolicy:\n  hold_max_s: 5\n  rules:\n  - match: {status: 500}\n    dou: hold\n"
    assert faults_of(text) == ["f.yaml:6: rules[0].dou: unknown key"]


def test_rules_from_settings_are_named_without_lines():
    """Rules that were parsed already, for example from a variable, are checked the same."""
    with pytest.raises(RulesError) as caught:
        parse_rules([{"match": {"status": 500}, "do": "hold", "oops": 1}])
    assert caught.value.faults == ["policy: rules[0].oops: unknown key"]
    (rule,) = parse_rules([{"match": {"status": 500}, "do": "hold"}])
    assert rule.name == "rules[0]"


def test_rules_from_settings_are_named_with_the_lines_of_their_file():
    """The settings are merged from several places; the file's text says where its rules stand."""
    text = "http: {port: 1}\npolicy:\n  rules:\n  - match: {status: 500}\n    dou: hold\n"
    with pytest.raises(RulesError) as caught:
        parse_rules([{"match": {"status": 500}, "dou": "hold"}], lines=rule_lines(text), source="worker.yaml")
    assert caught.value.faults == ["worker.yaml:5: rules[0].dou: unknown key"]


@pytest.mark.parametrize("text", ["", "http: {port: 1}", "policy: 7", "- [", "policy: {rules: no}"])
def test_a_file_without_rules_has_no_lines(text):
    """Whatever else the file is, asking for lines fails nothing."""
    assert rule_lines(text) == {}
