"""
What a server can be asked for: forms of a request, from the best one down to what it takes.

A server that cannot stream, or does not know `stream_options`, says so with a 400 before it has generated anything.
The same attempt then asks in the next lower form, and what a server did take is remembered by API and model, since
behind one gateway models differ.  A guess corrects itself: if the lower form is refused as well, it was not the form.

Source: OpenAI refuses streams of some models to some organisations with `param: stream`,
https://github.com/lobehub/lobehub/issues/9385.
"""

import re
from collections.abc import Mapping

from worker.backends.request.body import Fields, raw, read_fields
from worker.backends.request.continuation import can_continue, continue_call, resume_point_of
from worker.backends.request.stream import Call, Form, Kind, build_call, kind_of, wanted_form
from worker.backends.streams.accumulate import Accumulator
from worker.backends.streams.reading import encode_partial
from worker.policy.answers import Flaw, find_flaw
from worker.policy.normalise import normalise
from worker.ports import AttemptResult, BackendRequest, ResumePoint
from worker.settings.schema import ContinuationMode, StreamMode
from worker.telemetry.logs import get_logger

MAX_REMEMBERED = 1000
"""APIs and models whose form is remembered; models are the requesters' to choose."""

_REFUSALS = frozenset({400, 413, 422, 501})
"""Statuses by which servers refuse a request for what it asks."""
_NAMES_OPTIONS = re.compile(r"\bstream_options\b|\binclude_usage\b")
_NAMES_STREAM = re.compile(r"\bstream(?:ing|ed|s)?\b", re.IGNORECASE)

_log = get_logger("backends")

Key = tuple[Kind | None, bytes]
"""API and the model as it stands in the body."""


class Negotiator:
    """
    Chooses the form of every attempt against one backend and remembers what it refused.

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
        self._told: set[Key] = set()

    def plan(self, request: BackendRequest) -> "Plan":
        """Return the plan of one attempt."""
        return Plan(self, request)

    def streams(self, path: str, body: bytes, *, stream_requested: bool) -> bool:
        """See `worker.ports.Backend.streams`."""
        kind = kind_of(path)
        if kind is None or self.stream == "never" or (self.stream == "as_requested" and not stream_requested):
            return False
        fields = read_fields(body)
        return self.form(kind, fields) is not Form.UNARY

    def form(self, kind: Kind | None, fields: Fields | None) -> Form:
        """Return the best form that is wanted and not known to be refused."""
        wanted = wanted_form(self.stream, kind, fields)
        return wanted if fields is None else min(wanted, self._best.get(_key(kind, fields), wanted))

    def remember(self, key: Key, form: Form, reason: str) -> None:
        """Note that the server took no better form than this one."""
        if len(self._best) >= MAX_REMEMBERED:
            self._best.clear()
        self._best[key] = form
        refused = "stream_options" if form is Form.STREAM else "stream"
        _log.warning("streaming_refused", **self._line(key), refused=refused, error=reason)

    def tell_refused_continuation(self, key: Key, reason: str) -> None:
        """Write down, once for each API and model, that a text was not continued."""
        if key not in self._told and len(self._told) < MAX_REMEMBERED:
            self._told.add(key)
            _log.warning("continuation_refused", **self._line(key), error=reason)

    def _line(self, key: Key) -> Mapping[str, str]:
        kind, model = key
        return {"backend": self.name, "api": str(kind), "model": model.decode("utf-8", "replace")[:200].strip('"')}


class Plan:
    """
    One attempt's requests, one after the other until the server takes one.

    Attributes:
        call: What is to be sent now.
    """

    def __init__(self, negotiator: Negotiator, request: BackendRequest) -> None:
        self._negotiator = negotiator
        self._request = request
        self._kind = kind_of(request.path)
        is_looked_at = self._kind is not None or request.stream_requested
        self._fields = read_fields(request.body) if is_looked_at else None
        self._refusal: str | None = None
        self.call = self._first(negotiator.form(self._kind, self._fields))

    def begin(self, result: AttemptResult) -> None:
        """Make the result ready for the call: nothing of an answer to an earlier one stays in it."""
        result.status, result.headers, result.body, result.is_whole = None, {}, b"", False
        result.partial, result.resume_point, result.salvaged_tokens = None, None, None
        if self.call.salvaged_tokens is not None:
            # Whatever happens to this call, what it goes on from is not lost by it.
            prefix = self.call.new_accumulator()
            result.partial = encode_partial(prefix) if prefix is not None else None
            result.resume_point = self._request.resume_point

    def retreat(self, result: AttemptResult) -> bool:
        """Take the next lower form if the answer refuses this one; returns whether there is something to send."""
        fields, call = self._fields, self.call
        if fields is None or call.form is Form.UNARY:
            self._learn(result)
            return False
        if call.salvaged_tokens is not None:
            return self._start_anew(result, fields)
        form = self._lower_form(result)
        if form is None:
            self._learn(result)
            return False
        self.call = build_call(self._request.path, self._request.body, fields, form)
        return True

    def resume_point(self, accumulator: Accumulator) -> ResumePoint | None:
        """Return what a stream that ended so leaves to go on from; `None` for a good answer."""
        if self._negotiator.continuation == "off" or self._fields is None:
            return None
        if accumulator.is_complete() and find_flaw(self._request.path, accumulator.result()) is not Flaw.ABORTED:
            return None
        if not can_continue(self._negotiator.continuation, self._kind, self._fields):
            return None
        return resume_point_of(accumulator, self.call.salvaged_tokens)

    def _first(self, form: Form) -> Call:
        request, fields = self._request, self._fields
        if fields is None:
            return Call(body=request.body)
        continued = None
        if request.resume_point is not None:
            continued = continue_call(
                self._negotiator.continuation,
                request.path,
                request.body,
                fields,
                form=form,
                resume_point=request.resume_point,
            )
        return continued or build_call(request.path, request.body, fields, form)

    def _start_anew(self, result: AttemptResult, fields: Fields) -> bool:
        """Give up a continuation that was refused, or answered as if it were a request of its own."""
        is_good = _is_good(result)
        if result.streamed or not (is_good or result.status in _REFUSALS):
            return False
        reason = "no stream" if is_good else _message_of(result)
        self._negotiator.tell_refused_continuation(_key(self._kind, fields), reason)
        self.call = build_call(self._request.path, self._request.body, fields, self.call.form)
        return True

    def _lower_form(self, result: AttemptResult) -> Form | None:
        """Return the form to try instead when the answer blames this one."""
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
        """Remember a lower form that was taken."""
        if self._refusal is not None and self._fields is not None and _is_good(result):
            self._negotiator.remember(_key(self._kind, self._fields), self.call.form, self._refusal[:300])


def _key(kind: Kind | None, fields: Fields) -> Key:
    return kind, raw(fields, "model")[:300]


def _is_good(result: AttemptResult) -> bool:
    return result.status is not None and 200 <= result.status <= 299  # noqa: PLR2004 - HTTP's successes


def _message_of(result: AttemptResult) -> str:
    return normalise(result.status, result.headers, result.body).message[:300]
