"""Behaviours: what a control document may say, whom a behaviour hits and for how long."""

from typing import Any

import pytest
from multidict import CIMultiDict

from worker.emulators.openai.control import ControlError, Controls
from worker.emulators.openai.faults import MODES, Facts, Stage
from worker.emulators.openai.options import SimOptions


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def a_request(**changes: Any) -> Facts:
    """Return the facts of a chat request."""
    facts: dict[str, Any] = {
        "path": "/v1/chat/completions",
        "model": "llama",
        "stream": False,
        "headers": CIMultiDict({"X-Request-Id": "job7-1"}),
        "data": b'{"model":"llama","messages":[]}',
        "metadata": {"team": "blue"},
        "is_inference": True,
    }
    return Facts(**{**facts, **changes})


def controls_with(document: object, clock: Clock | None = None, **options: Any) -> Controls:
    """Return controls after a document was applied."""
    controls = Controls(SimOptions.of(**options), clock or Clock())
    controls.apply(document)
    return controls


def hit_by(controls: Controls, facts: Facts | None = None) -> str | None:
    """Return the name of the behaviour that hits a request."""
    behaviour = controls.choose(facts or a_request())
    return behaviour.name if behaviour else None


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_needs_nothing_but_its_name(mode: str) -> None:
    """Each mode has defaults for all its parameters, and its own JSON describes it."""
    controls = controls_with({"behaviours": [{"mode": mode}]})
    shown = controls.behaviours[0].as_json(0)
    assert shown["mode"] == mode
    assert set(MODES[mode].params) <= shown.keys()


def test_a_plain_ok_clears_everything() -> None:
    """`{"mode": "ok"}` ends all misbehaviour, with a filter it exempts."""
    controls = controls_with({"mode": "hang"})
    controls.apply({"mode": "ok"})
    assert controls.behaviours == []
    controls.apply({"behaviours": [{"mode": "ok", "match": {"model": "llama"}}, {"mode": "hang"}]})
    assert [hit_by(controls), hit_by(controls, a_request(model="other"))] == ["ok", "hang"]


@pytest.mark.parametrize(
    ("document", "named"),
    [
        ([], "JSON object"),
        ({"modus": "hang"}, "modus"),
        ({"mode": "explode"}, "explode"),
        ({"mode": "hang", "hang_seconds": 3, "counter": 1}, "counter, hang_seconds"),
        ({"mode": "outage_5xx", "status": 404}, "control.status"),
        ({"mode": "rate_limit", "retry_after": "soon"}, "control.retry_after"),
        ({"mode": "stream", "break": "snap", "line_ending": "lfcr", "bom": 1}, "control.bom"),
        ({"mode": "hang", "probability": 2, "count": 0, "for_s": -1}, "control.for_s"),
        ({"mode": "hang", "match": {"modell": "x", "stream": "yes"}}, "control.match.stream"),
        ({"mode": "hang", "match": "x"}, "control.match"),
        ({"mode": "refuse", "match": {"path": "/x"}}, "control.match"),
        ({"mode": "refuse", "count": 3}, "count"),
        ({"mode": "raw", "headers": {"X": "a\r\nb"}}, "control.headers"),
        ({"behaviours": {}}, "behaviours"),
        ({"behaviours": [{"mode": "ok"}, {"mode": "no"}, 3]}, "behaviours[2]"),
        ({"remove": "absent"}, "remove"),
        ({"settings": {"latency": "x", "speed": 1}}, "speed"),
        ({"settings": []}, "settings"),
        ({"mode": "hang", "settings": {"seed": "x"}}, "seed"),
    ],
)
def test_what_is_not_understood_is_named_and_changes_nothing(document: object, named: str) -> None:
    """A document with any fault is refused with its place, and the behaviours in force stay."""
    controls = controls_with({"mode": "reset"})
    before = (controls.behaviours, controls.options)
    with pytest.raises(ControlError) as raised:
        controls.apply(document)
    assert named in str(raised.value)
    assert (controls.behaviours, controls.options) == before


def test_all_faults_are_in_one_message() -> None:
    """A document with faults in several places is answered with all of them."""
    with pytest.raises(ControlError) as raised:
        controls_with({"behaviours": [{"mode": "no"}, {"mode": "hang", "x": 1}], "settings": {"y": 1}, "z": 1})
    assert all(part in str(raised.value) for part in ("behaviours[0]", "behaviours[1]", "settings", "unknown keys: z"))


@pytest.mark.parametrize(
    ("match", "hits"),
    [
        ({}, True),
        ({"path": "/v1/chat/*"}, True),
        ({"path": "/v1/embeddings"}, False),
        ({"model": "lla*"}, True),
        ({"model": "gpt*"}, False),
        ({"header": {"x-request-id": "job7"}}, True),
        ({"header": {"x-request-id": "job8"}}, False),
        ({"metadata": {"team": "blu"}}, True),
        ({"metadata": {"team": "red"}}, False),
        ({"body": '"messages"'}, True),
        ({"body": "nowhere"}, False),
        ({"stream": False}, True),
        ({"stream": True}, False),
        ({"model": "llama", "body": "nowhere"}, False),
    ],
)
def test_filters_must_all_hold(match: dict[str, Any], hits: bool) -> None:
    """A behaviour hits a request that passes every one of its filters."""
    assert (hit_by(controls_with({"mode": "hang", "match": match})) == "hang") is hits


