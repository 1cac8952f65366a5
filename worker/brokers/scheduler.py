"""
Hand-over from the client library's threads to the event loop, a burst at a time.

Google's high-level client gives every message to a *scheduler*.  Its own one starts a thread per message; this one
appends to a list and wakes the loop once per burst.  Three rules of the library shape it:

* `shutdown` is called on the library's shutdown thread, by keyword, and must not raise: an exception there leaves the
  stream's future unresolved for ever.
* While `shutdown` blocks, leases are kept and acks are sent.  After it returned, late acks go to a queue that is
  not read.  So it blocks until every message that was handed over is settled, at most `drain_s`.
* `schedule` may be called while `shutdown` runs.

One object per `subscribe()`, never reused.
Source: google-cloud-pubsub 2.44, `subscriber/_protocol/streaming_pull_manager.py`, `_shutdown`.
"""

import asyncio
import queue
import threading
from collections.abc import Callable
from typing import Any

from google.cloud.pubsub_v1.subscriber.message import Message
from google.cloud.pubsub_v1.subscriber.scheduler import Scheduler

Start = Callable[[Message], None]


class LoopScheduler(Scheduler):  # type: ignore[misc]  # untyped library
    """
    Scheduler of one streaming pull.

    Args:
        loop: Where `callback` runs.
        drain_s: Last resort: how long `shutdown` blocks at most, in seconds.
        on_unasked_shutdown: Called on the loop when the library shuts the stream down by itself.
        on_stopped: Called on the loop when the stream has stopped pulling, for whatever reason.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        drain_s: float,
        on_unasked_shutdown: Callable[[], None],
        on_stopped: Callable[[], None] | None = None,
    ) -> None:
        self._loop = loop
        self._drain_s = drain_s
        self._on_unasked_shutdown = on_unasked_shutdown
        self._on_stopped = on_stopped
        self._requests: queue.Queue[Any] = queue.Queue()
        self._lock = threading.Condition()  # guards everything below
        self._inbox: list[tuple[Start, Message]] = []
        self._is_woken = False
        self._is_closed = False
        self._is_asked = False
        self._running = 0

    @property
    def queue(self) -> "queue.Queue[Any]":
        """The way of acks and nacks back to the library's dispatcher."""
        return self._requests

    def schedule(self, callback: Start, *args: Any, **_kwargs: Any) -> None:
        """
        Take one message.

        Threads: called on the library's; after `shutdown` began the message is nacked at once.
        """
        message: Message = args[0]
        with self._lock:
            if self._is_closed:
                is_first = None
            else:
                self._inbox.append((callback, message))
                is_first, self._is_woken = not self._is_woken, True
        if is_first is None:
            message.nack()
        elif is_first:
            self._call_on_loop(self._hand_over)

    def _call_on_loop(self, function: Callable[[], None]) -> None:
        try:
            self._loop.call_soon_threadsafe(function)
        except RuntimeError:  # the loop is closed: the process is ending and shutdown() hands the inbox back
            return

    def _hand_over(self) -> None:
        with self._lock:
            self._is_woken = False
            if self._is_closed:
                return
            burst, self._inbox = self._inbox, []
            self._running += len(burst)
        for callback, message in burst:
            callback(message)  # starts a task; must not raise

    def expect_shutdown(self) -> None:
        """Say that the shutdown to come is ours; called before the stream's `cancel()`."""
        with self._lock:
            self._is_asked = True

    def settled(self) -> None:
        """Count one handed-over message as settled; call it once for each, after its `ack()` or `nack()`."""
        with self._lock:
            self._running -= 1
            if self._running == 0:
                self._lock.notify_all()

    def shutdown(self, await_msg_callbacks: bool = False) -> list[Message]:
        """
        Close the inbox, nack what is in it, and wait until every delivery is settled.

        The inbox is nacked here rather than returned: the library would nack it only after the wait.
        """
        with self._lock:
            self._is_closed = True
            unstarted, self._inbox = self._inbox, []
            is_asked = self._is_asked
        for _, message in unstarted:
            message.nack()
        if self._on_stopped is not None:
            self._call_on_loop(self._on_stopped)
        if not is_asked:
            self._call_on_loop(self._on_unasked_shutdown)
        if await_msg_callbacks:
            with self._lock:
                self._lock.wait_for(lambda: self._running == 0, self._drain_s)
        return []
