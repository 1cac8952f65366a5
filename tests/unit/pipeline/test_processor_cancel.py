"""Cancellation wherever it strikes: one settlement, an answer that exists goes out, nothing stays behind."""

import asyncio

import pytest

from tests.support.fakes import REFUSED, Answer, FakeBackend, FakePublisher, status
from tests.support.pipeline import METADATA, Pipeline, data, message
from tests.support.virtual_time import loop_time, settle, virtual_time
from worker.errors import PublishRefusedError, PublishRetryableError
from worker.pipeline.dedupe import Dedupe
from worker.ports import Settlement

ACK, NACK = Settlement.ACK, Settlement.NACK


class SlowStore:
    """A dedupe store over a network: every call lets others run."""

    def __init__(self) -> None:
        self.entries: dict[str, str] = {}

    async def get(self, key: str, fingerprint: str) -> Dedupe:
        await settle(3)
        known = self.entries.get(key)
        return Dedupe.MISS if known is None else Dedupe.HIT if known == fingerprint else Dedupe.CONFLICT

    async def put(self, key: str, fingerprint: str) -> None:
        await settle(3)
        self.entries[key] = fingerprint


def _good() -> Pipeline:
    return Pipeline(store=SlowStore(), dead_letters=True)


def _failing() -> Pipeline:
    return Pipeline(FakeBackend(then=status(500)), store=SlowStore(), dead_letters=True)


def _held() -> Pipeline:
    return Pipeline(FakeBackend(status(429), REFUSED), store=SlowStore())


def _published_late() -> Pipeline:
    return Pipeline(publisher=FakePublisher(PublishRetryableError("a"), PublishRefusedError("b")), store=SlowStore())


def _refused() -> Pipeline:
    return Pipeline(publisher=FakePublisher(limit=500), store=SlowStore())


@pytest.mark.parametrize("attempt", [1, 5])
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("build", [_good, _failing, _held, _published_late, _refused])
def test_cancelled_at_any_point_it_settles_once_and_leaks_nothing(build, times: int, attempt: int) -> None:
    """
    However far it came, a cancelled delivery ends in one settlement: an ack if its answer is out, a nack if not.

    No slot, no waiter and no task stays behind, and nothing keeps the intake closed.
    """
    steps = 0

    @virtual_time
    async def run() -> bool:
        pipeline = build()
        handling = pipeline.start(message(data({"x": "y" * 500}), attempt=attempt))
        for _ in range(steps):
            if not handling.done() and steps > 40:
                await asyncio.sleep(0.05)
            await asyncio.sleep(0)
        was_over = handling.done()
        for _ in range(times):
            handling.cancel()
            await asyncio.sleep(0)
        try:
            settlement = await handling
        except asyncio.CancelledError:
            settlement = NACK  # cancelled before its first step: the adapter's own answer to that
            assert steps == 0
        assert len(pipeline.answers) <= 1
        if times == 1 or was_over:
            assert settlement is (ACK if pipeline.answers else NACK)
        else:  # told twice: an answer that was under way may be out without our knowledge
            assert settlement is NACK or pipeline.answers
        if attempt == 5 and times == 1 and steps:
            assert settlement is ACK
        pipeline.assert_nothing_leaks()
        assert pipeline.intake.reasons == ()
        over.append(was_over)

    over: list[bool] = []
    while not any(over):
        run()
        steps += 1
        assert steps < 2000
    assert steps > 10


@virtual_time
async def test_cancelled_while_publishing_the_answer_still_goes_out() -> None:
    """The answer is paid for: it is published, the message acked, and another tried publish is not lost either."""
    pipeline = Pipeline(publisher=FakePublisher(PublishRetryableError("hiccup")))
    pipeline.publisher.hold()
    handling = pipeline.start()
    await settle()
    handling.cancel()
    await settle()
    assert not handling.done()
    pipeline.publisher.let_go()
    assert await handling is ACK
    assert len(pipeline.answers) == 1


@virtual_time
async def test_cancelled_while_publishing_it_waits_no_longer_than_settle_s() -> None:
    """A broker that never answers does not keep the process: the message goes back."""
    pipeline = Pipeline(settle_s=40.0)
    pipeline.publisher.hold()
    handling = pipeline.start()
    await asyncio.sleep(100)
    handling.cancel()
    assert await handling is NACK
    assert loop_time() == pytest.approx(140, abs=0.1)


@virtual_time
async def test_an_answer_given_because_of_the_cancellation_has_no_longer_either() -> None:
    """The last attempt's answer is published after the cancellation; its time is counted from there too."""
    pipeline = Pipeline(settle_s=40.0)
    pipeline.backend.hold()
    pipeline.publisher.always = PublishRefusedError("gone")
    handling = pipeline.start(message(attempt=5))
    await asyncio.sleep(100)
    handling.cancel()
    assert await handling is NACK
    assert loop_time() == pytest.approx(140, abs=0.1)
    pipeline.assert_nothing_leaks()


@virtual_time
async def test_many_cancelled_at_once_leak_nothing() -> None:
    """Those that run and those that wait are told in one turn of the loop, as at the end of a grace."""
    for outcome in (Answer(seconds=5.0), REFUSED, status(500), status(429)):
        pipeline = Pipeline(FakeBackend(then=outcome), window=4)
        handling = [pipeline.start(message(attempt=1)) for _ in range(12)]
        await asyncio.sleep(3.2)
        for task in handling:
            task.cancel()
        assert await asyncio.gather(*handling) == [NACK] * 12
        pipeline.assert_nothing_leaks()
        assert pipeline.count("internal_errors_total") == 0


@virtual_time
async def test_hurry_shortens_what_is_waited_for_already() -> None:
    """A second signal leaves two seconds, also to those that were promised forty."""
    pipeline = Pipeline(settle_s=40.0)
    pipeline.publisher.hold()
    handling = pipeline.start()
    await settle()
    handling.cancel()
    await asyncio.sleep(5)
    pipeline.processor.hurry(2.0)
    assert await handling is NACK
    assert loop_time() == pytest.approx(7, abs=0.1)


@virtual_time
async def test_cancelled_on_its_last_attempt_it_is_answered() -> None:
    """A nack would be dead-lettered silently: the requester learns that the worker was stopped."""
    pipeline = Pipeline()
    pipeline.backend.hold()
    handling = pipeline.start(message(attempt=5))
    await settle()
    handling.cancel()
    assert await handling is ACK
    assert pipeline.answer.json["status_code"] == 503
    assert pipeline.answer.json["metadata"] == METADATA
    assert pipeline.answer.attributes["error_class"] == "aborted"
    assert pipeline.backend.cancelled == 1


@virtual_time
async def test_cancelled_while_it_waits_to_be_handed_back_the_real_error_is_answered() -> None:
    """On the last attempt the answer tells what the backend said, not that the worker was stopped."""
    pipeline = Pipeline(FakeBackend(then=status(500)))
    handling = pipeline.start(message(attempt=5))
    await settle()
    handling.cancel()
    assert await handling is ACK
    assert pipeline.answer.attributes["error_class"] == "server_error"
