"""`docs/streaming.md` names what there is, and nothing else."""

import json
import re
from pathlib import Path
from typing import get_args

import pytest

from tests.support.fakes import Answer, FakeBackend
from tests.support.pipeline import Pipeline, message
from tests.support.streams import broken
from tests.support.virtual_time import virtual_time
from worker.backends.request.continuation import _NOT_CONTINUED
from worker.backends.request.stream import DIFFERENT_IN_STREAMS, UNARY_FEATURES
from worker.settings.schema import ContinuationMode, StreamMode
from worker.telemetry.metrics import catalogue

PAGE = (Path(__file__).parents[2] / "docs" / "streaming.md").read_text("utf-8")


def section(title: str) -> str:
    return PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def first_cells(text: str) -> list[str]:
    """The words in code in the first column of the tables."""
    cells = re.findall(r"^\| (`[^|]*) \|", text, re.MULTILINE)
    return [word for cell in cells for word in re.findall(r"`([^`]+)`", cell)]


def test_the_settings_values_are_the_real_ones() -> None:
    """Every value of `stream` and of `continuation` has its row."""
    assert set(get_args(StreamMode)) < set(first_cells(section("When")))
    assert set(get_args(ContinuationMode)) == set(first_cells(section("Going on where a stream broke")))


def test_what_is_not_streamed_is_told() -> None:
    """Every key, and `n`."""
    told = set(first_cells(section("When"))) - set(get_args(StreamMode))
    assert told == {*UNARY_FEATURES, *DIFFERENT_IN_STREAMS, "n"}


@pytest.mark.parametrize("key", ["tools", "logprobs", "echo", "suffix", "min_tokens"])
def test_what_is_not_continued_is_told(key: str) -> None:
    """The keys that people use; those of grammars are many and told together."""
    assert key in _NOT_CONTINUED
    assert f"`{key}`" in section("Going on where a stream broke")


def test_metrics_are_real_ones() -> None:
    """A name that is not in the catalogue would never be found."""
    real = {name for name, *_ in catalogue()}
    assert set(re.findall(r"inference_worker_\w+", PAGE)) <= real


@virtual_time
async def test_the_stats_are_the_real_ones() -> None:
    """The keys of the example are those of an answer."""
    example = json.loads("{" + re.search(r'"stats": \{.*?\n          "request_time[^}]*\}', PAGE, re.DOTALL)[0] + "}")  # type: ignore[index]
    pipeline = Pipeline(FakeBackend(Answer()), include_stats=True)
    await pipeline.handle()
    stats = pipeline.answer.json["stats"]
    assert list(stats) == list(example["stats"])
    assert list(stats["tokens"]) == list(example["stats"]["tokens"])


@virtual_time
async def test_the_partial_answer_is_a_real_one() -> None:
    """Shape, status and words of the example."""
    example = json.loads(re.search(r"```json\n(.*?)```", section("Partial answers"), re.DOTALL)[1])  # type: ignore[index]
    pipeline = Pipeline(FakeBackend(then=broken()))
    await pipeline.handle(message(attempt=5))
    answer = pipeline.answer.json
    assert answer["status_code"] == example["status_code"]
    assert set(answer["body"]) == set(example["body"])
    assert set(answer["body"]["error"]) == set(example["body"]["error"])
    assert answer["body"]["error"]["message"].startswith(example["body"]["error"]["message"])  # and what broke it
    for key in ("type", "code", "retryable"):
        assert answer["body"]["error"][key] == example["body"]["error"][key]