def test_an_absent_header_or_key_matches_nothing() -> None:
    """A filter on a header, a metadata key or a model that is not there does not hold."""
    facts = a_request(headers=CIMultiDict(), metadata={}, model=None)
    for match in ({"header": {"x-request-id": "job"}}, {"metadata": {"team": "b"}}, {"model": "*"}):
        assert hit_by(controls_with({"mode": "hang", "match": match}), facts) is None


def test_errors_of_inference_leave_health_alone() -> None:
    """An outage hits `/health` too, a rate limit does not, unless its filter names the path."""
    health = a_request(path="/health", is_inference=False)
    assert hit_by(controls_with({"mode": "outage_5xx"}), health) == "outage_5xx"
    assert hit_by(controls_with({"mode": "rate_limit"}), health) is None
    assert hit_by(controls_with({"mode": "rate_limit", "match": {"path": "/health"}}), health) == "rate_limit"


def test_broken_streams_hit_streams_and_broken_bodies_hit_bodies() -> None:
    """`stream` matches only streamed requests, modes that spoil a JSON body only the others."""
    assert hit_by(controls_with({"mode": "stream"})) is None
    assert hit_by(controls_with({"mode": "stream"}), a_request(stream=True)) == "stream"
    assert hit_by(controls_with({"mode": "half_json"})) == "half_json"
    assert hit_by(controls_with({"mode": "half_json"}), a_request(stream=True)) is None


def test_count_and_skip_choose_which_requests_are_hit() -> None:
    """`skip` lets the first pass, `count` ends after so many."""
    controls = controls_with({"mode": "hang", "skip": 2, "count": 3})
    assert [hit_by(controls) for _ in range(7)] == [None, None, "hang", "hang", "hang", None, None]
    assert controls.behaviours[0].as_json(100)["state"] == "spent"


def test_time_limits_begin_and_end() -> None:
    """`after_s` delays a behaviour, `for_s` ends it, and ended it stays."""
    clock = Clock()
    controls = controls_with({"mode": "hang", "after_s": 5, "for_s": 10}, clock)
    seen = []
    for now_s in (100, 104.9, 105, 114.9, 115, 200):
        clock.now_s = now_s
        seen.append(hit_by(controls))
    assert seen == [None, None, "hang", "hang", None, None]


def test_probability_is_a_share_and_the_same_each_run() -> None:
    """A probability hits about that share of the requests, and the same ones under the same seed."""
    first, second, other = (controls_with({"mode": "hang", "probability": 0.3}, seed=seed) for seed in (1, 1, 2))
    hits = [[hit_by(controls) for _ in range(1000)] for controls in (first, second, other)]
    assert hits[0] == hits[1] != hits[2]
    assert 250 < hits[0].count("hang") < 350


def test_behaviours_are_added_removed_and_tried_in_order() -> None:
    """The first that matches decides; `add` puts behind, `remove` takes out by name."""
    controls = controls_with({"mode": "hang", "name": "a", "match": {"model": "x"}})
    controls.apply({"add": {"mode": "reset"}})
    controls.apply({"add": [{"mode": "close"}]})
    assert hit_by(controls) == "reset"
    controls.apply({"remove": ["reset"], "settings": {"max_concurrency": 3}})
    assert [hit_by(controls), hit_by(controls, a_request(model="x"))] == ["close", "a"]
    assert controls.options.max_concurrency == 3


def test_a_reset_restores_the_options_of_the_start() -> None:
    """After a reset the server is as it was started."""
    controls = controls_with({"mode": "hang", "settings": {"latency": "1s"}}, seed=5)
    controls.reset(settings=False)
    assert (controls.behaviours, str(controls.options.latency)) == ([], "1s")
    controls.reset()
    assert controls.options == SimOptions(seed=5)


def test_setting_a_capacity_begins_its_steps_again() -> None:
    """The seconds of a capacity count from when it was set, also when the same one is set again."""
    clock = Clock()
    controls = controls_with({"settings": {"capacity": "0:4,5:2"}}, clock)
    clock.now_s = 150.0
    controls.apply({"settings": {"seed": 1}})
    assert controls.capacity_since_s == 100.0
    controls.apply({"settings": {"capacity": "0:4,5:2"}})
    assert controls.capacity_since_s == 150.0


def test_a_refusal_says_when_it_changes() -> None:
    """The listener learns whether to refuse and when to ask again."""
    clock = Clock()
    controls = controls_with({"mode": "refuse", "after_s": 5, "for_s": 10}, clock)
    assert controls.refusal() == (None, 5.0)
    clock.now_s = 105.0
    refusing, change_in_s = controls.refusal()
    assert refusing is not None
    assert change_in_s == 10.0
    assert controls.choose(a_request()) is None
    clock.now_s = 115.0
    assert controls.refusal() == (None, None)


def test_stages_cover_every_mode() -> None:
    """Only `stream` concerns streams alone, only `refuse` the listener."""
    by_stage = {stage: [mode.name for mode in MODES.values() if mode.stage is stage] for stage in Stage}
    assert (by_stage[Stage.STREAM], by_stage[Stage.LISTENER], by_stage[Stage.OK]) == (["stream"], ["refuse"], ["ok"])
