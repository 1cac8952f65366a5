"""
Spans of a delivery: what a `worker.telemetry.tracing.Tracer` is told, as OpenTelemetry's spans.

    process SUBSCRIPTION (CONSUMER)      child of the publisher's span, from the receipt to the settlement
    ├── read body (CLIENT)               one per try to fetch a body from object storage
    ├── chat MODEL (CLIENT)              one per attempt; its context goes to the backend
    ├── write body (CLIENT)              one per try to store the body of a large answer
    └── send TOPIC (PRODUCER)            the answer's publishing; its context goes out with the answer

The publisher's context is looked for in the attributes `traceparent` and `googclient_traceparent` (what Google's client
writes when its own tracing is on), then in the metadata's `traceparent`.  Spans are passed on by hand and never made
current, since one loop works on many deliveries.  Times come from the monotonic clock, so that a clock that is set
makes no span negative.  No body and no key ever stands in a span.

Source: https://www.w3.org/TR/trace-context/; names of attributes,
https://opentelemetry.io/docs/specs/semconv/messaging/gcp-pubsub/ and
https://github.com/open-telemetry/semantic-conventions-genai/blob/main/docs/gen-ai/client-inference.md.  That page wants
one span over all attempts of a client; here each attempt is one, because there may be hours between them.
"""

import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

import msgspec
from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, get_current_span, set_span_in_context
from opentelemetry.trace import Tracer as SpanFactory
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from worker.delivery import Delivery, Reply
from worker.policy.model import Decision
from worker.ports import AttemptResult, Settlement
from worker.telemetry.record import measure
from worker.telemetry.tracing import Tracer
from worker.wire.endpoints import endpoint_of

_MAX_CHARS = 256
"""Bound of texts that requesters and servers choose: models, ids, messages."""
_USAGE = {
    "input": "gen_ai.usage.input_tokens",
    "output": "gen_ai.usage.output_tokens",
    "input_cached": "gen_ai.usage.cache_read.input_tokens",
    "output_reasoning": "gen_ai.usage.reasoning.output_tokens",
}
_PREFIXES = ("", "googclient_")
"""Prefixes of the attributes that may hold the publisher's context."""

_propagator = TraceContextTextMapPropagator()


class _Choice(msgspec.Struct):
    finish_reason: Any = None


class _Answer(msgspec.Struct):
    id: Any = None
    model: Any = None
    choices: list[_Choice] = []


_decode_answer = msgspec.json.Decoder(_Answer).decode


class _Metadata(msgspec.Struct):
    traceparent: Any = None
    tracestate: Any = None


_decode_metadata = msgspec.json.Decoder(_Metadata).decode


class Trace(msgspec.Struct, eq=False):
    """What the tracer remembers about a delivery."""

    trace_id: str
    """32 hex digits, for the log."""
    process: Span
    context: Context
    """Parent of the other spans."""
    offset_s: float
    """From monotonic to Unix seconds, as it was at the beginning."""
    inner: Span | None = None
    """The attempt or publish under way."""
    payload: Span | None = None
    """The read or write of a body under way, also within a publish."""
    reply: Reply | None = None


