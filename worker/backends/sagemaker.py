"""
One endpoint of Amazon SageMaker: the attempts of `openai` with signed requests, and frames around streamed answers.

A request whose answer is to be streamed is an `InvokeEndpointWithResponseStream`, any other an `InvokeEndpoint`.  Parts
of a streamed answer are fed to what reads the answer of any server: the assembler of events, or one body.  The frames
add ways to fail, each of which ends the attempt with what had come of the answer: an exception or an error in place of
a part, a wrong sum, an end inside a frame.

The container's own errors come inside `ModelError`, where `policy.normalise` finds them; only those, and what breaks
inside of the frames, may be about the form in which an answer was asked for.  Every other error is the service's.

ADR 0024 has the reasons.
"""

from collections.abc import Iterator

import msgspec
from botocore.credentials import ReadOnlyCredentials

from worker.backends.http.attempt_timer import AttemptTimer
from worker.backends.http.aws import AwsIdentity
from worker.backends.http.connection import Headers, Request
from worker.backends.openai import Answer, HttpBackend
from worker.backends.request.invocation import Invocations
from worker.backends.request.negotiation import Negotiator, Plan
from worker.backends.request.stream import Call, Form
from worker.backends.streams.eventstream import FrameReader, Part, ServiceError
from worker.backends.streams.reading import MAX_EVIDENCE_BYTES
from worker.errors import BackendError
from worker.policy.model import ErrorClass, Fault, Phase
from worker.policy.normalise import normalise
from worker.policy.signals import match_signal
from worker.ports import AttemptResult, BackendRequest
from worker.settings.schema import RouteSettings
from worker.wire.body import RequestBody, is_json_object
from worker.wire.endpoints import endpoint_of
from worker.wire.http import is_success
from worker.wire.sagemaker import (
    CONTENT_TYPE_ATTRIBUTE,
    ERROR_TYPE,
    EVENT_STREAM,
    MODEL_ERROR_STATUS,
    REPLY_ATTRIBUTES,
    STREAM_CONTENT_TYPE,
    VARIANT,
    public_address,
)

_REFUSED = frozenset({400, 401, 403})
"""Statuses with which AWS refuses credentials or a signature."""
_BAD_REQUEST = 400
_decode_raw = msgspec.json.Decoder(msgspec.Raw).decode


