"""
What is recorded about deliveries: metrics, the share of errors, `stats`, one canonical log line per settlement, spans.

The recorder is the one observer of the pipeline, which says what happened; which metric, log field or span that becomes
is known only here and in the tracer behind the recorder.  An observer never writes to the delivery.
Levels: info = answered, warning = nacked or held, error = a person must look.  Bodies and keys never appear.  Of good
answers a share may be written (`answer_ratio`): a million lines that say "200" cost more to keep than they tell.

`measure` computes what one attempt measured, for `stats`, metrics, log and spans alike, so that a report over the
answers and the live metrics of the same run agree.  What is not known is `None`, never 0.

* **TTFT**: from the attempt's start to the first generated text; reasoning, tool calls and refusals count.  Only of
  streamed answers.
* **TTLT**: from the attempt's start to its end, also when it failed.
* **TPOT**: the time per output token after the first, (TTLT - TTFT) / (output tokens - 1).

Tokens are those of the last attempt.  Of an answer that resumed an earlier attempt they are the tokens of the rest;
`salvaged_tokens` are those that it resumed from.
"""

import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

import msgspec

from worker.delivery import Delivery, Reply
from worker.flow.lane import BreakerChange
from worker.policy.model import Decision, Disposition
from worker.policy.normalise import bounded
from worker.policy.prices import PriceTable
from worker.ports import AttemptResult, Settlement
from worker.telemetry.error_share import ErrorShare
from worker.telemetry.logs import FrequentLog, StateLog, get_logger
from worker.telemetry.metrics import LabelCap, Metrics
from worker.telemetry.series import Counter, Histogram
from worker.telemetry.tracing import Tracer
from worker.wire.usage import NO_USAGE, Usage

_OK = 200
MAX_TENANTS = 64
"""Names of tenants in labels, beside those that the settings name."""

_log = get_logger("worker")
_state_log = StateLog("worker")
_frequent_log = FrequentLog("worker")

_MAX_LOGGED_ERROR_BYTES = 300
"""Of an error's text in a log line."""
MAX_LOGGED_MODEL_BYTES = 256
"""Of the name of a model in a log line: it comes from a requester."""


class Measures(msgspec.Struct, frozen=True, kw_only=True):
    """What one attempt measured; durations in seconds."""

    ttft_s: float | None = None
    ttlt_s: float | None = None
    tpot_s: float | None = None
    usage: Usage = NO_USAGE
    streamed: bool = False
    salvaged_tokens: int | None = None


def measure(result: AttemptResult, *, is_good: bool) -> Measures:
    """
    Return the measures of an attempt.

    Args:
        result: Of the attempt.
        is_good: Whether it ended in an answer; an error has the usage of its stream, if that told one.
    """
    usage = result.usage if is_good or result.stream_usage is not None else NO_USAGE
    ttft_s = None if result.first_token_at is None else result.first_token_at - result.started
    ttlt_s = None if result.ended is None else result.ended - result.started
    tpot_s = None
    if ttft_s is not None and ttlt_s is not None and usage.output is not None and usage.output > 1:
        tpot_s = (ttlt_s - ttft_s) / (usage.output - 1)
    return Measures(
        ttft_s=ttft_s,
        ttlt_s=ttlt_s,
        tpot_s=tpot_s,
        usage=usage,
        streamed=result.streamed,
        salvaged_tokens=result.salvaged_tokens,
    )


class _RouteSeries:
    """
    The series to which every good answer of one backend, path and model adds, looked up once.

    A series is made when something is added to it: one that was never needed is not scraped.

    Args:
        metrics: The catalogue.
        labels: Backend, path and model.
    """

    def __init__(self, metrics: Metrics, labels: tuple[str, str, str]) -> None:
        self._metrics = metrics
        self.labels = labels
        self._tokens: dict[str, Counter] = {}

    @cached_property
    def queue_wait(self) -> Histogram:
        return self._metrics.queue_wait_seconds.labels(*self.labels)

    @cached_property
    def good_attempts(self) -> Counter:
        return self._metrics.attempts_total.labels(self.labels[0], "none", Disposition.REPLY.value)

    @cached_property
    def good_durations(self) -> Histogram:
        return self._metrics.request_duration_seconds.labels(*self.labels, "ok")

    @cached_property
    def acks(self) -> Counter:
        return self._metrics.deliveries_total.labels("ack", "ok")

    @cached_property
    def answers(self) -> Counter:
        return self._metrics.requests_total.labels(*self.labels, "ok", "200")

    def tokens(self, kind: str) -> Counter:
        series = self._tokens.get(kind)
        if series is None:
            series = self._tokens[kind] = self._metrics.tokens_total.labels(*self.labels, kind)
        return series


