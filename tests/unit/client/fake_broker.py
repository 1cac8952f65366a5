"""
A broker with a worker behind it, in memory: reorders, duplicates and delays answers, and redelivers what is not acked.

It is a small working thing, not a mock: what is published is decoded as the worker decodes it and answered with a 200
that echoes the body, or with the 400 of a bad message.
"""

import asyncio
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import msgspec

from worker.client.ports import AnswerHandler
from worker.errors import MessageError
from worker.wire.message import RUN_ATTRIBUTES, decode_request, encode_response

Respond = Callable[[bytes, Mapping[str, str]], tuple[bytes, dict[str, str]]]


def echo(data: bytes, attributes: Mapping[str, str]) -> tuple[bytes, dict[str, str]]:
    """Answer as the worker would: the body comes back with a usage, a bad message gets a 400."""
    copied = {name: attributes[name] for name in RUN_ATTRIBUTES if name in attributes}
    try:
        request = decode_request(data)
    except MessageError as error:
        body = {"error": {"message": error.reason, "type": "worker_error", "code": "bad_message"}}
        body["error"] |= {"backend": None, "attempts": 0}
        answer = encode_response(400, error.metadata, msgspec.json.encode(body))
        return answer, {**copied, "error_class": "bad_message"}
    usage = b'{"prompt_tokens":3,"completion_tokens":5}'
    answer = encode_response(
        200,
        request.metadata,
        b'{"echo":%s,"usage":%s}' % (request.body.data if request.body is not None else b"null", usage),
    )
    return answer, {**copied, "backend_request_id": "req-1"}


@dataclass
class FakeBroker:
    """Holds answers back for a random number of the event loop's turns; `seed` decides everything."""

    seed: int = 0
    respond: Respond = echo
    duplicates: float = 0.0
    """Share of answers that are delivered twice."""
    max_turns: int = 0
    """Longest delay of an answer."""
    published: list[tuple[bytes, dict[str, str]]] = field(default_factory=list)
    acked: int = 0
    failures: list[Exception] = field(default_factory=list)
    """Raised by the next publishes, first one first."""
    is_settled: bool = False
    """The receiving end was cancelled and ended in order."""

    def __post_init__(self) -> None:
        self._rng = random.Random(self.seed)
        self._due: list[tuple[bytes, dict[str, str]]] = []
        self._arrived = asyncio.Event()

    @property
    def unanswered_ids(self) -> set[str]:
        return {attributes["line_id"] for _, attributes in self._due}

    async def publish(self, data: bytes, attributes: Mapping[str, str], /) -> str:
        if self.failures:
            raise self.failures.pop(0)
        self.published.append((data, dict(attributes)))
        await asyncio.sleep(0)
        self.inject(*self.respond(data, attributes))
        return str(len(self.published))

    def inject(self, data: bytes, attributes: dict[str, str]) -> None:
        """Put an answer on the response topic."""
        copies = 2 if self._rng.random() < self.duplicates else 1
        self._due += [(data, attributes)] * copies
        self._arrived.set()

    async def answers(self, handler: AnswerHandler, /) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                while True:
                    while not self._due:
                        self._arrived.clear()
                        await self._arrived.wait()
                    item = self._due.pop(self._rng.randrange(len(self._due)))
                    group.create_task(self._deliver(handler, item))
                    await asyncio.sleep(0)
        finally:
            self.is_settled = True

    async def _deliver(self, handler: AnswerHandler, item: tuple[bytes, dict[str, str]]) -> None:
        for _ in range(self._rng.randint(0, self.max_turns)):
            await asyncio.sleep(0)
        await handler(item[0], item[1], "message")
        self.acked += 1
