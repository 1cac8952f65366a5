"""
In which form a request is sent when a server refuses some: from the best form down to one that it accepts.

A server that cannot stream, or does not know `stream_options`, says so before it has generated anything: with a 400
that names its reason, with any other status, or in the first event.  The same attempt then asks in the next lower form,
so that no failure which the stream alone has counts against the message or the backend.  It also asks for the whole
answer where a stream broke by its own fault, lacks the usage or the log probabilities that a whole answer has, or never
names a finish reason.  A request that asks for a stream itself gets a refusal as its answer unless that names the
stream.

A form that was accepted is remembered by API and model, since the models behind one gateway differ.  A wrong guess
teaches nothing: if the lower form is refused as well, the form was not the reason.  Neither does the failure of one
request where others were streamed well.

A message whose stream failed without any text, in a way that no second request of the same attempt is made for, is
asked for its whole answer by its next attempt in this process: some failures only the stream has.

Source: OpenAI refuses streams of some models to some organisations with `param: stream`,
https://github.com/lobehub/lobehub/issues/9385.
"""

import re
from collections.abc import Mapping

from msgspec import structs

from worker.backends.request.continuation import can_continue, continue_call, resume_point_of
from worker.backends.request.stream import Call, Form, build_call, lacks_something, wanted_form
from worker.backends.streams.accumulator import Accumulator
from worker.backends.streams.reading import CutStreamError, encode_partial
from worker.errors import BackendError
from worker.policy.answers import Flaw, find_flaw
from worker.policy.model import Fault
from worker.policy.normalise import normalise
from worker.ports import AttemptResult, BackendRequest, ResumePoint
from worker.settings.schema import ContinuationMode, StreamMode
from worker.telemetry.logs import get_logger
from worker.wire.body import RequestBody
from worker.wire.endpoints import Endpoint, endpoint_of
from worker.wire.http import is_success
from worker.wire.sagemaker import MODEL_ERROR_STATUS
from worker.wire.usage import NO_USAGE

MAX_REMEMBERED = 1000
"""APIs and models whose form is remembered; models are the requesters' to choose.  Likewise of messages."""

_REFUSALS = frozenset({400, 413, 422, 501})
"""Statuses by which servers refuse a request for what it asks."""
_LATER = frozenset({408, 429, 504})
"""... for when it came, or after the time for an answer was spent."""
_OF_REQUEST = frozenset({400, 405, 406, 413, 415, 422, 500, 501})
"""... with which a server that streams others may refuse to stream this one."""
_NAMES_OPTIONS = re.compile(r"\bstream_options\b|\binclude_usage\b")
_NAMES_STREAM = re.compile(r"\bstream(?:ing|ed|s)?\b", re.IGNORECASE)

_ABOUT_STREAM = frozenset({Fault.CONNECTION_LOST, Fault.DECODING, Fault.IDLE_TIMEOUT, Fault.STREAM_BROKEN})
"""Faults that a whole answer might not have.  A server too slow for the first byte is no faster with the rest."""

