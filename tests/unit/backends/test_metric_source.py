"""Numbers out of a page of metrics and out of Prometheus' answers, and what is no number."""

import json
from typing import Any

import pytest

from worker.backends.metric_source import page_value, vector_value
from worker.errors import MetricSourceError
from worker.settings.schema import PRESET_SIGNALS, MetricSignalSettings

VLLM = r"""# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="a"} 12.0
vllm:num_requests_running{engine="1",model_name="a"} 3.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="a"} 2.0
vllm:num_requests_waiting{engine="1",model_name="a"} 0.0
# TYPE vllm:num_requests_waiting_by_reason gauge
vllm:num_requests_waiting_by_reason{engine="0",model_name="a",reason="capacity"} 2.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="a"} 0.31
vllm:kv_cache_usage_perc{engine="1",model_name="a"} 0.64
odd{text="a \"quoted\" } {",other="x"} 1e3 1395066363000
nothing NaN
broken{ 3
"""


def signal(*metric: str, **more: Any) -> MetricSignalSettings:
    return MetricSignalSettings(metric=list(metric), whole_at=0, closed_at=1, **more)


@pytest.mark.parametrize(
    ("wanted", "number"),
    [
        (signal("vllm:num_requests_waiting"), 2.0),
        (signal("vllm:num_requests_running"), 15.0),
        (signal("vllm:num_requests_running", labels={"engine": "1"}), 3.0),
        (signal("vllm:kv_cache_usage_perc", combine="max"), 0.64),
        (signal("vllm:gpu_cache_usage_perc", "vllm:kv_cache_usage_perc", combine="max"), 0.64),
        (signal("odd", labels={"other": "x"}), 1000.0),
    ],
)
def test_a_number_of_a_page(wanted: MetricSignalSettings, number: float) -> None:
    """Exactly this name, the series with these labels, summed or the largest; of several names the first there is."""
    assert page_value(VLLM, wanted) == number


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (signal("vllm:num_requests"), "there is no metric vllm:num_requests"),
        (signal("a", "b"), "there is no metric a or b"),
        (signal("odd", labels={"other": "y"}), "there is no metric odd with the labels {'other': 'y'}"),
        (signal("nothing"), "nothing is NaN"),
        (signal("broken"), "broken cannot be read"),
    ],
)
def test_a_page_without_the_number(wanted: MetricSignalSettings, words: str) -> None:
    """The name is told, so that an operator sees what the engine does not have."""
    with pytest.raises(MetricSourceError, match="unusable") as caught:
        page_value(VLLM, wanted)
    assert words in caught.value.detail


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_an_engines_own_signals_are_usable(engine: str) -> None:
    """Requests that wait close the gate before a full cache does; both are numbers of a load."""
    waiting, cache = PRESET_SIGNALS[engine]
    assert (waiting.whole_at < waiting.closed_at, waiting.combine) == (True, "sum")
    assert (0 < cache.whole_at < cache.closed_at < 1, cache.combine) == (True, "max")


def prometheus(kind: str, result: Any) -> bytes:
    return json.dumps({"status": "success", "data": {"resultType": kind, "result": result}}).encode()


def series(value: str) -> dict[str, Any]:
    return {"metric": {"job": "a"}, "value": [1700000000.1, value]}


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        (prometheus("scalar", [1700000000.1, "3.5"]), 3.5),
        (prometheus("vector", [series("7")]), 7.0),
        (prometheus("vector", [series("+Inf")]), float("inf")),
    ],
)
def test_a_number_of_a_query(answer: bytes, number: float) -> None:
    """A scalar, or a vector's only element."""
    assert vector_value(answer) == number


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (prometheus("vector", []), "the query gives no data"),
        (prometheus("vector", [series("1"), series("2")]), "2 series, put sum() or max() around it"),
        (prometheus("vector", [series("NaN")]), "is NaN"),
        (prometheus("matrix", [{"metric": {}, "values": []}]), "the query gives a matrix"),
        (prometheus("string", [1, "x"]), "the query gives a string"),
        (prometheus("vector", [{}]), "no answer of Prometheus"),
        (prometheus("scalar", None), "no answer of Prometheus"),
        (b"<html>", "no answer of Prometheus"),
        (b"[]", "no answer of Prometheus"),
        (b"null", "no answer of Prometheus"),
    ],
)
def test_an_answer_without_a_number(answer: bytes, words: str) -> None:
    """Whatever a server answers in place of Prometheus is told, and is no reading."""
    with pytest.raises(MetricSourceError) as caught:
        vector_value(answer)
    assert (caught.value.reason, words in caught.value.detail) == ("unusable", True), caught.value.detail
