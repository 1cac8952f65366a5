"""Copies of requests that failed for good: which requests are copied, and what a copy that fails changes."""

from tests.support.fakes import FakeBackend, status
from tests.support.pipeline import Pipeline, data, message
from tests.support.virtual_time import virtual_time
from worker.errors import PublishRefusedError
from worker.ports import Settlement


@virtual_time
async def test_what_failed_for_good_is_copied_to_the_dead_letter_topic() -> None:
    """Original bytes and the reason, for retryable errors and for what is not a request; for nothing else."""
    pipeline = Pipeline(FakeBackend(status(500), status(400)), dead_letters=True)
    await pipeline.handle(message(data(metadata={"n": 1}), attempt=5, attributes={"k": "v"}))
    await pipeline.handle(message(attempt=5))
    await pipeline.handle(message(attempt=5))
    await pipeline.handle(message(b"nonsense"))
    copies = pipeline.dead_topic.published
    assert [copy.data for copy in copies] == [data(metadata={"n": 1}), b"nonsense"]
    assert copies[0].attributes["error_class"] == "server_error"
    assert copies[0].attributes["original.k"] == "v"


@virtual_time
async def test_a_copy_that_fails_does_not_matter() -> None:
    """The answer is what matters: the message is acked and the loss counted."""
    pipeline = Pipeline(FakeBackend(status(500)), dead_letters=True)
    pipeline.dead_topic.always = PublishRefusedError("gone")
    assert await pipeline.handle(message(attempt=5)) is Settlement.ACK
    assert pipeline.count("dead_letter_copies_total", "failed") == 1