class SpanTracer(Tracer):
    """
    Makes spans of what it is told; see `worker.telemetry.tracing.Tracer`.

    Args:
        spans: Starts them.
        subscription: Name of the subscription, short.
        topic: Name of the response topic, short.
        base_urls: Of the backends, by name of the route.
        close: Called by `aclose`.
        clock: Monotonic seconds; the clock of deliveries and results.
        wall_clock: Unix seconds.
    """

    def __init__(
        self,
        spans: SpanFactory,
        *,
        subscription: str,
        topic: str,
        base_urls: Mapping[str, str],
        close: Callable[[], Awaitable[None]],
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._spans = spans
        self._process = f"process {subscription}", _messaging("process", subscription)
        self._process[1]["messaging.destination.subscription.name"] = subscription
        self._send = f"send {topic}", _messaging("send", topic)
        self._servers = {name: _server(url) for name, url in base_urls.items()}
        self._close = close
        self._clock = clock
        self._wall_clock = wall_clock
        self._traces: dict[Delivery, Trace] = {}
        """Of the deliveries between `begin` and `end`."""

    def begin(self, delivery: Delivery, metadata: bytes) -> None:
        """Start the span `process` at the delivery's receipt, below the publisher's."""
        message = delivery.message
        offset_s = self._wall_clock() - self._clock()
        name, attributes = self._process
        span = self._spans.start_span(
            name,
            find_parent(message.attributes, metadata),
            SpanKind.CONSUMER,
            attributes={
                **attributes,
                "messaging.message.id": message.message_id,
                "messaging.message.body.size": len(message.data),
                **_known(
                    {
                        "messaging.gcp_pubsub.message.delivery_attempt": message.delivery_attempt,
                        "messaging.gcp_pubsub.message.ordering_key": message.ordering_key or None,
                    }
                ),
            },
            start_time=_nanoseconds(delivery.received_at + offset_s),
        )
        trace_id = f"{span.get_span_context().trace_id:032x}"
        self._traces[delivery] = Trace(trace_id, span, set_span_in_context(span, Context()), offset_s)

    def end(self, delivery: Delivery, settlement: Settlement) -> None:
        """End the span `process`."""
        trace = self._traces.pop(delivery, None)
        if trace is None:
            return
        for span in (trace.inner, trace.payload):  # only an unexpected exception leaves one open
            if span is not None:
                span.end(self._now(trace))
        if trace.process.is_recording():
            reply, decision = trace.reply, delivery.decision
            values = {
                "inference_worker.settlement": settlement.value,
                "inference_worker.attempts": delivery.attempts,
                "inference_worker.queue_s": delivery.queue_s,
                "inference_worker.held_s": delivery.held_s or None,
                "inference_worker.status_code": reply.status_code if reply is not None else None,
                "inference_worker.backend": delivery.backend,
                "inference_worker.duplicate": (settlement is Settlement.ACK and reply is None) or None,
            }
            trace.process.set_attributes(_known(values))
            if reply is not None:
                error = reply.error_class if delivery.is_answered else "publish_failed"
            else:
                error = decision.error_class if decision is not None and settlement is Settlement.NACK else None
            _fail(trace.process, error)
        trace.process.end(self._now(trace))

    def attempt_starts(self, delivery: Delivery) -> None:
        """Start a CLIENT span."""
        trace, request = self._traces.get(delivery), delivery.request
        if trace is None or request is None:
            return
        operation = endpoint_of(request.path).operation
        model = request.model[:_MAX_CHARS] if request.model else None
        values = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "openai",  # whose API it is; `server.address` says who answers
            "gen_ai.request.model": model,
            "inference_worker.backend": delivery.backend,
            "inference_worker.attempt": delivery.attempts,
            **self._servers.get(delivery.backend or "", {}),
        }
        trace.inner = self._spans.start_span(
            f"{operation} {model}" if model else operation,
            trace.context,
            SpanKind.CLIENT,
            attributes=_known(values),
            start_time=self._now(trace),
        )

    def attempt_ends(self, delivery: Delivery, decision: Decision | None) -> None:
        """End it, at the end of the attempt itself where there was one."""
        trace, result = self._traces.get(delivery), delivery.result
        if trace is None or trace.inner is None:
            return
        span, trace.inner = trace.inner, None
        if span.is_recording():
            is_good = decision is not None and decision.error_class is None
            if result is not None:
                span.set_attributes(_known(_measured(result, is_good=is_good)))
            if decision is None:
                _fail(span, "cancelled")
            elif not is_good:
                span.set_attribute("inference_worker.rule", decision.rule)
                _fail(span, decision.error_class, decision.message)
        ended = result.ended if result is not None else None
        span.end(self._now(trace) if ended is None else _nanoseconds(ended + trace.offset_s))

    def payload_starts(self, delivery: Delivery, operation: str) -> None:
        """Start a CLIENT span."""
        trace = self._traces.get(delivery)
        if trace is not None:
            trace.payload = self._spans.start_span(
                f"{operation} body", trace.context, SpanKind.CLIENT, start_time=self._now(trace)
            )

    def payload_ends(self, delivery: Delivery, *, size: int, fault: str) -> None:
        """End it."""
        trace = self._traces.get(delivery)
        if trace is None or trace.payload is None:
            return
        span, trace.payload = trace.payload, None
        span.set_attribute("inference_worker.body_bytes", size)
        _fail(span, fault or None)
        span.end(self._now(trace))

    def publish_starts(self, delivery: Delivery) -> None:
        """Start a PRODUCER span."""
        trace = self._traces.get(delivery)
        if trace is None:
            return
        name, attributes = self._send
        trace.inner = self._spans.start_span(
            name, trace.context, SpanKind.PRODUCER, attributes=attributes, start_time=self._now(trace)
        )

    def publish_ends(self, delivery: Delivery, reply: Reply, *, attempts: int, is_published: bool) -> None:
        """End it."""
        trace = self._traces.get(delivery)
        if trace is None or trace.inner is None:
            return
        span, trace.inner, trace.reply = trace.inner, None, reply
        values = {
            "inference_worker.status_code": reply.status_code,
            "inference_worker.error_class": reply.error_class,
            "inference_worker.publish_attempts": attempts,
        }
        span.set_attributes(_known(values))
        _fail(span, None if is_published else "publish_failed")
        span.end(self._now(trace))

    def inject(self, delivery: Delivery, carrier: dict[str, str]) -> None:
        """Add `traceparent`, and `tracestate` where there is one."""
        trace = self._traces.get(delivery)
        if trace is not None:
            _propagator.inject(carrier, set_span_in_context(trace.inner or trace.process, Context()))

    def trace_id(self, delivery: Delivery) -> str | None:
        """See `Tracer.trace_id`."""
        trace = self._traces.get(delivery)
        return None if trace is None else trace.trace_id

    async def aclose(self) -> None:
        """See `Tracer.aclose` and `worker.telemetry.otel`."""
        await self._close()

    def _now(self, trace: Trace) -> int:
        return _nanoseconds(self._clock() + trace.offset_s)