class SageMakerBackend(HttpBackend):
    """
    One route's endpoint; see `worker.ports.Backend` for the contract.

    Args:
        route: Its settings, with a section `sagemaker`.

    Raises:
        SettingsError: As `HttpBackend`; or no region is known, or there is no such profile.
    """

    def __init__(self, route: RouteSettings) -> None:
        self._settings = settings = route.sagemaker
        self._identity = AwsIdentity(route.name, profile=settings.profile, region=settings.region)
        url = route.base_url or public_address(self._identity.region)
        super().__init__(route.model_copy(update={"base_url": url}))
        self._origin = f"{url.partition('://')[0]}://{self._pool.authority}"
        self._path = f"/endpoints/{settings.endpoint}/invocations"
        self._invocations = Invocations(settings)
        self._whole = Negotiator(route.name, "never", "off")
        """For requests that SageMaker streams no answers to."""
        self._keys: ReadOnlyCredentials

    def credentials_changed(self) -> bool:
        """See `worker.ports.Backend.credentials_changed`."""
        return self._identity.have_changed()

    def streams(self, path: str, body: RequestBody) -> bool:
        """See `worker.ports.Backend.streams`."""
        return (
            self._settings.answers == "openai" and self._invocations.is_streamable({}) and super().streams(path, body)
        )

    async def aclose(self) -> None:
        """
        Close every connection, and wait for what asks for credentials; idempotent.

        Cancellation: connections may stay open until the process ends; call it again.
        """
        await super().aclose()
        await self._identity.aclose()

    def _plan(self, request: BackendRequest) -> Plan:
        if self._settings.answers != "openai":
            plan = self._whole.plan(request)
            plan.call = Call(body=request.body.data)  # whatever a `stream` in it means to the container
            return plan
        is_streamable = self._invocations.is_streamable(request.headers)
        return (self._negotiator if is_streamable else self._whole).plan(request)

    async def _ask(
        self, request: BackendRequest, plan: Plan, result: AttemptResult, timer: AttemptTimer
    ) -> BackendError | None:
        """Send the plan's call with credentials, a second time if only the clock was wrong."""
        result.phase, result.attributes, result.variant = Phase.PREPARE, {}, None
        self._keys = await self._identity.keys()  # nothing else runs until `_outgoing` has signed with them
        for secret in (self._keys.access_key, self._keys.token):
            if secret:
                self._redactor.add_key(secret)
        broken = await super()._ask(request, plan, result, timer)
        if result.status in _REFUSED and self._identity.correct_clock(_error_name(result), result.headers.get("date")):
            plan.reset(result)
            broken = await super()._ask(request, plan, result, timer)
        if _refuses_credentials(result):
            self._identity.note_refused()
        plan.may_fall_back = plan.may_fall_back and _is_of_container(result)
        return broken

    def _outgoing(self, request: BackendRequest, plan: Plan) -> Request:
        body, asks_for_stream = plan.call.body, self._asks_for_stream(request, plan)
        self._invocations.check_body(endpoint_of(request.path), request.body, len(body))
        is_streamed = (asks_for_stream or self._settings.response_stream) and self._invocations.is_streamable(
            request.headers
        )
        headers = self._invocations.headers(
            request, _model_of(request.body), is_stream_asked=asks_for_stream, is_streamed=is_streamed
        )
        target = self.target(self._path + ("-response-stream" if is_streamed else ""))
        headers["host"] = self._pool.authority
        headers = self._identity.sign(self._keys, "POST", self._origin + target, headers, body)
        if is_streamed:
            headers.setdefault("accept", "*/*")  # of the service: the container's is in a header of its own
        return self._request("POST", target, headers, body)

    def _asks_for_stream(self, request: BackendRequest, plan: Plan) -> bool:
        """Whether the body as it is sent asks the container for a stream."""
        return request.body.asks_for_stream if self._settings.answers != "openai" else plan.call.form is not Form.UNARY

    def _new_answer(self, request: BackendRequest, plan: Plan, result: AttemptResult, timer: AttemptTimer) -> "Answer":
        return _EndpointAnswer(request, plan, result, timer, self._max_bytes, kind=self._settings.answers)

    def _redact(self, result: AttemptResult) -> None:
        super()._redact(result)
        result.attributes, result.variant = _attributes_of(result)


