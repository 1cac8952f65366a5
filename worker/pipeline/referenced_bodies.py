"""
Bodies that messages only name (`body_uri`): fetched right before the search for a route, since its model decides that.

The body is kept in memory until the verdict about its request, waiting for the backend included; so all of them
together never have more bytes than the broker may lease (`pubsub.max_in_flight_bytes`).  A request whose body does not
fit waits, first come, first served, and keeps its lease meanwhile.  Nothing here decides what a failure means: it is
judged like the failure of an attempt.
"""

import asyncio
import hashlib
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from worker.delivery import Delivery
from worker.errors import AdmissionClosedError, PayloadError
from worker.policy.model import Fault
from worker.ports import OpenPayload, Payloads
from worker.telemetry.record import Recorder
from worker.wire.message import RequestMessage, with_body


class ByteRoom:
    """
    A number of bytes that is shared out, first come, first served.

    Args:
        capacity: Bytes; what is larger than all of them gets them all.
        on_change: Called with the bytes that are taken.
    """

    def __init__(self, capacity: int, on_change: Callable[[int], None]) -> None:
        self._capacity = capacity
        self._on_change = on_change
        self._taken = 0
        self._is_closed = False
        self._waiting = deque[tuple[int, asyncio.Future[None]]]()

    def try_take(self, size: int) -> bool:
        """Take so many bytes if they are free and nothing waits for them."""
        if self._waiting or not self._fits(size):
            return False
        self._take(size)
        return True

    async def take(self, size: int) -> None:
        """
        Take so many bytes, once they are free and it is this one's turn.

        Raises:
            AdmissionClosedError: Closed meanwhile; retryable by redelivery.

        Cancellation: nothing is taken.
        """
        if self._is_closed:
            raise AdmissionClosedError
        if self.try_take(size):
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((size, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self.give_back(size)  # its turn came in the same moment
            self._admit()  # those behind it may fit
            raise

    def give_back(self, size: int) -> None:
        """Return bytes that were taken."""
        self._take(-size)
        self._admit()

    def close(self) -> None:
        """Refuse what waits and what comes; idempotent."""
        self._is_closed = True
        while self._waiting:
            _, turn = self._waiting.popleft()
            if not turn.done():
                turn.set_exception(AdmissionClosedError())

    def _fits(self, size: int) -> bool:
        return self._taken == 0 or self._taken + size <= self._capacity

    def _take(self, size: int) -> None:
        self._taken += size
        self._on_change(self._taken)

    def _admit(self) -> None:
        while self._waiting:
            size, turn = self._waiting[0]
            if turn.done():  # given up
                self._waiting.popleft()
            elif self._fits(size):
                self._waiting.popleft()
                self._take(size)
                turn.set_result(None)
            else:
                return


class ReferencedBodies:
    """
    Fetches bodies from object storage.

    Args:
        payloads: Object storage.
        max_bytes: Of all bodies that are kept at once.
        recorder: Is told of every fetch.
    """

    def __init__(self, payloads: Payloads, recorder: Recorder, *, max_bytes: int) -> None:
        self._payloads = payloads
        self._recorder = recorder
        self._room = ByteRoom(max_bytes, recorder.payload_memory)
        self.check = payloads.check

    def close(self) -> None:
        """Let nothing wait for memory any more; a fetch that has begun goes on.  Idempotent."""
        self._room.close()

    async def load(self, delivery: Delivery, request: RequestMessage, *, give_up_s: float) -> RequestMessage:
        """
        Return the request with the body that it names; `release` gives its memory back.

        Args:
            delivery: Whose request it is, for the records.
            request: Its `body_uri` is allowed.
            give_up_s: For everything, the wait for memory included.

        Raises:
            PayloadError: It could not be fetched, or not in that time; `policy` decides whether to try again.
            MessageError: It is not a JSON object; permanent.
            AdmissionClosedError: The worker is draining, and there is no memory for it.

        Cancellation: nothing is kept.
        """
        self._recorder.payload_starts(delivery, "read")
        size, fault = 0, "cancelled"
        try:
            data = await self._fetch_within(request, give_up_s)
            size, fault = len(data), ""
        except PayloadError as error:
            fault = error.fault
            raise
        except AdmissionClosedError:
            fault = "draining"
            raise
        finally:
            self._recorder.payload_ends(delivery, "read", size=size, fault=fault)
        with self._given_back_on_error(size):
            return with_body(request, data)

    def release(self, loaded: RequestMessage) -> None:
        """Give back the memory of a request that `load` returned, once nothing holds its body any more."""
        assert loaded.body is not None
        self._room.give_back(len(loaded.body.data))

    async def _fetch_within(self, request: RequestMessage, give_up_s: float) -> bytes:
        try:
            async with asyncio.timeout(give_up_s):
                return await self._fetch(request)
        except TimeoutError:
            detail = "The lease or the deadline ends before it was read."
            raise PayloadError(Fault.PAYLOAD_UNAVAILABLE, detail) from None

    async def _fetch(self, request: RequestMessage) -> bytes:
        """Return the body, whose bytes are then taken."""
        assert request.body_uri is not None
        async with self._payloads.open(request.body_uri) as payload:
            size = payload.size
            if self._room.try_take(size):
                with self._given_back_on_error(size):
                    return await _read(payload, size, request.body_sha256)
        await self._room.take(size)  # not with an open connection: storage would close it
        with self._given_back_on_error(size):
            async with self._payloads.open(request.body_uri) as payload:
                return await _read(payload, size, request.body_sha256)

    @contextmanager
    def _given_back_on_error(self, size: int) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._room.give_back(size)
            raise


async def _read(payload: OpenPayload, promised: int, sha256: str | None) -> bytes:
    """
    Return the content of an object, checked.

    Raises:
        PayloadError: It has not the promised size, or another digest.

    Cancellation: leaves nothing behind.
    """
    digest, chunks, size = hashlib.sha256(), list[bytes](), 0
    async for chunk in payload.chunks:
        size += len(chunk)
        if size > promised:
            break
        if sha256 is not None:
            digest.update(chunk)
        chunks.append(chunk)
    if size != promised:
        raise PayloadError(Fault.PAYLOAD_UNAVAILABLE, f"Not exactly the {promised} bytes came that were promised.")
    if sha256 is not None and digest.hexdigest() != sha256:
        raise PayloadError(Fault.PAYLOAD_MISMATCH, f"It is {digest.hexdigest()}.")
    return b"".join(chunks)
