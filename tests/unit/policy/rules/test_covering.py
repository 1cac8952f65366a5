"""Rules that leave others nothing to do: what is called unreachable is, and what may be reached is let be."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.policy.model import ErrorEvent, Phase
from worker.policy.normalise import normalise
from worker.policy.rules.covering import covers
from worker.policy.rules.load import Rule
from worker.policy.rules.matching import first_match
from worker.policy.table import classify


def a_rule(**match: object) -> Rule:
    """A rule that matches this; one that may touch good answers says by a class what they are."""
    return Rule.model_validate({"name": "r", "match": match, "class": "overloaded"})


COVERED = [
    ({"status": "5xx"}, {"status": 503}),
    ({"status": 503}, {"status": 503, "model": "m"}),
    ({"backend": "*"}, {"status": 500}),
    ({"path": "*"}, {"path": "/v1/*"}),
    ({"model": "lora-*"}, {"model": ["lora-1", "lora-*"]}),
    ({"model": "*"}, {"model": "l*"}),
    ({"class": ["auth", "quota"]}, {"class": "quota"}),
    ({"attempts": {"max": 3}}, {"attempts": 2}),
    ({"attempts": {"min": 2}}, {"attempts": {"min": 2, "max": 5}}),
    ({"attempts": {"min": 1}}, {"attempts": {"max": 5}}),
    ({"body_regex": "x"}, {"body_regex": "x", "status": 500}),
    ({"status": ["2xx", 500]}, {"status": 200}),
    ({"code": ["a", "b"]}, {"code": "a", "param": "p"}),
    ({"phase": ["body", "send"]}, {"phase": "send"}),
]
NOT_COVERED = [
    ({"status": 503}, {"status": "5xx"}),
    ({"status": 503, "model": "m"}, {"status": 503}),
    ({"model": "*"}, {"status": 500}),  # a request without a model
    ({"model": "lora-*"}, {"model": ["lora-1", "other"]}),
    ({"model": "lora-?"}, {"model": "lora-[12]"}),  # it does, but two wildcards are not compared
    ({"backend": "a"}, {"status": 500}),
    ({"attempts": {"max": 3}}, {"attempts": {"min": 2}}),
    ({"attempts": {"min": 2}}, {"attempts": {"max": 5}}),
    ({"attempts": 1}, {"status": 500}),
    ({"delivery_attempt": {"min": 1}}, {"status": 500}),  # a subscription that does not count
    ({"body_regex": "x"}, {"body_regex": "xx"}),
    ({"backend": "*"}, {"status": 200}),  # only a rule that names a success sees one
    ({"code": "a"}, {"type": "a"}),
]


@pytest.mark.parametrize(("earlier", "later"), COVERED)
def test_a_rule_whose_every_event_is_taken_is_covered(earlier, later):
    """Sets, names and ranges of the later within those of the earlier."""
    assert covers(a_rule(**earlier), a_rule(**later))


@pytest.mark.parametrize(("earlier", "later"), NOT_COVERED)
def test_a_rule_that_may_still_fit_is_not_covered(earlier, later):
    """One event that only the later fits is enough, and so is a doubt."""
    assert not covers(a_rule(**earlier), a_rule(**later))


_MATCHES = st.fixed_dictionaries(
    {},
    optional={
        "backend": st.lists(st.sampled_from(["*", "a", "b", "a*"]), min_size=1),
        "model": st.lists(st.sampled_from(["*", "m", "m?", "[mn]"]), min_size=1),
        "status": st.lists(st.sampled_from(["2xx", "5xx", 200, 500, 503, 429]), min_size=1),
        "type": st.sampled_from(["t", "u"]),
        "class": st.lists(st.sampled_from(["overloaded", "server_error", "rate_limited"]), min_size=1),
        "attempts": st.sampled_from([1, 2, {"min": 2}, {"max": 2}, {"min": 1, "max": 3}]),
        "delivery_attempt": st.sampled_from([1, {"min": 2}, {"max": 2}]),
        "body_regex": st.sampled_from(["t", "u"]),
    },
).filter(bool)
_EVENTS = st.builds(
    ErrorEvent,
    backend=st.sampled_from(["a", "b", "ab"]),
    path=st.just("/v1/embeddings"),
    model=st.sampled_from([None, "m", "n", "mm"]),
    phase=st.just(Phase.PARSE),
    status=st.sampled_from([200, 429, 500, 503]),
    body=st.sampled_from([b"", b'{"error":{"type":"t"}}', b'{"error":{"type":"u"}}', b'{"data":[{}]}']),
    attempts=st.integers(1, 4),
    delivery_attempt=st.none() | st.integers(1, 3),
)


@given(_MATCHES, _MATCHES, _EVENTS)
def test_what_is_covered_is_never_reached(earlier, later, event):
    """Whatever happens, of the two the later never decides."""
    one, other = a_rule(**earlier), a_rule(**later)
    if covers(one, other):
        facts = normalise(event.status, event.headers, event.body)
        assert first_match((one, other), event, facts, classify(event, facts)) is not other