class _EndpointAnswer(Answer):
    """Receives one answer, in frames or without; what it is inside says the setting `answers`."""

    def __init__(
        self,
        request: BackendRequest,
        plan: Plan,
        result: AttemptResult,
        timer: AttemptTimer,
        max_bytes: int,
        *,
        kind: str,
    ) -> None:
        super().__init__(request, plan, result, timer, max_bytes)
        self._kind = kind
        self._frames: FrameReader | None = None
        self._is_enough = False
        self._has_failed = False
        self._has_ended = False

    def head(self, status: int, headers: Headers) -> None:
        """Note status and headers, and whether frames follow."""
        super().head(status, headers)
        result = self._result
        if is_success(status) and result.headers.get("content-type", "").lower().startswith(EVENT_STREAM):
            self._frames = FrameReader()
            result.phase = Phase.STREAM
        if self._kind != "openai":
            self._is_undecided = False

    def _is_announced(self) -> bool:
        headers = self._result.headers
        label = headers.get(STREAM_CONTENT_TYPE) or headers.get("content-type", "")
        is_labelled = label.lower().startswith("text/event-stream")
        return is_success(self._result.status) and self._kind == "openai" and is_labelled

    def feed(self, data: bytes) -> float | None:
        """Take a part of the response."""
        if self._frames is None:
            return super().feed(data)
        wait = None
        items = self._frames.feed(data)
        while (item := self._read(items)) is not None:
            wait = self._fail(item) if isinstance(item, ServiceError) else super().feed(item.payload)
            self._result.phase = Phase.STREAM  # also of a whole body that comes in frames
            if wait is not None:
                self._is_enough = True
                break
        return wait

    def _read(self, items: Iterator[Part | ServiceError]) -> Part | ServiceError | None:
        """Return what the next frame holds; frames that break say nothing of the form of what is inside."""
        try:
            return next(items, None)
        except BackendError:
            self._plan.may_fall_back = False
            raise

    def end(self) -> None:
        """Take note that the response has ended, or that no more of it was wanted."""
        if self._has_failed:
            return
        if self._frames is not None and not self._is_enough:
            try:
                self._frames.close()
            except BackendError:
                self._plan.may_fall_back = False
                raise
        super().end()
        self._has_ended = True
        if self._kind != "openai" and is_success(self._result.status):
            self._result.body = as_object(self._result.body, self._kind)

    def close(self) -> None:
        """Put what is known of an answer into the result, however it ended."""
        super().close()
        result = self._result
        if self._stream is not None or self._has_ended or not self._pieces or not is_success(result.status):
            return
        came = b"".join(self._pieces)
        if not result.body:
            result.body = came[:MAX_EVIDENCE_BYTES]
        if self._kind != "openai":
            result.partial = msgspec.json.encode({"output": came.decode("utf-8", "replace")})
            result.content_events = len(self._pieces)

    def _fail(self, error: ServiceError) -> float:
        """Take an error in place of the rest; of no concern to an answer that is whole."""
        if not self.is_whole():
            self._has_failed = True
            self._result.in_stream = True
            self._result.body = error.body
            self._result.headers[ERROR_TYPE] = error.name
        return 0.0


def as_object(body: bytes, kind: str) -> bytes:
    """
    Return what a container answered as the JSON object that the body of a reply is.

    Args:
        body: JSON, JSON lines or text; what is no JSON where that is expected stays as it is.
        kind: `json` or `text`.

    Raises:
        BackendError: Text that is no UTF-8.
    """
    if kind == "text":
        try:
            return msgspec.json.encode({"output": body.decode()})
        except UnicodeDecodeError as error:
            raise BackendError(Fault.DECODING, f"the answer is no UTF-8 (byte {error.start})") from error
    if is_json_object(body):
        return body
    if _is_json(body):
        return b'{"output":' + body.strip() + b"}"
    lines = [line for line in body.splitlines() if line.strip()]
    if lines and all(map(_is_json, lines)):
        return b'{"output":[' + b",".join(line.strip() for line in lines) + b"]}"
    return body


def _is_json(data: bytes) -> bool:
    try:
        data.decode()  # msgspec does not look into raw values
        _decode_raw(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return True


def _attributes_of(result: AttemptResult) -> tuple[dict[str, str], str | None]:
    """Return the attributes of the reply, and the variant that answered."""
    headers = result.headers
    found = {name: headers[header] for header, name in REPLY_ATTRIBUTES.items() if headers.get(header)}
    label = headers.get(STREAM_CONTENT_TYPE) or headers.get("content-type", "")
    if label and not label.startswith(EVENT_STREAM):
        found[CONTENT_TYPE_ATTRIBUTE] = label
    return found, found.get(VARIANT)


def _error_name(result: AttemptResult) -> str:
    return normalise(result.status, result.headers, result.body).type or ""


def _refuses_credentials(result: AttemptResult) -> bool:
    if result.status not in _REFUSED:
        return False
    signal = match_signal(normalise(result.status, result.headers, result.body), result.status)
    return result.status != _BAD_REQUEST or (signal is not None and signal.error_class is ErrorClass.AUTH)


def _is_of_container(result: AttemptResult) -> bool:
    """Whether what came instead of an answer are the container's words, and not the service's."""
    if is_success(result.status):
        return ERROR_TYPE not in result.headers
    return result.status == MODEL_ERROR_STATUS


def _model_of(body: RequestBody) -> str:
    raw = body.raw("model")
    return msgspec.json.decode(raw, type=str) if raw.startswith(b'"') else ""
