"""Whatever comes over the response topic becomes a well-formed result line, and both databases take it."""

import json
import random
from typing import Any

from tests.support.batches import again, start
from worker.batches.lines import outcome_of, result_line
from worker.batches.store import Batch, Store

ANSWERS = 1_500
STATUSES = (
    200,
    201,
    204,
    299,
    300,
    302,
    400,
    404,
    429,
    500,
    502,
    599,
    600,
    100,
    99,
    0,
    -1,
    10**12,
    2**70,
    200.0,
    "200",
    None,
)
TEXTS = ("", "x\u0000y", "\ud800", "é" * 600, "deadline_exceeded", "rate_limited")
NUMBERS = (0, -1, 2**53, 2**63, 2**70, 1e308, True, None)


def value(dice: random.Random, depth: int = 0) -> Any:
    """A JSON value such as a broken or hostile server might send."""
    kind = dice.randrange(7 if depth < 3 else 3)
    match kind:
        case 0:
            return dice.choice(NUMBERS)
        case 1:
            return dice.choice(TEXTS)
        case 2:
            return dice.choice(([], {}, [{}]))
        case 3:
            return {"error": value(dice, depth + 1)}
        case 4:
            return {"error": {name: value(dice, depth + 1) for name in ("code", "message", "type")}}
        case _:
            details = {"cached_tokens": dice.choice(NUMBERS)}
            counts = {name: dice.choice(NUMBERS) for name in ("prompt_tokens", "completion_tokens")}
            return {"usage": {**counts, "prompt_tokens_details": details}}


def answer(dice: random.Random) -> bytes:
    if dice.random() < 0.1:
        return dice.randbytes(dice.randrange(60))
    if dice.random() < 0.02:
        return b'{"status_code":200,"metadata":{},"body":{"a":' + b"[" * 5_000 + b"]" * 5_000 + b"}}"
    fields = {"status_code": dice.choice(STATUSES), "metadata": {}, "body": value(dice)}
    if dice.random() < 0.1:
        fields["body_uri"] = dice.choice(("gs://x/y\u0000", 5, None))
    if dice.random() < 0.1:
        del fields["body"]
    data = json.dumps(fields).encode()
    return data[: dice.randrange(len(data))] if dice.random() < 0.1 else data


def attributes(dice: random.Random, batch: Batch, record: int) -> dict[str, str]:
    found = {"run_id": batch.id, "line_id": str(record)}
    for name in ("error_class", "backend_request_id"):
        if dice.random() < 0.3:
            found[name] = dice.choice([text for text in TEXTS if text.isprintable() or "\u0000" in text])
    return found


def test_any_answer_is_a_result(store: Store):
    dice = random.Random(1)
    batch = start(store, ANSWERS)
    found = [outcome_of(answer(dice), attributes(dice, batch, record)) for record in range(1, ANSWERS + 1)]
    outcomes = [each for each in found if each is not None]
    assert len(outcomes) == ANSWERS
    assert {each.is_ok for each in outcomes} == {True, False}
    assert store.record(outcomes).stored == ANSWERS
    assert again(store, batch).settled == ANSWERS
    stored = store.outcomes_of(batch.id, after=0, limit=ANSWERS)
    assert [each.record for each in stored] == list(range(1, ANSWERS + 1))
    for outcome in stored:
        line = result_line(outcome, b'"c"', None)
        assert line.count(b"\n") == 1
        result = json.loads(line)
        response, error = result["response"], result["error"]
        if outcome.is_ok:
            assert error is None
            assert 200 <= response["status_code"] < 300
            assert isinstance(response["body"], dict)
            continue
        assert isinstance(error["code"], str)
        assert isinstance(error["message"], str)
        assert error["code"]
        assert error["message"]
        if response is not None:
            assert 300 <= response["status_code"] < 600
            assert "error" in response["body"]