def find_parent(attributes: Mapping[str, str], metadata: bytes) -> Context:
    """Return the publisher's context, an empty one where none is found that is valid."""
    for prefix in _PREFIXES:
        if context := _extract(attributes.get(f"{prefix}traceparent"), attributes.get(f"{prefix}tracestate")):
            return context
    if b'"traceparent"' in metadata:
        try:
            found = _decode_metadata(metadata)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return Context()
        return _extract(found.traceparent, found.tracestate) or Context()
    return Context()


def _extract(traceparent: Any, tracestate: Any) -> Context | None:
    if not isinstance(traceparent, str):
        return None
    carrier = {"traceparent": traceparent, "tracestate": tracestate if isinstance(tracestate, str) else ""}
    context = _propagator.extract(carrier, Context())
    return context if get_current_span(context).get_span_context().is_valid else None


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)


def _fail(span: Span, error: str | None, message: str = "") -> None:
    if error is not None:
        span.set_attribute("error.type", str(error))
        span.set_status(Status(StatusCode.ERROR, message[:_MAX_CHARS] or None))


def _measured(result: AttemptResult, *, is_good: bool) -> dict[str, AttributeValue | None]:
    """Return the attributes of an attempt that ended."""
    measures = measure(result, is_good=is_good)
    answer = _read_answer(result.body) if is_good else _Answer()
    reasons = [choice.finish_reason for choice in answer.choices if isinstance(choice.finish_reason, str)]
    return {
        "http.response.status_code": result.status,
        "gen_ai.request.stream": result.streamed or None,
        "gen_ai.response.time_to_first_chunk": measures.ttft_s,
        "gen_ai.response.id": _text(answer.id),
        "gen_ai.response.model": _text(answer.model),
        "gen_ai.response.finish_reasons": reasons or None,
        "inference_worker.phase": None if is_good else result.phase.value,
        "inference_worker.backend_request_id": _text(result.backend_request_id),
        "inference_worker.salvaged_tokens": measures.salvaged_tokens,
        **{_USAGE[kind]: count for kind, count in measures.usage.kinds()},
    }


def _read_answer(body: bytes) -> _Answer:
    try:
        return _decode_answer(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _Answer()


def _text(value: Any) -> str | None:
    """Return the beginning of a text that is not the worker's own; `None` for what is no text."""
    return value[:_MAX_CHARS] if isinstance(value, str) and value else None


def _known(values: Mapping[str, AttributeValue | None]) -> dict[str, AttributeValue]:
    """Return the values that are not `None`: a span has no null."""
    return {name: value for name, value in values.items() if value is not None}


def _messaging(operation: str, destination: str) -> dict[str, AttributeValue]:
    """Return the attributes of every span of a Pub/Sub operation."""
    return {
        "messaging.system": "gcp_pubsub",
        "messaging.operation.name": operation,
        "messaging.operation.type": operation,
        "messaging.destination.name": destination,
    }


def _server(base_url: str) -> dict[str, AttributeValue]:
    """Return the attributes for host and port of a backend, none for one whose address is not in the settings."""
    parts = urlsplit(base_url)
    if parts.hostname is None:
        return {}
    port = parts.port or (443 if parts.scheme == "https" else 80)
    return {"server.address": parts.hostname, "server.port": port}
