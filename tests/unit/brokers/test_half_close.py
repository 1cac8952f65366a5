"""A streaming pull ends by half before it is cancelled."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from google.api_core import bidi, exceptions, grpc_helpers

from worker.brokers import half_close
from worker.brokers.half_close import HalfClosing


class Call:
    """A stream of one answer that ends when it is told to, or is cancelled."""

    def __init__(self) -> None:
        self.ended = threading.Event()
        self.cancelled = threading.Event()
        self.callbacks: list[Callable[[Any], None]] = []
        self._answers = iter(["answer"])

    def __next__(self) -> str:
        for answer in self._answers:
            return answer
        assert self.ended.wait(5)
        raise StopIteration

    def __iter__(self) -> Iterator[str]:
        return self

    def end(self) -> None:
        self.ended.set()
        for callback in self.callbacks:
            callback(self)

    def cancel(self) -> bool:
        self.cancelled.set()
        return True

    def is_active(self) -> bool:
        return not self.ended.is_set()

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        self.callbacks.append(callback)


def begin(call: Call) -> Any:
    """Return the stream as the client library sees it."""
    method = HalfClosing(lambda requests, timeout: call)
    return grpc_helpers.wrap_errors(method)(iter(()), timeout=1)


def timers() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)}


def test_a_server_that_ends_the_stream_is_not_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the reader it looks like a cancelled stream, which the library knows; the timer is gone."""
    monkeypatch.setattr(half_close, "HALF_CLOSE_S", 60)
    call = Call()
    stream = begin(call)
    assert next(stream) == "answer"
    before = timers()
    assert stream.cancel()
    assert stream.cancel(), "the library's reader does it again"
    assert not stream.is_active(), "nothing more is to be sent"
    call.end()
    with pytest.raises(exceptions.Cancelled):
        next(stream)
    assert not call.cancelled.is_set()
    for timer in timers() - before:
        timer.join(5)
        assert not timer.is_alive()


def test_a_server_that_does_not_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the time it has."""
    monkeypatch.setattr(half_close, "HALF_CLOSE_S", 0.001)
    call = Call()
    begin(call).cancel()
    assert call.cancelled.wait(5)


def test_a_stream_that_ends_by_itself_ends_as_ever() -> None:
    """The end nobody asked for is the server's, and the call's other methods are its own."""
    call = Call()
    stream = begin(call)
    assert stream.is_active()
    call.end()
    assert list(stream) == ["answer"]
    assert not stream.is_active()


class LostError(grpc.RpcError):
    """The server is gone."""

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNAVAILABLE


class LostCall(Call):
    """A stream whose server goes away."""

    def __next__(self) -> str:
        assert self.ended.wait(5)
        raise LostError

    def end(self) -> None:
        self.ended.set()
        for callback in self.callbacks:
            callback(LostError())


def test_a_server_that_goes_away_at_the_end_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library would open a stream that was closed once more, for ever: only a cancellation tells it not to."""
    monkeypatch.setattr(half_close, "HALF_CLOSE_S", 60)
    calls: list[LostCall] = []

    def begin(_requests: Any, metadata: Any) -> Any:
        assert not calls, "opened again"
        calls.append(LostCall())
        return calls[-1]

    method: Any = HalfClosing(begin)
    method._prefetch_first_result_ = False  # as the library's client sets it
    rpc = bidi.ResumableBidiRpc(
        grpc_helpers.wrap_errors(method),
        should_recover=lambda error: not isinstance(error, exceptions.Cancelled),
        should_terminate=lambda error: isinstance(error, exceptions.Cancelled),
    )
    rpc.open()
    rpc.close()
    calls[0].end()
    assert rpc.recv() is None
    assert len(calls) == 1


def test_it_is_a_method_to_grpc() -> None:
    """What wraps calls finds what it expects."""
    assert isinstance(HalfClosing(None), grpc.StreamStreamMultiCallable)
