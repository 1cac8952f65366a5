"""
The catalogue of metrics: every name, kind, label and meaning is here, once.

Code refers to the attributes of a `Metrics`, so a metric that is not in the catalogue cannot be counted, and
`docs/metrics.md` is generated from it.  Labels come from closed sets only: never a message id; a model or path that a
requester chose becomes `other` beyond a small number of distinct values (`LabelCap`).  Durations are seconds.
"""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry

from worker.telemetry.series import Families

OTHER = "other"
MAX_LABEL = 128
"""Characters of a label that a requester chose; longer than any model's name."""

_DURATIONS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)
"""From an embedding to an hour of reasoning, roughly a factor of two to three a step."""
_WAITS = (0.1, 0.5, 1, 5, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 2 * 3600, 4 * 3600, 12 * 3600, 24 * 3600, 604_800)
"""A queue waits for seconds to hours: a step is a factor of two within minutes, so that "five minutes" is no guess."""
_PUBLISHES = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5, 10, 60)
_PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1)

_ROUTE = ("backend", "path", "model")
_LANE = ("backend", "model")
_VARIANT = ("backend", "variant")


class Metrics:
    """
    One set of metrics on one registry.

    Args:
        registry: Where they are registered; a fresh one when `None`, so that tests never share counts.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:  # noqa: PLR0915 - a list, not a procedure
        self.families = families = Families(registry)
        self.registry = families.registry
        counter, gauge, histogram = families.counter, families.gauge, families.histogram

        self.deliveries_total = counter(
            "deliveries",
            "Deliveries settled. settlement: ack, nack, lost (the lease ended first). "
            "reason: ok, an error class, duplicate, drain, publish_failed, ack_refused (exactly-once only).",
            ("settlement", "reason"),
        )
        self.requests_total = counter(
            "requests",
            "Requests settled: answered or nacked. outcome: ok, error_reply, nack.",
            (*_ROUTE, "outcome", "status_code"),
        )
        self.attempts_total = counter(
            "attempts",
            "Attempts against a backend. error_class: none for a good answer. disposition: reply, nack, hold.",
            ("backend", "error_class", "disposition"),
        )
        self.rerouted_attempts_total = counter(
            "rerouted_attempts",
            "Attempts at another backend than the request's first one. "
            "reason: fallback (its route was stopped for too long), failover (it failed at another server).",
            ("backend", "reason"),
        )
        self.cancelled_requests_total = counter(
            "cancelled_requests",
            "Requests answered as cancelled. kind: waiting (no attempt had begun), started.",
            ("backend", "kind"),
        )
        self.control_messages_total = counter(
            "control_messages", "Messages on the control topic. outcome: ok, unusable.", ("outcome",)
        )
        self.unreachable_deadlines_total = counter(
            "unreachable_deadlines",
            "Requests whose deadline was nearer than nearly all recent answers took. outcome: refused, tried.",
            ("backend", "outcome"),
        )
        self.request_duration_seconds = histogram(
            "request_duration_seconds",
            "One attempt, from its start to the last byte of the response or the failure.",
            (*_ROUTE, "outcome"),
            _DURATIONS,
        )
        self.queue_wait_seconds = histogram(
            "queue_wait_seconds", "From the publishing of a message to the start of its first attempt.", _ROUTE, _WAITS
        )
        self.held_seconds = histogram(
            "held_seconds",
            "Time that answered requests were held between attempts; only of those that were held.",
            _ROUTE,
            _WAITS,
        )
        self.time_to_first_token_seconds = histogram(
            "time_to_first_token_seconds",
            "From the start of a streamed answer's last attempt to the first generated text.",
            _ROUTE,
            _DURATIONS,
        )
        self.time_per_output_token_seconds = histogram(
            "time_per_output_token_seconds",
            "Mean time per output token after the first, per streamed answer.",
            _ROUTE,
            _PER_TOKEN,
        )
        self.tokens_total = counter(
            "tokens",
            "Tokens of published answers. kind: input, output, input_cached, output_reasoning.",
            (*_ROUTE, "kind"),
        )
        self.tenant_requests_total = counter(
            "tenant_requests",
            "Requests settled. tenant: none for requests without one. outcome: ok, error_reply, nack.",
            ("tenant", "model", "outcome"),
        )
        self.tenant_tokens_total = counter(
            "tenant_tokens",
            "Tokens of published answers. kind: input, output, input_cached, output_reasoning.",
            ("tenant", "model", "kind"),
        )
        self.tenant_cost_total = counter(
            "tenant_cost", "What published answers cost, by `prices`, in their currency.", ("tenant", "model")
        )
        self.tenant_limited_seconds = histogram(
            "tenant_limited_seconds",
            "How long requests have to wait for a limit of their tenant; only of those that have to.",
            (),
            _WAITS,
        ).labels()
        self.limit_store_skipped_total = counter(
            "limit_store_skipped", "Limits of tenants that this process kept alone: Redis cannot be reached."
        ).labels()
        self.salvaged_tokens_total = counter(
            "salvaged_tokens", "Tokens of broken streams that published answers resumed from.", _ROUTE
        )
        self.missing_done_total = counter(
            "missing_done", "Complete streams that ended without the `[DONE]` that their API specifies.", ("backend",)
        )
        self.partial_responses_total = counter(
            "partial_responses", "Answers that carry what a broken stream had generated.", ("reason",)
        )
        self.publish_duration_seconds = histogram(
            "publish_duration_seconds",
            "From the first publish of an answer to the broker's confirmation, repeated publishes included.",
            (),
            _PUBLISHES,
        ).labels()
        self.publish_failures_total = counter(
            "publish_failures",
            "Failed publishes of answers, each repeated or given up. kind: retryable, refused, too_large.",
            ("kind",),
        )
        self.payload_duration_seconds = histogram(
            "payload_duration_seconds",
            "One read of a request's body from object storage, the wait for memory included, or write of an answer's. "
            "kind: read, write. outcome: ok, draining, cancelled, or the error class.",
            ("kind", "outcome"),
            _DURATIONS,
        )
        self.payload_bytes_total = counter(
            "payload_bytes",
            "Bytes of bodies read from and written to object storage. kind: read, write.",
            ("kind",),
        )
        self.payload_memory_bytes = gauge(
            "payload_memory_bytes",
            "Bytes of bodies from object storage that are kept for their requests; at most pubsub.max_in_flight_bytes.",
        ).labels()
        self.variant_attempts_total = counter(
            "variant_attempts",
            "Attempts that a production variant of a SageMaker endpoint answered. error_class: none for a good answer.",
            (*_VARIANT, "error_class"),
        )
        self.variant_duration_seconds = histogram(
            "variant_duration_seconds",
            "One attempt that a production variant answered, from its start to the last byte or the failure.",
            (*_VARIANT, "outcome"),
            _DURATIONS,
        )
        self.variant_time_to_first_token_seconds = histogram(
            "variant_time_to_first_token_seconds",
            "From the start of a streamed answer's last attempt to the first generated text, by production variant.",
            _VARIANT,
            _DURATIONS,
        )
        self.variant_tokens_total = counter(
            "variant_tokens",
            "Tokens of published answers by production variant. kind: input, output, input_cached, output_reasoning.",
            (*_VARIANT, "kind"),
        )
        self.leased_messages = gauge("leased_messages", "Messages whose leases this process keeps.").labels()
        self.in_flight = gauge(
            "in_flight", "Attempts running against backends now; what the autoscaler reads."
        ).labels()
        self.held_messages = gauge(
            "held_messages", "Deliveries held: they wait in this process until the backend recovers.", ("backend",)
        )
        self.window_limit = gauge(
            "window_limit", "Attempts that may run at once now, all models together.", ("backend",)
        )
        self.metric_gate_part = gauge(
            "metric_gate_part", "Part of the window that the metric gate lets be used now, 0 to 1.", ("backend",)
        )
        self.metric_gate_value = gauge(
            "metric_gate_value", "The last number that the metric gate read, by signal.", ("backend", "signal")
        )
        self.metric_gate_stale = gauge(
            "metric_gate_stale",
            "1 while the metric gate has no recent reading, and so is as metric_gate.without_data says.",
            ("backend",),
        )
        self.metric_gate_failures_total = counter(
            "metric_gate_failures",
            "Failed readings of the metric gate. reason: unreachable, refused, unusable, internal.",
            ("backend", "reason"),
        )
        self.breaker_state = gauge(
            "breaker_state",
            "0 closed, 1 half open, 2 open: the breaker of the backend or of one of its models, the worst one.",
            ("backend",),
        )
        self.model_breaker_state = gauge(
            "model_breaker_state", "0 closed, 1 half open, 2 open: the breaker of one model.", _LANE
        )
        self.model_window_limit = gauge("model_window_limit", "Attempts of one model that may run at once now.", _LANE)
        self.model_in_flight = gauge("model_in_flight", "Attempts of one model running now.", _LANE)
        self.model_waiting_messages = gauge(
            "model_waiting_messages",
            "Deliveries for one model that wait to start an attempt, held ones included.",
            _LANE,
        )
        self.model_held_messages = gauge(
            "model_held_messages", "Deliveries for one model that are held after a failed attempt.", _LANE
        )
        self.model_failing_share = gauge(
            "model_failing_share",
            "Share of one model's recent messages whose first attempt failed although others were served.",
            _LANE,
        )
        self.breaker_trips_total = counter("breaker_trips", "Times a breaker opened.", ("backend", "error_class"))
        self.paused_seconds_total = counter(
            "paused_seconds",
            "Time a breaker was not closed, that of the backend or of one of its models.",
            ("backend",),
        )
        self.intake_paused = gauge(
            "intake_paused",
            "1 while no request is started. "
            "reason: publish (answers cannot be published), errors (most answers are errors).",
            ("reason",),
        )
        self.error_answer_share = gauge(
            "error_answer_share", "Share of the most frequent error class among recent answers.", ("error_class",)
        )
        self.lost_leases_total = counter(
            "lost_leases", "Deliveries whose lease ended before they were settled."
        ).labels()
        self.duplicates_total = counter(
            "duplicates", "Repeated deliveries, not sent to a backend again. kind: in_flight, answered.", ("kind",)
        )
        self.dedupe_skipped_total = counter(
            "dedupe_skipped",
            "Reads and writes of the dedupe store that were skipped or failed: it cannot be reached. kind: get, put.",
            ("kind",),
        )
        self.subscription_reopens_total = counter(
            "subscription_reopens", "Times the streaming pull was opened again after it ended by itself."
        ).labels()
        self.policy_hook_total = counter(
            "policy_hook", "Calls of error-policy hooks. outcome: default, overridden, raised, timed_out.", ("outcome",)
        )
        self.dead_letter_copies_total = counter(
            "dead_letter_copies", "Copies of failed requests. outcome: ok, failed.", ("outcome",)
        )
        self.internal_errors_total = counter(
            "internal_errors", "Exceptions in the worker's own code; each needs a person's attention."
        ).labels()
        self.draining = gauge("draining", "1 after SIGTERM.").labels()
        self.build_info = gauge("build_info", "Always 1; the label has the version.", ("version",))


def catalogue() -> Iterator[tuple[str, str, tuple[str, ...], str]]:
    """Return `(name as scraped, kind, labels, meaning)` of every metric, sorted by name."""
    return Metrics().families.rows()


class LabelCap:
    """
    Turns text that requesters choose into few label values.

    Args:
        known: Values that are always kept.
        limit: How many further distinct values are kept; every other one becomes `other`.
    """

    def __init__(self, known: tuple[str, ...] = (), limit: int = 20) -> None:
        self._seen = set(known)
        self._left = limit

    def label(self, value: str | None) -> str:
        """Return the value, `other` for one too many, `none` for `None`."""
        if value is None:
            return "none"
        if value in self._seen:
            return value
        if self._left == 0 or len(value) > MAX_LABEL or not value.isprintable():
            return OTHER
        self._left -= 1
        self._seen.add(value)
        return value
