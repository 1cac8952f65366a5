"""
The end of a streaming pull as emulators understand it: our half is closed first, the cancellation follows.

Google's emulator (0.8.20) never learns of a cancellation: what should tell the stream raises `NoSuchMethodError:
io.grpc.InternalStatus.asRuntimeException`, for its jar mixes two versions of gRPC.  The stream lives on until the
deadline of 30 minutes and is given a share of all messages, each of which then waits for the end of a lease.  A stream
whose client closes its half ends at once, there and everywhere.

The client library cancels the call and then ends its requests, which is what closes our half: so nothing is needed but
to put the cancellation off.  Only for emulators: Cloud Pub/Sub knows what a cancellation is.  A killed process closes
nothing; there is no cure for that here.

Source: google-api-core 2.44, `bidi.py`, `BidiRpc.close`.
"""

import threading
from collections.abc import Callable
from typing import Any

import grpc
from google.api_core import exceptions

HALF_CLOSE_S = 0.5
"""How long the server has to end the stream before it is cancelled; the library waits 1 s for its reader to stop."""


class HalfClosing(grpc.StreamStreamMultiCallable):  # type: ignore[type-arg]  # not subscriptable at run time
    """Streaming pulls whose cancellation waits for the server's own end."""

    def __init__(self, call: Any) -> None:
        self._call = call

    def __call__(self, request_iterator: Any, *args: Any, **kwargs: Any) -> Any:
        """Begin a stream; called on a thread of the library's."""
        return _Call(self._call(request_iterator, *args, **kwargs))


class _Call:
    """A call with a cancellation that waits; everything else is the call's own."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self._is_ending = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._call, name)

    def __iter__(self) -> "_Call":
        return self

    def __next__(self) -> Any:
        try:
            return next(self._call)
        except (StopIteration, grpc.RpcError):
            if not self._is_ending:
                raise
            # The library's reader knows a cancelled stream, not one that ends well, and reopens one that breaks.
            raise exceptions.Cancelled("ended by both sides") from None  # type: ignore[no-untyped-call]

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        """Report an end only if it was not asked for: the library would reopen the stream."""
        self._call.add_done_callback(lambda call: None if self._is_ending else callback(call))

    def is_active(self) -> bool:
        """Whether the call runs and its end was not asked for: nothing more is sent then."""
        return not self._is_ending and bool(self._call.is_active())

    def cancel(self) -> bool:
        """Cancel soon, unless the server ends the stream by itself; called twice by the library."""
        if self._is_ending:
            return True
        self._is_ending = True
        timer = threading.Timer(HALF_CLOSE_S, self._call.cancel)
        timer.daemon = True
        timer.start()
        self._call.add_done_callback(lambda _: timer.cancel())
        return True