class Recorder:
    """
    Records what happens to deliveries.

    Args:
        metrics: The catalogue.
        error_share: Counts answers by error class.
        tracer: Is told what concerns spans; `None`: tracing is off.
        paths: Paths that may stand in a label.
        models: Models that may stand in a label; a few others may as well.
        tenants: Tenants that may stand in a label, and 64 others; `None`: there are no metrics of tenants.
        prices: What tokens cost; `None`: nothing.
        include_stats: Whether answers carry `stats`.
        answer_ratio: Share of good answers whose line is written, 0 to 1; those of errors always are.
        clock: Monotonic seconds.
        wall_clock: Unix seconds.
    """

    def __init__(
        self,
        metrics: Metrics,
        error_share: ErrorShare,
        *,
        tracer: Tracer | None = None,
        paths: tuple[str, ...] = (),
        models: tuple[str, ...] = (),
        tenants: tuple[str, ...] | None = None,
        prices: PriceTable | None = None,
        include_stats: bool = False,
        answer_ratio: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._metrics = metrics
        self._error_share = error_share
        self._tracer = tracer or Tracer()
        self._paths = LabelCap(paths, limit=0)
        self._models = LabelCap(models)
        self._variants = LabelCap()
        self._tenants = None if tenants is None else LabelCap(tenants, MAX_TENANTS)
        self._prices = prices or PriceTable(())
        self._include_stats = include_stats
        self._answer_ratio = answer_ratio
        self._due_lines = 1.0 - answer_ratio if answer_ratio else 0.0
        """Lines of good answers not written yet, a fraction; the first answer's is written unless none is."""
        self._clock = clock
        self._wall_clock = wall_clock
        self._routes: dict[tuple[str, str, str], _RouteSeries] = {}
        self._payloads: dict[Delivery, float] = {}
        """When the read or write under way began."""

    def _route(self, delivery: Delivery) -> _RouteSeries:
        request = delivery.request
        path, model = (None, None) if request is None else (request.path, request.model)
        labels = (delivery.backend or "none", self._paths.label(path), self._models.label(model))
        route = self._routes.get(labels)
        if route is None:
            route = self._routes[labels] = _RouteSeries(self._metrics, labels)
        return route

    def delivery_starts(self, delivery: Delivery, metadata: bytes) -> None:
        """Note that the worker starts with a delivery; `metadata` is the request's, raw JSON."""
        self._tracer.begin(delivery, metadata)

    def delivery_ends(self, delivery: Delivery, settlement: Settlement) -> None:
        """Note that nothing more will be said about a delivery; how it was settled has been recorded before."""
        self._tracer.end(delivery, settlement)

    def add_trace_context(self, delivery: Delivery, carrier: dict[str, str]) -> None:
        """Add the trace of the attempt or publish that runs to headers or attributes."""
        self._tracer.inject(delivery, carrier)

    def attempt_starts(self, delivery: Delivery) -> None:
        """Note the start of an attempt, and with the first one the time in the queue."""
        self._tracer.attempt_starts(delivery)
        self._metrics.in_flight.inc()
        if delivery.attempts == 1 and delivery.queue_s is not None:
            self._route(delivery).queue_wait.observe(delivery.queue_s)

    def attempt_ends(self, delivery: Delivery, decision: Decision | None) -> None:
        """Note the end of an attempt and what kind of end it is, `None` when it was cancelled."""
        self._metrics.in_flight.dec()
        self._tracer.attempt_ends(delivery, decision)

    def attempt_judged(self, delivery: Delivery, decision: Decision) -> None:
        """Note the final decision about an attempt."""
        route, metrics, result = self._route(delivery), self._metrics, delivery.result
        is_good = decision.error_class is None
        if is_good and decision.disposition is Disposition.REPLY:
            route.good_attempts.inc()
        else:
            backend, error_class = route.labels[0], decision.error_class or "none"
            metrics.attempts_total.labels(backend, error_class, decision.disposition.value).inc()
        if result is not None and result.ended is not None:
            durations = (
                route.good_durations if is_good else metrics.request_duration_seconds.labels(*route.labels, "error")
            )
            durations.observe(result.ended - result.started)
        if result is not None and result.variant is not None:
            self._variant_judged(route.labels[0], result, decision)
        if decision.disposition is Disposition.HOLD:
            _log.warning("attempt_held", **self._line(delivery))

    def _variant_judged(self, backend: str, result: AttemptResult, decision: Decision) -> None:
        """Count an attempt for the variant that answered it."""
        labels = (backend, self._variants.label(result.variant))
        error_class = decision.error_class
        self._metrics.variant_attempts_total.labels(*labels, error_class or "none").inc()
        if result.ended is not None:
            outcome = "ok" if error_class is None else "error"
            self._metrics.variant_duration_seconds.labels(*labels, outcome).observe(result.ended - result.started)

    def rerouted(self, delivery: Delivery, *, is_fallback: bool) -> None:
        """Note that an attempt is made at another target than the first one."""
        reason = "fallback" if is_fallback else "failover"
        self._metrics.rerouted_attempts_total.labels(delivery.backend or "none", reason).inc()

    def withdrawn(self, delivery: Delivery) -> None:
        """Note that a request was cancelled, before or after its first attempt began."""
        kind = "started" if delivery.attempts else "waiting"
        self._metrics.cancelled_requests_total.labels(delivery.backend or "none", kind).inc()

    def deadline_unreachable(self, delivery: Delivery, *, is_tried: bool) -> None:
        """Note a request whose deadline is too near, and whether it is sent all the same."""
        outcome = "tried" if is_tried else "refused"
        self._metrics.unreachable_deadlines_total.labels(delivery.backend or "none", outcome).inc()

    def breaker_changed(self, backend: str, change: BreakerChange) -> None:
        """Note that a breaker opened or closed."""
        fields = {"backend": backend, "error_class": change.error_class}
        if change.lane is not None:
            fields["model"] = bounded(change.lane, MAX_LOGGED_MODEL_BYTES)
        if change.open_s is None:
            self._metrics.breaker_trips_total.labels(backend, change.error_class).inc()
            _log.warning("breaker_opened", **fields)
        else:
            _state_log.info("breaker_closed", **fields, open_s=round(change.open_s, 3))

    def duplicate(self, kind: str) -> None:
        """Count a delivery that needs no backend: `in_flight` or `answered`."""
        self._metrics.duplicates_total.labels(kind).inc()

    def internal_error(self, delivery: Delivery) -> None:
        """Log the traceback of an unexpected exception; called while it is handled."""
        self._metrics.internal_errors_total.inc()
        _log.exception("internal_error", message_id=delivery.message.message_id)

    def payload_memory(self, taken: int) -> None:
        """Note how many bytes of bodies from object storage are kept."""
        self._metrics.payload_memory_bytes.set(taken)

    def payload_starts(self, delivery: Delivery, operation: str) -> None:
        """Note that a body is read from object storage or written to it: `read` or `write`."""
        self._payloads[delivery] = self._clock()
        self._tracer.payload_starts(delivery, operation)

    def payload_ends(self, delivery: Delivery, operation: str, *, size: int, fault: str) -> None:
        """Note how that ended: `size` bytes are there, or `fault` says what is wrong."""
        seconds = self._clock() - self._payloads.pop(delivery)
        self._metrics.payload_duration_seconds.labels(operation, fault or "ok").observe(seconds)
        if not fault:
            self._metrics.payload_bytes_total.labels(operation).inc(size)
        self._tracer.payload_ends(delivery, size=size, fault=fault)

    def fetch_failed(self, delivery: Delivery, decision: Decision) -> None:
        """Note a body that could not be fetched, and what is done about that."""
        if decision.disposition is Disposition.HOLD:
            _log.warning("fetch_held", **self._line(delivery))

    def publish_starts(self, delivery: Delivery) -> None:
        """Note that the first publish of an answer starts."""
        self._tracer.publish_starts(delivery)

    def publish_failed(self, kind: str) -> None:
        """Count a publish that failed: `retryable`, `refused` or `too_large`."""
        self._metrics.publish_failures_total.labels(kind).inc()

    def publish_ends(self, delivery: Delivery, reply: Reply, *, attempts: int, published_s: float | None) -> None:
        """Note what the broker has after `published_s` seconds, or did not accept (`None`), after so many publishes."""
        if published_s is not None:
            self._metrics.publish_duration_seconds.observe(published_s)
        self._tracer.publish_ends(delivery, reply, attempts=attempts, is_published=published_s is not None)

    def answered(self, delivery: Delivery, reply: Reply) -> None:
        """Note that the broker has the answer."""
        route = self._route(delivery)
        metrics, status, error_class = self._metrics, reply.status_code, reply.error_class
        if error_class is None and status == _OK:
            route.acks.inc()
            route.answers.inc()
        else:
            outcome = "ok" if error_class is None else "error_reply"
            metrics.deliveries_total.labels("ack", error_class or "ok").inc()
            metrics.requests_total.labels(*route.labels, outcome, str(status)).inc()
        self._error_share.add(error_class)
        if reply.truncated:
            metrics.partial_responses_total.labels(error_class or "none").inc()
        measures = self._measures(delivery)
        self._measured(delivery, route, measures)
        if self._tenants is not None:
            self._tenant_answered(delivery, route, measures, "ok" if error_class is None else "error_reply")
        if error_class is None:
            self._due_lines += self._answer_ratio
            if self._due_lines < 1.0:
                return
            self._due_lines -= 1.0
        line = self._line(delivery)
        line["status_code"] = status
        if error_class is not None and "error_class" not in line:  # no decision about an attempt says it
            line |= {"error_class": str(error_class), "error": bounded(reply.reason, _MAX_LOGGED_ERROR_BYTES)}
        line["bytes"] = len(reply.body)
        if measures.usage.output is not None:
            line["output_tokens"] = measures.usage.output
        _frequent_log.info("delivery_answered", line)

    def _measured(self, delivery: Delivery, route: _RouteSeries, measures: Measures) -> None:
        """Count what an answer's last attempt measured; exactly what its `stats` say."""
        metrics, labels = self._metrics, route.labels
        for kind, count in measures.usage.kinds():
            route.tokens(kind).inc(count)
        if measures.ttft_s is not None:
            metrics.time_to_first_token_seconds.labels(*labels).observe(measures.ttft_s)
        if measures.tpot_s is not None:
            metrics.time_per_output_token_seconds.labels(*labels).observe(measures.tpot_s)
        if delivery.held_s:
            metrics.held_seconds.labels(*labels).observe(delivery.held_s)
        if measures.salvaged_tokens is not None:
            metrics.salvaged_tokens_total.labels(*labels).inc(measures.salvaged_tokens)
        if delivery.result is not None and delivery.result.missing_done:
            metrics.missing_done_total.labels(labels[0]).inc()
        if delivery.result is not None and delivery.result.variant is not None:
            variant = (labels[0], self._variants.label(delivery.result.variant))
            for kind, count in measures.usage.kinds():
                metrics.variant_tokens_total.labels(*variant, kind).inc(count)
            if measures.ttft_s is not None:
                metrics.variant_time_to_first_token_seconds.labels(*variant).observe(measures.ttft_s)

    def _tenant_answered(self, delivery: Delivery, route: _RouteSeries, measures: Measures, outcome: str) -> None:
        labels = self._tenant_labels(delivery, route)
        metrics = self._metrics
        metrics.tenant_requests_total.labels(*labels, outcome).inc()
        for kind, count in measures.usage.kinds():
            metrics.tenant_tokens_total.labels(*labels, kind).inc(count)
        cost = self._cost(delivery, measures)
        if cost:
            metrics.tenant_cost_total.labels(*labels).inc(cost)

    def _tenant_labels(self, delivery: Delivery, route: _RouteSeries) -> tuple[str, str]:
        assert self._tenants is not None
        tenant = delivery.request.tenant if delivery.request is not None else None
        return self._tenants.label(tenant), route.labels[2]

    def _cost(self, delivery: Delivery, measures: Measures) -> float | None:
        model, usage = delivery.request.model if delivery.request is not None else None, measures.usage
        return self._prices.cost(model, tokens_in=usage.input, tokens_out=usage.output, cached=usage.input_cached)

    @staticmethod
    def _measures(delivery: Delivery) -> Measures:
        """Measure the latest attempt; tokens of a good answer are paid for whatever becomes of it afterwards."""
        result, decision = delivery.result, delivery.decision
        if result is None:
            return Measures()
        is_good = decision is not None and decision.error_class is None
        return measure(result, is_good=is_good)

    def duplicate_acked(self, delivery: Delivery) -> None:
        """Note the redelivery of a message that was answered before."""
        self.duplicate("answered")
        self._metrics.deliveries_total.labels("ack", "duplicate").inc()
        _log.info("duplicate_acked", **self._line(delivery))

    def nacked(self, delivery: Delivery, reason: str) -> None:
        """Note a nack without an answer."""
        self._count_nack(delivery, reason)
        _log.warning("delivery_nacked", **self._line(delivery), reason=reason)

    def unpublished(self, delivery: Delivery, reply: Reply) -> None:
        """Note a nack because the answer could not be published in time."""
        self._count_nack(delivery, "publish_failed")
        _log.error("delivery_nacked", **self._line(delivery), reason="publish_failed", status_code=reply.status_code)

    def _count_nack(self, delivery: Delivery, reason: str) -> None:
        self._metrics.deliveries_total.labels("nack", reason).inc()
        route = self._route(delivery)
        self._metrics.requests_total.labels(*route.labels, "nack", "none").inc()
        if self._tenants is not None:
            self._metrics.tenant_requests_total.labels(*self._tenant_labels(delivery, route), "nack").inc()

    def stats(self, delivery: Delivery) -> bytes | None:
        """
        Return the `stats` object of an answer, `None` where answers carry none.

        Absent values are null; `variant` is there only where the backend has variants.
        """
        if not self._include_stats or delivery.result is None:
            return None
        measures, request, decision = self._measures(delivery), delivery.request, delivery.decision
        variant = delivery.result.variant
        return msgspec.json.encode(
            {
                "ttft_s": _rounded(measures.ttft_s),
                "ttlt_s": _rounded(measures.ttlt_s),
                "tpot_s": _rounded(measures.tpot_s),
                "queue_s": _rounded(delivery.queue_s),
                "tokens": measures.usage,
                "salvaged_tokens": measures.salvaged_tokens,
                "attempts": delivery.attempts,
                "held_s": _rounded(delivery.held_s),
                "delivery_attempt": delivery.message.delivery_attempt,
                "streamed": measures.streamed,
                "request_time": self._request_time(delivery.result.started),
                "backend": delivery.backend,
                "model": request.model if request is not None else None,
                "tenant": request.tenant if request is not None else None,
                "cost": _rounded(self._cost(delivery, measures)),
                "error_class": decision.error_class if decision is not None else None,
                **({} if variant is None else {"variant": variant}),
            }
        )

    def _request_time(self, started: float) -> str:
        moment = datetime.fromtimestamp(self._wall_clock() - (self._clock() - started), UTC)
        return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")

    def _line(self, delivery: Delivery) -> dict[str, Any]:
        """Return the fields of the canonical line that every settlement has."""
        message, request, result, decision = delivery.message, delivery.request, delivery.result, delivery.decision
        line: dict[str, Any] = {
            "message_id": message.message_id,
            "delivery_attempt": message.delivery_attempt,
            "backend": delivery.backend,
            "path": request.path if request is not None else None,
            "model": bounded(request.model, MAX_LOGGED_MODEL_BYTES) if request and request.model else None,
            "attempts": delivery.attempts,
            "total_s": round(self._clock() - delivery.received_at, 4),
        }
        trace_id = self._tracer.trace_id(delivery)
        if trace_id is not None:
            line["trace_id"] = trace_id
        if delivery.queue_s is not None:
            line["queue_s"] = round(delivery.queue_s, 3)
        if delivery.held_s:
            line["held_s"] = round(delivery.held_s, 3)
        if result is not None and result.ended is not None:
            line["attempt_s"] = round(result.ended - result.started, 4)
            line["request_id"] = result.request_id
            line["backend_request_id"] = result.backend_request_id
            if result.first_token_at is not None:
                line["ttft_s"] = round(result.first_token_at - result.started, 4)
            if result.salvaged_tokens is not None:
                line["salvaged_tokens"] = result.salvaged_tokens
            if result.variant is not None:
                line["variant"] = result.variant
        if decision is not None:
            line["disposition"] = decision.disposition.value
            if decision.error_class is not None:
                line |= {"error_class": decision.error_class.value, "rule": decision.rule}
                line |= {
                    "error": decision.message[:_MAX_LOGGED_ERROR_BYTES],
                    "backend_status": result.status if result else None,
                }
        return line


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)
