"""
One HTTP/1.1 connection: a request out, the answer pushed into a sink as it arrives.

httptools (llhttp) parses; everything is done where the event loop hands the bytes over, so that an answer costs one
future, however many pieces it comes in, and a body reaches its sink in the step in which it arrived.  The same holds
for sending: a long body goes out slice by slice as the system takes them.

A connection is *quiet* until a request is written to it and again from the end of the answer on.  Bytes that arrive on
a quiet one belong to no request: it is closed, and so is one whose socket has something to read, bytes or its end, at
the moment a request would be written.  Under TLS that may be records that are no answer, such as tickets: there the
loop reads them first, and only what TLS hands on counts.

What goes wrong is a `BackendError` whose fault says how far the request had come, with the words of the system or the
parser.

Source: https://www.rfc-editor.org/rfc/rfc9112; llhttp says what it refuses, with the words for it.
"""

import asyncio
import select
from collections.abc import Sequence
from http import HTTPStatus
from typing import Protocol, cast

import httptools
import msgspec

from worker.backends.http.coding import Decoder, decoder_for
from worker.errors import BackendError
from worker.policy.model import Fault

Headers = Sequence[tuple[bytes, bytes]]
"""Names and values as they came."""

SLICE_BYTES = 256 * 1024
"""So much of a long body is handed to the system at a time."""
MAX_HEADERS = 128
MAX_HEAD_BYTES = 64 * 1024
"""Of headers, of those of informational answers before them, and of whatever frames a body without being part of it:
extensions of chunks, trailers."""
QUOTED_BYTES = 80
"""Of what is no HTTP, for the log."""
MAX_WORDS = 512
"""Characters of a complaint that may quote what could not be read."""
_FRAMING = frozenset({b"content-encoding", b"content-length", b"transfer-encoding"})
_FRAMING_LENGTHS = frozenset(map(len, _FRAMING))
STRAY_S = 1.0
"""Bytes that come later than this after an answer say nothing of other connections: proxies announce so that they close
one.  Likewise, a 408 that comes within this was sent before the request arrived."""


class Sink(Protocol):
    """Receives one answer.  Called on the event loop; what a method raises ends the exchange and the connection."""

    def connected(self) -> None:
        """Take note that the request is about to be written; must not raise."""

    def sent(self) -> None:
        """Take note that the system has taken all of the request; must not raise.  Not called if an answer stops it."""

    def head(self, status: int, headers: Headers) -> None:
        """Take the final status and the headers."""

    def feed(self, data: bytes) -> float | None:
        """
        Take a part of the body, unpacked.

        Returns:
            `None` while more is wanted; else for how many seconds the end of the response is still awaited, so that the
            connection can be used again.  What comes until then is thrown away.
        """


class Request(msgspec.Struct, frozen=True):
    """A request as it goes over the wire."""

    head: bytes
    """Request line and headers, with the empty line."""
    body: bytes = b""
    is_head: bool = False
    """The method is HEAD: the answer has no body, whatever its headers say."""


class StaleConnectionError(BackendError):
    """
    The connection was of no use for this request; a fresh one may be.

    Args:
        why: What happened.
        is_sent: Whether some of the request was written.
    """

    def __init__(self, why: str, *, is_sent: bool) -> None:
        super().__init__(Fault.CONNECTION_LOST if is_sent else Fault.CONNECT, why)
        self.is_sent = is_sent


def words_of(error: BaseException) -> str:
    """Return what an exception says, on one line of at most `MAX_WORDS` characters, with its kind."""
    return " ".join(f"{type(error).__name__}: {error}"[: 4 * MAX_WORDS].split())[:MAX_WORDS]


class Keeper(Protocol):
    """Owns connections."""

    def keep(self, connection: "Connection") -> None:
        """Take back a connection whose answer is complete, and which can be used again."""

    def forget(self, connection: "Connection") -> None:
        """Take note that a connection has ended."""

    def distrust(self) -> None:
        """Take note that bytes came which belong to no request, so soon that the next ones may look like an answer."""