_SERVER_ERROR = 500

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
        self._streamed: set[Key] = set()
        self._without: set[Key] = set()
        self._cut: set[Key] = set()
        self._silent: set[str] = set()
        self._answered_whole: set[Key] = set()
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

    def note_streamed(self, key: Key) -> None:
        """Note that a whole answer came as a stream."""
        if len(self._streamed) < MAX_REMEMBERED:
            self._streamed.add(key)
        self._answered_whole.discard(key)

    def has_streamed(self, key: Key) -> bool:
        """Whether a whole answer came as a stream."""
        return key in self._streamed

    def note_without(self, key: Key) -> None:
        """Note that whole answers lack what the streamed ones lack."""
        if len(self._without) < MAX_REMEMBERED:
            self._without.add(key)

    def is_without(self, key: Key) -> bool:
        """Whether whole answers lack what the streamed ones lack."""
        return key in self._without

    def is_cut_again(self, key: Key) -> bool:
        """Note that a stream was cut off behind some text; returns whether one was before."""
        if key in self._cut:
            return True
        if len(self._cut) < MAX_REMEMBERED:
            self._cut.add(key)
        return False

    def note_silent(self, message_id: str) -> None:
        """Note that a message's stream failed without text."""
        if len(self._silent) >= MAX_REMEMBERED:
            self._silent.clear()
        self._silent.add(message_id)

    def is_silent(self, message_id: str) -> bool:
        """Whether the message's last stream failed without text."""
        return message_id in self._silent

    def note_answered_whole(self, message_id: str, key: Key) -> None:
        """Note that a message whose stream failed without text was answered unstreamed; the second time teaches."""
        self._silent.discard(message_id)
        if key in self._answered_whole:
            self.remember(key, Form.UNARY, "streams fail without any text")
        elif not self.has_streamed(key) and len(self._answered_whole) < MAX_REMEMBERED:
            self._answered_whole.add(key)

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
        broken: How the stream broke for which a whole answer is asked now.
        may_fall_back: Whether the form may be the reason for how the call ended; not where a service in front of the
            server ended it.
    """

    def __init__(self, negotiator: Negotiator, request: BackendRequest) -> None:
        self._negotiator = negotiator
        self._request = request
        self._endpoint = endpoint_of(request.path)
        self._key = _key(self._endpoint, request.body)
        self._refusal: str | None = None
        self._is_about_form = True
        self._kept: AttemptResult | None = None
        self.broken: BackendError | None = None
        self.may_fall_back = True
        form = negotiator.form(self._endpoint, request.body)
        self._follows_silence = (
            form is not Form.UNARY and request.resume_point is None and negotiator.is_silent(request.message_id)
        )
        self.call = self._first(Form.UNARY if self._follows_silence else form)

    def reset(self, result: AttemptResult) -> None:
        """Clear the result of an earlier call's answer; what a continuation goes on from stays in it."""
        result.status, result.headers, result.body, result.is_whole = None, {}, b"", False
        result.partial, result.resume_point, result.salvaged_tokens = None, None, None
        result.streamed, result.in_stream, result.missing_done = False, False, False
        result.first_token_at, result.stream_usage, result.content_events = None, None, 0
        if self.call.salvaged_tokens is not None:
            prefix = self.call.new_accumulator()
            result.partial = encode_partial(prefix) if prefix is not None else None
            result.resume_point = self._request.resume_point

    def fall_back(self, result: AttemptResult, broken: BackendError | None = None) -> bool:
        """
        Fall back to a lower form if the answer is one that only this form has; returns whether there is a call to send.

        Args:
            result: Of the call.
            broken: How its stream broke by its own fault; `None` if it did not.
        """
        if self.call.form is Form.UNARY or not self.may_fall_back:
            self._learn(result)
            return False
        if self.call.salvaged_tokens is not None:
            return self._start_anew(result)
        form = self._lower_form(result, broken)
        if form is None:
            self._learn(result)
            return False
        self.call = build_call(self._endpoint, self._request.body, form)
        return True

    def note_failure(self, result: AttemptResult, fault: str | None = None) -> None:
        """
        Note how the attempt failed, for the message's next one.

        Args:
            result: Of the attempt.
            fault: What broke; `None` where an error came instead of an answer.
        """
        if self.call.form is Form.UNARY or not self._request.message_id or self._negotiator.stream == "always":
            return
        if fault is not None:
            is_about_stream = fault in _ABOUT_STREAM
        else:
            is_about_stream = result.status in _OF_REQUEST or not self._negotiator.has_streamed(self._key)
        if is_about_stream and result.content_events == 0 and self.call.salvaged_tokens is None:
            self._negotiator.note_silent(self._request.message_id)

    def restore(self, result: AttemptResult) -> bool:
        """Restore the whole streamed answer to which something was missing; returns whether there is one."""
        if self._kept is None:
            return False
        for name in AttemptResult.__struct_fields__:
            setattr(result, name, getattr(self._kept, name))
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
        if result.streamed or not (is_good or _status_of(result) in _REFUSALS):
            return False
        reason = "no stream" if is_good else _message_of(result)
        self._negotiator.note_refused_continuation(self._key, reason)
        self.call = build_call(self._endpoint, self._request.body, self.call.form)
        return True

    def _lower_form(self, result: AttemptResult, broken: BackendError | None) -> Form | None:
        """Return the form to ask for instead when this one may be the reason for how the call ended."""
        form = self._named_form(result)
        if form is not None or self._negotiator.stream == "always":
            return form
        has_streamed = self._negotiator.has_streamed(self._key)
        if broken is not None:
            if result.content_events > 0:
                if has_streamed or result.resume_point is not None:
                    return None
                if isinstance(broken, CutStreamError) and not self._negotiator.is_cut_again(self._key):
                    return None
            self.broken = BackendError(broken.fault, broken.detail)  # the frames of the other one hold this plan
            self._refusal = broken.detail
        elif self._is_refused(result, has_streamed=has_streamed):
            self._refusal = _message_of(result)
        elif self._lacks_something(result):
            self._kept, self._refusal = structs.replace(result), "the stream lacks usage or log probabilities"
            return Form.UNARY
        else:
            return None
        self._is_about_form = not has_streamed
        return Form.UNARY

    def _named_form(self, result: AttemptResult) -> Form | None:
        """Return the form to ask for instead when the answer names this one as its reason."""
        if _status_of(result) not in _REFUSALS and not _is_first_event(result):
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

    def _is_refused(self, result: AttemptResult, *, has_streamed: bool) -> bool:
        """Whether the answer is an error that a whole answer might not be."""
        status = _status_of(result) or 0
        if is_success(status):
            if result.streamed and not _is_first_event(result):
                return False
            if not result.streamed and find_flaw(self._request.path, result.body) is None:
                return False
            status = normalise(None, result.headers, result.body).status_hint or _SERVER_ERROR
        if status in _LATER or "retry-after" in result.headers or (has_streamed and status not in _OF_REQUEST):
            return False
        return not self._request.body.asks_for_stream or status >= _SERVER_ERROR

    def _lacks_something(self, result: AttemptResult) -> bool:
        return (
            result.is_whole
            and not self._negotiator.is_without(self._key)
            and lacks_something(self._endpoint, self._request.body, self.call.form, result)
        )

    def _learn(self, result: AttemptResult) -> None:
        """Remember a lower form that was accepted, and that streams work."""
        if result.is_whole:
            self._negotiator.note_streamed(self._key)
        elif result.in_stream or not is_success(result.status):
            self.note_failure(result)
        if self._refusal is None and not self._follows_silence:
            return
        is_good = is_success(result.status) and find_flaw(self._request.path, result.body) is None
        if self._refusal is None:
            if is_good:
                self._negotiator.note_answered_whole(self._request.message_id, self._key)
            return
        if self._kept is not None:
            if not is_good:
                self.restore(result)
                return
            if self._kept.stream_usage is None and result.usage == NO_USAGE:
                self._negotiator.note_without(self._key)
                return
        if is_good and self._is_about_form:
            self._negotiator.remember(self._key, self.call.form, self._refusal[:300])


def _status_of(result: AttemptResult) -> int | None:
    """Return the status of the server: SageMaker has it inside an error of its own."""
    if result.status != MODEL_ERROR_STATUS:
        return result.status
    return normalise(result.status, result.headers, result.body).status


def _is_first_event(result: AttemptResult) -> bool:
    """Whether an error came in a stream before any text."""
    return result.in_stream and result.content_events == 0


def _key(endpoint: Endpoint, body: RequestBody) -> Key:
    return endpoint, body.raw("model")[:300]


def _message_of(result: AttemptResult) -> str:
    return normalise(result.status, result.headers, result.body).message[:300]
