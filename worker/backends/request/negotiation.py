"""
In which form a request is sent when a server refuses some: from the best form down to one that it accepts.

A server that cannot stream, or does not know `stream_options`, says so with a 400 before it has generated anything.
The same attempt then asks in the next lower form.  A form that was accepted is remembered by API and model, since the
models behind one gateway differ.  A wrong guess teaches nothing: if the lower form is refused as well, the form was
not the reason.

Source: OpenAI refuses streams of some models to some organisations with `param: stream`,
https://github.com/lobehub/lobehub/issues/9385.
"""

import re
from collections.abc import Mapping

from worker.backends.request.continuation import can_continue, continue_call, resume_point_of
from worker.backends.request.stream import Call, Form, build_call, wanted_form
from worker.backends.streams.accumulator import Accumulator
from worker.backends.streams.reading import encode_partial
from worker.policy.answers import Flaw, find_flaw
from worker.policy.normalise import normalise
from worker.ports import AttemptResult, BackendRequest, ResumePoint
from worker.settings.schema import ContinuationMode, StreamMode
from worker.telemetry.logs import get_logger
from worker.wire.body import RequestBody
from worker.wire.endpoints import Endpoint, endpoint_of
from worker.wire.http import is_success

MAX_REMEMBERED = 1000
"""APIs and models whose form is remembered; models are the requesters' to choose."""

_REFUSALS = frozenset({400, 413, 422, 501})
"""Statuses by which servers refuse a request for what it asks."""
_NAMES_OPTIONS = re.compile(r"\bstream_options\b|\binclude_usage\b")
_NAMES_STREAM = re.compile(r"\bstream(?:ing|ed|s)?\b", re.IGNORECASE)

_log = get_logger("backends")

Key = tuple[Endpoint, bytes]
"""API and the model as it stands in the body."""


class Negotiator:
    """
    Chooses the form of every attempt against one backend and remembers which forms it refused.

    Args:
        name: Of the route, for the log.
        stream: The route's setting.
        continuation: Likewise.
    """

    def __init__(self, name: str, stream: StreamMode, continuation: ContinuationMode) -> None:
        self.name = name
        self.stream = stream
        self.continuation = continuation
        self._best: dict[Key, Form] = {}
        self._logged: set[Key] = set()

    def plan(self, request: BackendRequest) -> "Plan":
        """Return the plan of one attempt."""
        return Plan(self, request)

    def form(self, endpoint: Endpoint, body: RequestBody) -> Form:
        """Return the best form that is wanted and not known to be refused."""
        wanted = wanted_form(self.stream, endpoint, body)
        return wanted if wanted is Form.UNARY else min(wanted, self._best.get(_key(endpoint, body), wanted))

    def remember(self, key: Key, form: Form, reason: str) -> None:
        """Note that the server accepted no better form than this one."""
        if len(self._best) >= MAX_REMEMBERED:
            self._best.clear()
        self._best[key] = form
        refused = "stream_options" if form is Form.STREAM else "stream"
        _log.warning("streaming_refused", **self._line(key), refused=refused, error=reason)

    def note_refused_continuation(self, key: Key, reason: str) -> None:
        """Log, once for each API and model, that a text was not continued."""
        if key not in self._logged and len(self._logged) < MAX_REMEMBERED:
            self._logged.add(key)
            _log.warning("continuation_refused", **self._line(key), error=reason)

    def _line(self, key: Key) -> Mapping[str, str]:
        endpoint, model = key
        return {"backend": self.name, "api": endpoint.name, "model": model.decode("utf-8", "replace")[:200].strip('"')}


class Plan:
    """
    One attempt's requests, one after the other until the server accepts one.

    Attributes:
        call: What is to be sent now.
    """

    def __init__(self, negotiator: Negotiator, request: BackendRequest) -> None:
        self._negotiator = negotiator
        self._request = request
        self._endpoint = endpoint_of(request.path)
        self._refusal: str | None = None
        self.call = self._first(negotiator.form(self._endpoint, request.body))

    def reset(self, result: AttemptResult) -> None:
        """Clear the result of an earlier call's answer; what a continuation goes on from stays in it."""
        result.status, result.headers, result.body, result.is_whole = None, {}, b"", False
        result.partial, result.resume_point, result.salvaged_tokens = None, None, None
        if self.call.salvaged_tokens is not None:
            prefix = self.call.new_accumulator()
            result.partial = encode_partial(prefix) if prefix is not None else None
            result.resume_point = self._request.resume_point

    def fall_back(self, result: AttemptResult) -> bool:
        """Fall back to the next lower form if the answer refuses this one; returns whether there is a call to send."""
        if self.call.form is Form.UNARY:
            self._learn(result)
            return False
        if self.call.salvaged_tokens is not None:
            return self._start_anew(result)
        form = self._lower_form(result)
        if form is None:
            self._learn(result)
            return False
        self.call = build_call(self._endpoint, self._request.body, form)
        return True

    def resume_point(self, accumulator: Accumulator) -> ResumePoint | None:
        """Return what a stream that ended so leaves to go on from; `None` for a good answer."""
        if self._negotiator.continuation == "off":
            return None
        if accumulator.is_complete() and find_flaw(self._request.path, accumulator.result()) is not Flaw.ABORTED:
            return None
        if not can_continue(self._negotiator.continuation, self._endpoint, self._request.body):
            return None
        return resume_point_of(accumulator, self.call.salvaged_tokens)

    def _first(self, form: Form) -> Call:
        request = self._request
        continued = None
        if request.resume_point is not None:
            continued = continue_call(
                self._negotiator.continuation,
                self._endpoint,
                request.body,
                form=form,
                resume_point=request.resume_point,
            )
        return continued or build_call(self._endpoint, request.body, form)

    def _start_anew(self, result: AttemptResult) -> bool:
        """Give up a continuation that was refused, or answered as if it were a request of its own."""
        is_good = is_success(result.status)
        if result.streamed or not (is_good or result.status in _REFUSALS):
            return False
        reason = "no stream" if is_good else _message_of(result)
        self._negotiator.note_refused_continuation(_key(self._endpoint, self._request.body), reason)
        self.call = build_call(self._endpoint, self._request.body, self.call.form)
        return True

    def _lower_form(self, result: AttemptResult) -> Form | None:
        """Return the form to ask for instead when the answer names this one as its reason."""
        if result.status not in _REFUSALS:
            return None
        facts = normalise(result.status, result.headers, result.body)
        text = f"{facts.param or ''} {facts.message}"
        if self.call.form is Form.STREAM_WITH_USAGE and _NAMES_OPTIONS.search(text):
            form = Form.STREAM
        elif self._negotiator.stream != "always" and _NAMES_STREAM.search(text):
            form = Form.UNARY
        else:
            return None
        self._refusal = facts.message
        return form

    def _learn(self, result: AttemptResult) -> None:
        """Remember a lower form that was accepted."""
        if self._refusal is not None and is_success(result.status):
            self._negotiator.remember(_key(self._endpoint, self._request.body), self.call.form, self._refusal[:300])


def _key(endpoint: Endpoint, body: RequestBody) -> Key:
    return endpoint, body.raw("model")[:300]


def _message_of(result: AttemptResult) -> str:
    return normalise(result.status, result.headers, result.body).message[:300]
