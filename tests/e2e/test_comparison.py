"""The comparison of workers: its descriptions load, its counts are those of broker and backend, and nothing of ours is lost."""

from pathlib import Path

import pytest

from benchmarks.compare import DISASTERS, Candidate, find, play

CANDIDATES = Path(__file__).parents[2] / "benchmarks" / "candidates"
OURS = CANDIDATES / "inference-worker.yaml"
PLAIN = CANDIDATES / "plain-consumer.yaml"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.mark.parametrize("disaster", ["none", "HTML 502, 60 s", "SIGKILL, three times"])
def test_our_row(disaster: str):
    """Every request is answered, whatever happens, and none with an error."""
    assert disaster in DISASTERS
    result = play(Candidate.load(OURS), disaster, 0.02)
    print(result.row())
    assert result.sent == result.answered > 0
    assert (result.errors, result.malformed) == (0, 0)
    assert result.deliveries >= result.sent
    assert result.calls >= result.sent
    assert result.cpu_ms > 0


def test_another_worker_takes_part():
    """A program that has nothing of ours is started, asked and counted by its description alone."""
    result = play(Candidate.load(PLAIN), "none", 0.01)
    assert result.sent == result.answered == result.calls == result.deliveries


def test_a_request_is_made_as_described():
    """Number and body stand where the description has them, and keep their types."""
    candidate = Candidate(
        name="x",
        command=["x"],
        request={"id": "{index}", "payload": {"inner": ["{body}", "{index}"]}, "fixed": "{other}"},
        attributes={"key": "{index}"},
        answer={"index": "attributes.key", "body": "data"},
    )
    data, attributes = candidate.message(7, {"model": "m"})
    assert data == b'{"id": 7, "payload": {"inner": [{"model": "m"}, 7]}, "fixed": "{other}"}'
    assert attributes == {"key": "7"}


def test_what_stands_nowhere_is_none():
    """A path through something that is no object, or through a missing key."""
    assert find({"data": {"a": {"b": 1}}}, "data.a.b") == 1
    assert find({"data": {"a": 1}}, "data.a.b") is None
    assert find({}, "data.a") is None
