"""
An aiohttp response that says when its request is on its way, and whose body fails when its connection ends.

aiohttp makes the response object when a connection stands and the request was handed to it, long before any answer.
The function in `on_connected` is called at that moment; a context variable, because the session between the transport
and the response has no place for an argument.

aiohttp 3.14's C parser forgets the body when its framing turns out to be broken after the headers were delivered (an
illegal chunk header, say): the connection is closed, and the reader of the body waits for ever.  So the end of the
connection is watched, and a body that then has neither ended nor failed is failed here.

One watch per connection, not per response: a kept connection sees thousands.  A response that was complete with its
headers needs none.
"""

import asyncio
from collections.abc import Callable
from contextvars import ContextVar
from typing import Self
from weakref import WeakKeyDictionary

import aiohttp
from aiohttp.client_proto import ResponseHandler
from aiohttp.connector import Connection

on_connected: ContextVar[Callable[[], None] | None] = ContextVar("on_connected", default=None)
"""Called for each request of this context when a connection has it."""
BROKEN = "the connection ended inside the response, or its framing is broken"


class _Watch:
    """Called when its connection ends."""

    def __init__(self) -> None:
        self.content: aiohttp.StreamReader | None = None

    def forget(self) -> None:
        self.content = None

    def __call__(self, closed: "asyncio.Future[None]") -> None:
        if not closed.cancelled():
            closed.exception()  # retrieved: the reader is told in aiohttp's own way
        self.fail()

    def fail(self) -> None:
        if self.content is not None and not self.content.is_eof() and self.content.exception() is None:
            self.content.set_exception(aiohttp.ClientPayloadError(BROKEN))


_watches: WeakKeyDictionary[ResponseHandler, _Watch] = WeakKeyDictionary()


class WatchedResponse(aiohttp.ClientResponse):
    """For `ClientSession(response_class=…)`."""

    async def start(self, connection: Connection) -> Self:
        """
        Read the headers; see `aiohttp.ClientResponse.start`.

        Cancellation: closes the connection.
        """
        told = on_connected.get()
        if told is not None:
            told()
        protocol = connection.protocol
        await super().start(connection)
        if protocol is None or self.content.is_eof():
            return self
        closed = protocol.closed
        watch = _watches.get(protocol)
        if watch is None:
            watch = _watches[protocol] = _Watch()
            if closed is not None:
                closed.add_done_callback(watch)
        watch.content = self.content
        if closed is None:  # it ended before it was asked for
            watch.fail()
        self.content.on_eof(watch.forget)
        return self