class Connection(asyncio.Protocol):
    """One connection; see the module."""

    def __init__(self, keeper: Keeper, loop: asyncio.AbstractEventLoop, *, is_tls: bool) -> None:
        self._keeper = keeper
        self._loop = loop
        self._is_tls = is_tls
        self._transport: asyncio.Transport | None = None
        self._poll = select.poll()
        self._pieces: list[bytes] = []
        self.on_body = self._pieces.append
        """httptools calls it for each piece: not even a frame of Python for each."""
        self._parser = self._new_parser()
        self.idle_since = -STRAY_S
        """The loop's time at the end of the last answer."""
        self._is_reused = False
        self._is_paused = False
        self._is_writing = False
        self._is_reading = True
        self._done: asyncio.Future[None] | None = None
        """Of the exchange under way; without one the connection is quiet."""
        self._begin()

    def _begin(self) -> None:
        """Forget the last exchange."""
        self._sink: Sink | None = None
        self._is_head_request = False
        self._unsent = memoryview(b"")
        self._is_sent = False
        self._is_cut = False
        """The rest of the request is not sent, because it was refused."""
        self._began = 0.0
        self._status = 0
        self._headers: list[tuple[bytes, bytes]] = []
        self._decoder: Decoder | None = None
        self._has_answered = False
        self._has_head = False
        """The final headers were delivered."""
        self._is_framed = False
        """The body has an end of its own, and does not end with the connection."""
        self._is_complete = False
        self._is_kept_alive = False
        self._unframed = 0
        """Bytes since the last one of a body."""
        self._is_enough = False
        """The sink wants no more."""
        self._linger: asyncio.TimerHandle | None = None

    def _new_parser(self) -> httptools.HttpResponseParser:
        parser = httptools.HttpResponseParser(self)
        # What servers get wrong and cannot be misunderstood: bare line feeds, padded chunk sizes, odd header values.
        parser.set_dangerous_leniencies(
            lenient_headers=True, lenient_optional_cr_before_lf=True, lenient_spaces_after_chunk_size=True
        )
        return parser

    # An exchange

    async def exchange(self, request: Request, sink: Sink) -> None:
        """
        Send a request and push the answer into the sink; return when that is complete, or the sink wants no more.

        Raises:
            BackendError: The request could not be sent, or the answer is not whole.
            StaleConnectionError: The connection was of no use; nothing has reached the sink but `connected` and `sent`.
            Exception: What the sink raised.

        Cancellation: closes the connection.
        """
        if self._is_tls:
            await self.read_up()
        done = self.start(request, sink)
        try:
            await done
        except BaseException:
            self.give_up(done)
            raise
        finally:
            # Its exception has a traceback, which has this frame: all of that would wait for the garbage collector.
            del done

    async def read_up(self) -> None:
        """
        Let the loop read what has come: of TLS it may be no answer to anything.

        Cancellation: leaves the connection as it is.
        """
        while self._is_tls and self.is_open and self._poll.poll(0):  # noqa: ASYNC110 - the loop sets no event for that
            await asyncio.sleep(0)

    def start(self, request: Request, sink: Sink) -> asyncio.Future[None]:
        """
        Send a request and return the future of its answer's end; see `exchange`.

        Raises:
            StaleConnectionError: It has ended, or bytes have arrived that belong to no request; it is closed.
        """
        transport = self._transport
        if transport is None or transport.is_closing() or (not self._is_tls and self._poll.poll(0)):
            self.abort()
            raise StaleConnectionError("the connection ended, or spoke, before the request was sent", is_sent=False)
        self._begin()
        self._sink, self._is_head_request, self._began = sink, request.is_head, self._loop.time()
        self._done = done = self._loop.create_future()
        sink.connected()
        self._is_writing = True  # uvloop's TLS says from inside of a write that it takes more
        if len(request.body) <= SLICE_BYTES:
            transport.writelines((request.head, request.body))
        else:
            transport.write(request.head)
            self._unsent = memoryview(request.body)
        self._is_writing = False
        self._send()
        return done

    def give_up(self, done: asyncio.Future[None]) -> None:
        """Close the connection if the exchange of this future is still under way."""
        if self._done is done:
            self._finish(None)

    def abort(self) -> None:
        """Close it at once."""
        if self._transport is not None:
            self._transport.abort()

    def pause(self) -> None:
        """Read no more until `resume`, or until the answer is complete."""
        if self._transport is not None and self._is_reading:
            self._is_reading = False
            self._transport.pause_reading()

    def resume(self) -> None:
        """Read on."""
        if self._transport is not None and not self._is_reading:
            self._is_reading = True
            self._transport.resume_reading()

    @property
    def is_open(self) -> bool:
        """Whether it has not ended."""
        return self._transport is not None and not self._transport.is_closing()

    def _send(self) -> None:
        """Hand over what the system takes now."""
        if self._is_writing:
            return
        self._is_writing = True
        while not self._is_paused and self._unsent:
            assert self._transport is not None
            data, self._unsent = self._unsent[:SLICE_BYTES], self._unsent[SLICE_BYTES:]
            self._transport.write(data)
        self._is_writing = False
        if not (self._is_paused or self._is_sent or self._is_cut or self._sink is None):
            self._is_sent = True
            self._sink.sent()

    def _finish(self, error: Exception | None) -> None:
        """End the exchange; its connection is kept only by `_keep`."""
        done, self._done, self._sink = self._done, None, None
        self._unsent = memoryview(b"")
        if self._linger is not None:
            self._linger.cancel()
        self.abort()
        if done is not None and not done.done():
            if error is None:
                done.set_result(None)
            else:
                done.set_exception(error)

    def _keep(self) -> None:
        """End the exchange and go back to the keeper."""
        done, self._done, self._sink = self._done, None, None
        if self._linger is not None:
            self._linger.cancel()
        self.resume()  # what comes now is to be seen
        self._is_reused = True
        self.idle_since = self._loop.time()
        self._keeper.keep(self)
        if done is not None and not done.done():
            done.set_result(None)

    # What the parser says

    def on_message_begin(self) -> None:
        """Refuse what comes behind a complete answer."""
        if self._is_complete:
            raise BackendError(Fault.DECODING, "bytes came behind the answer")

    def on_header(self, name: bytes, value: bytes) -> None:
        """Collect a header or a trailer."""
        self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        """Take the headers; those of an informational answer are thrown away."""
        if len(self._headers) > MAX_HEADERS:
            raise BackendError(Fault.DECODING, f"more than {MAX_HEADERS} headers: {len(self._headers)}")
        status = self._parser.get_status_code()
        if status == HTTPStatus.SWITCHING_PROTOCOLS:
            raise BackendError(Fault.DECODING, "101 Switching Protocols, which was not asked for")
        if status < HTTPStatus.OK:
            self._headers = []
            return
        self._status = status
        self._is_kept_alive = self._parser.should_keep_alive()

    def on_message_complete(self) -> None:
        """Take note of the end of an answer."""
        if self._status:
            self._is_complete = True

    # What the event loop says

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin to listen."""
        self._transport = transport = cast("asyncio.Transport", transport)  # uvloop's are none by name
        # Then "sent" means that the system has it.  (asyncio's TLS pauses at the limit, its sockets above it.)
        transport.set_write_buffer_limits(high=int(self._is_tls), low=0)
        self._poll.register(transport.get_extra_info("socket").fileno(), select.POLLIN)

    def pause_writing(self) -> None:
        """Take note that the system takes no more."""
        self._is_paused = True

    def resume_writing(self) -> None:
        """Send on."""
        self._is_paused = False
        self._send()

    def data_received(self, data: bytes) -> None:
        """Take bytes of the answer; without a request they end the connection."""
        if self._done is None:
            self._drop_stray()
            return
        failure = self._parse(data)
        try:
            if self._status != 0:
                self._deliver()
        except Exception as error:  # noqa: BLE001 - whatever the sink raises is the exchange's end
            self._finish(error)
            return
        if self._sink is None:
            return  # it wants no more
        if self._is_complete:
            self._complete(has_stray=failure is not None)
        elif failure is not None:
            self._finish(None if self._is_enough else failure)
        elif self._unframed > MAX_HEAD_BYTES:
            self._finish(BackendError(Fault.DECODING, f"more than {MAX_HEAD_BYTES} bytes around the body"))

    def _parse(self, data: bytes) -> BackendError | None:
        """Take what has come apart; returns why it could not be read."""
        self._has_answered = True
        left = MAX_HEAD_BYTES - self._unframed
        self._unframed += len(data)
        try:
            if left < len(data) and self._status == 0:  # however it was cut: the headers must end before the limit
                self._parser.feed_data(data[:left])
                if self._status == 0:
                    return BackendError(Fault.DECODING, f"headers of more than {MAX_HEAD_BYTES} bytes")
                data = data[left:]
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            # Only what came first and in one piece: a quotation that begins or ends in a word could hold half a key.
            return _unreadable(error, data if self._status == 0 and self._unframed == len(data) else b"")
        return None

    def eof_received(self) -> None:
        """Let the transport close: HTTP has no use for half a connection."""

    def connection_lost(self, error: Exception | None) -> None:
        """End the exchange under way."""
        self._transport = None
        self._parser = _NO_PARSER  # it refers to this connection
        self._keeper.forget(self)
        if self._done is not None:
            self._finish(self._end_by(error))

    def _deliver(self) -> None:
        """Push what has come into the sink."""
        sink = self._sink
        assert sink is not None
        if not self._has_head:
            self._take_head(sink)
        pieces = self._pieces
        if pieces and not self._is_head_request:
            data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
            pieces.clear()
            self._unframed = 0
            if not self._is_enough:
                wait = sink.feed(data) if self._decoder is None else _unpack(self._decoder, data, sink)
                if wait is not None:
                    self._await_end(wait)
        if self._is_complete and self._decoder is not None and not self._is_enough:
            self._decoder.close()

    def _take_head(self, sink: Sink) -> None:
        headers, self._headers = self._headers, []
        status, self._has_head, self._unframed = self._status, True, 0
        if (
            status == HTTPStatus.REQUEST_TIMEOUT
            and self._is_reused
            and not self._is_kept_alive
            and self._loop.time() - self._began < STRAY_S
        ):
            # Sent because nothing had come, it crossed the request (RFC 9110, 15.5.9); Go's client does the same.
            raise StaleConnectionError("the server gave the idle connection up", is_sent=True)
        if status >= HTTPStatus.BAD_REQUEST and not self._is_sent:
            self._unsent, self._is_cut = memoryview(b""), True
        if self._is_head_request:
            self._is_complete = True
            self._parser = self._new_parser()  # the old one waits for a body
        for name, value in headers:
            if len(name) in _FRAMING_LENGTHS and (plain := name.lower()) in _FRAMING:
                if plain == b"content-encoding":
                    self._decoder = None if self._is_head_request else decoder_for(value.decode("latin-1"))
                elif plain == b"content-length" or b"chunked" in value.lower():
                    self._is_framed = True
        sink.head(status, headers)

    def _await_end(self, wait: float) -> None:
        """Wait so many seconds for the end of an answer of which no more is wanted."""
        self._is_enough = True
        if self._is_complete:
            return
        if wait > 0:
            self._linger = self._loop.call_later(wait, self._finish, None)
        else:
            self._finish(None)

    def _complete(self, *, has_stray: bool) -> None:
        """The answer has ended."""
        if has_stray or self._pieces:
            self._keeper.distrust()
        elif self._is_kept_alive and self._is_sent and self.is_open:
            self._keep()
            return
        self._finish(None)

    def _drop_stray(self) -> None:
        if self._loop.time() - self.idle_since < STRAY_S:
            self._keeper.distrust()
        self.abort()

    def _end_by(self, error: Exception | None) -> Exception | None:
        """Return what the end of the connection makes of the exchange under way; `None` if its answer is whole."""
        if self._is_enough:
            return None
        if error is None and self._has_head and not self._is_framed:
            try:
                if self._decoder is not None:
                    self._decoder.close()
            except BackendError as cut:
                return cut
            return None
        where = "inside the response" if self._has_head else "inside the headers of the response"
        words = "" if error is None else f": {words_of(error)}"
        if self._has_answered:
            return BackendError(Fault.CONNECTION_LOST, f"the connection ended {where}{words}")
        words = f"the connection ended before the response{words}"
        return (
            StaleConnectionError(words, is_sent=True) if self._is_reused else BackendError(Fault.CONNECTION_LOST, words)
        )


_NO_PARSER = httptools.HttpResponseParser(None)


def _unpack(decoder: Decoder, data: bytes, sink: Sink) -> float | None:
    """Feed what the data become, piece by piece, as long as more is wanted; see `Sink.feed`."""
    for piece in decoder.feed(data):
        wait = sink.feed(piece)
        if wait is not None:
            return wait
    return None


def _unreadable(error: Exception, data: bytes) -> BackendError:
    """Return the parser's complaint with the first words of what it could not read, or ours that it carries."""
    if isinstance(error.__context__, BackendError):
        return error.__context__
    if isinstance(error, httptools.HttpParserUpgrade):
        return BackendError(Fault.DECODING, "the server switched protocols, which was not asked for")
    words = data[:QUOTED_BYTES].decode("latin-1")
    end = max(words.rfind(" "), words.rfind("\n"), 0)
    quoted = "; it began: " + " ".join(words[:end].split()) if end else ""
    return BackendError(Fault.DECODING, words_of(error) + quoted)
