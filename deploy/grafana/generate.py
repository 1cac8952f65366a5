# ruff: noqa: INP001 - a script beside what it writes
"""
Write the Grafana dashboard, dashboard.json, from the catalogues of metrics: the worker's and that of `batches serve`.

`python deploy/grafana/generate.py` writes it, `--check` fails when it is stale.  On top is a row of big numbers, then
every metric has exactly one graph and no graph asks for anything else; which query a metric gets follows from its kind.
`ROWS` orders them; a metric that is in no row stands in the last one, so that none is forgotten.

No panel that is shown is empty: a count that nothing was counted in is 0, and graphs of what not everyone uses
(streams, object storage) are in rows that are closed until somebody opens them.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from worker.batches.metrics import batch_catalogue
from worker.telemetry.metrics import catalogue
from worker.telemetry.series import PREFIX

FILE = Path(__file__).resolve().parent / "dashboard.json"
TITLE = "Inference worker"
ROWS: Mapping[str, tuple[str, ...]] = {
    "Answers": ("requests_total", "deliveries_total", "attempts_total", "duplicates_total"),
    "Capacity": ("in_flight", "window_limit", "leased_messages", "held_messages"),
    "Backends": ("breaker_state", "breaker_trips_total", "paused_seconds_total", "error_answer_share"),
    "Models": (
        "model_breaker_state",
        "model_window_limit",
        "model_in_flight",
        "model_waiting_messages",
        "model_held_messages",
        "model_failing_share",
    ),
    "Time and tokens": ("queue_wait_seconds", "request_duration_seconds", "publish_duration_seconds", "tokens_total"),
    "Publishing": ("publish_failures_total", "intake_paused", "dead_letter_copies_total", "dedupe_skipped_total"),
    "The worker itself": (
        "lost_leases_total",
        "subscription_reopens_total",
        "internal_errors_total",
        "draining",
        "build_info",
    ),
    "Holds and streams": (
        "held_seconds",
        "time_to_first_token_seconds",
        "time_per_output_token_seconds",
        "salvaged_tokens_total",
        "partial_responses_total",
        "missing_done_total",
    ),
    "Object storage": ("payload_duration_seconds", "payload_bytes_total", "payload_memory_bytes"),
    "Variants": (
        "variant_attempts_total",
        "variant_duration_seconds",
        "variant_time_to_first_token_seconds",
        "variant_tokens_total",
    ),
    "Hooks": ("policy_hook_total",),
    "Traffic": (
        "metric_gate_part",
        "metric_gate_value",
        "metric_gate_stale",
        "metric_gate_failures_total",
        "rerouted_attempts_total",
        "unreachable_deadlines_total",
        "cancelled_requests_total",
        "control_messages_total",
        "tenant_requests_total",
        "tenant_tokens_total",
        "tenant_cost_total",
        "tenant_limited_seconds",
        "limit_store_skipped_total",
    ),
    "Files and batches": (
        "batches_unfinished",
        "batches_ended_total",
        "batch_answers_total",
        "batch_lines_published_total",
        "batch_lines_outstanding",
        "batch_lines_unpublished",
        "batch_silence_seconds",
        "batch_coordinating",
        "batch_api_request_duration_seconds",
        "batch_store_duration_seconds",
        "batch_step_failures_total",
        "batch_publish_failures_total",
        "batch_events_total",
    ),
}
CLOSED = {"Holds and streams", "Object storage", "Variants", "Hooks", "Traffic", "Files and batches"}
"""Rows of what not every worker does; closed, so that nothing of them is shown or asked for."""
REST = "More"
GROUPED_BY: Mapping[str, tuple[str, ...]] = {
    "requests_total": ("outcome", "status_code"),
    "attempts_total": ("error_class", "disposition"),
    "tokens_total": ("kind",),
    "salvaged_tokens_total": ("backend",),
    "request_duration_seconds": ("backend", "outcome"),
    "variant_attempts_total": ("variant", "error_class"),
    "variant_duration_seconds": ("variant", "outcome"),
    "variant_time_to_first_token_seconds": ("variant",),
    "variant_tokens_total": ("variant", "kind"),
    "payload_duration_seconds": ("kind", "outcome"),
    "batch_api_request_duration_seconds": ("route",),
}
"""Fewer labels than the metric has, where all of them would be too many lines; histograms go by backend if they can."""
LARGEST = {
    "breaker_state",
    "model_breaker_state",
    "model_failing_share",
    "error_answer_share",
    "intake_paused",
    "metric_gate_part",
    "metric_gate_value",
    "metric_gate_stale",
    "draining",
    "batch_silence_seconds",
}
"""Gauges whose sum over pods says nothing; the largest is shown."""
RARE = {
    "breaker_trips_total",
    "duplicates_total",
    "publish_failures_total",
    "dead_letter_copies_total",
    "partial_responses_total",
    "missing_done_total",
    "lost_leases_total",
    "subscription_reopens_total",
    "internal_errors_total",
    "policy_hook_total",
    "dedupe_skipped_total",
    "batches_ended_total",
    "batch_step_failures_total",
    "batch_publish_failures_total",
    "batch_events_total",
    "metric_gate_failures_total",
}
"""
Counters of what should not happen often: shown as they stand, not as a rate.  A labelled counter comes into being with
its first event, which a rate does not see.
"""
WORDS: Mapping[str, str] = {
    "batch_api_request_duration_seconds": "API requests",
    "batch_coordinating": "processes that coordinate",
    "batch_silence_seconds": "time without a result",
    "batch_store_duration_seconds": "storing of answers",
    "build_info": "workers by version",
    "held_seconds": "waiting between attempts",
    "missing_done_total": "streams without [DONE]",
    "paused_seconds_total": "share of time paused",
    "policy_hook_total": "hook calls",
}
"""Titles that the name alone does not give."""
QUANTILES = (0.5, 0.95, 0.99)
WIDTH, HEIGHT, COLUMNS = 6, 7, 24
NUMBER_HEIGHT = 4
RATE = "$__rate_interval"
POD_FILTER = '{namespace=~"$namespace"}'
STATES = {"0": "closed", "1": "half open", "2": "open"}


class Number(NamedTuple):
    """A big number on top: what an operator looks at first."""

    title: str
    meaning: str
    expr: str
    """`METRIC` and `BUCKET` are written as `{METRIC}`; it always has a value."""
    unit: str = "short"
    warn: float | None = None
    """Yellow from here on."""
    alarm: float | None = None
    """Red from here on."""


def _answers(outcome: str = 'outcome!="nack"') -> str:
    return f'sum(rate({PREFIX}requests_total{{namespace=~"$namespace",{outcome}}}[{RATE}]))'


def _p95(name: str) -> str:
    """Return a quantile over all backends; where nothing was observed there is none, and 0 is shown."""
    buckets = f"sum by (le) (rate({PREFIX}{name}_bucket{POD_FILTER}[{RATE}]))"
    return f"(histogram_quantile(0.95, {buckets}) >= 0) or on () vector(0)"


def _total(name: str) -> str:
    return f"sum({PREFIX}{name}{POD_FILTER}) or on () vector(0)"


class Metric(NamedTuple):
    """A line of the catalogue, its name without the prefix."""

    name: str
    kind: str
    labels: tuple[str, ...]
    meaning: str

    @property
    def groups(self) -> tuple[str, ...]:
        """Labels that its lines are told apart by."""
        default = tuple(name for name in self.labels if name == "backend") if self.kind == "histogram" else self.labels
        return GROUPED_BY.get(self.name, default)


def numbers() -> tuple[Number, ...]:
    """Return the row on top."""
    errors = _answers('outcome="error_reply"')
    running, limit = f"sum({PREFIX}in_flight{POD_FILTER})", f"sum({PREFIX}window_limit{POD_FILTER})"
    opened = f"count({PREFIX}breaker_state{POD_FILTER} == 2) or on () vector(0)"
    share = f"({errors} / ({_answers()} > 0)) or on () vector(0)"
    return (
        Number("Answers a second", "Good ones and errors.", f"{_answers()} or on () vector(0)"),
        Number("Errors", "Share of the answers.", share, "percentunit", warn=0.01, alarm=0.05),
        Number("Wait, p95", "In the queue, to the first attempt.", _p95("queue_wait_seconds"), "s"),
        Number("Attempt, p95", "One attempt at a backend.", _p95("request_duration_seconds"), "s"),
        Number("Running", "Attempts at backends now.", f"{running} or on () vector(0)"),
        Number(
            "Of the windows",
            "Share of what may run at once.",
            f"({running} / ({limit} > 0)) or on () vector(0)",
            "percentunit",
        ),
        Number("Held", "Waiting for a backend to recover.", _total("held_messages"), warn=1),
        Number("Open breakers", "Pods and backends that get probes only.", opened, warn=1, alarm=1),
    )


def queries(metric: Metric) -> Iterator[tuple[str, str]]:
    """Yield `(PromQL, legend)` of each line: rate for a counter, quantiles for a histogram, else the value, or 0."""
    by = f" by ({', '.join(metric.groups)})" if metric.groups else ""
    legend = " ".join(f"{{{{{name}}}}}" for name in metric.groups)
    full = PREFIX + metric.name
    if metric.kind == "counter" and metric.name not in RARE:
        function = "avg" if metric.name == "paused_seconds_total" else "sum"
        yield _or_zero(f"{function}{by} (rate({full}{POD_FILTER}[{RATE}]))", metric), legend or _words(metric.name)
    elif metric.kind == "histogram":
        buckets = f"sum by ({', '.join(('le', *metric.groups))}) (rate({full}_bucket{POD_FILTER}[{RATE}]))"
        for quantile in QUANTILES:
            yield f"histogram_quantile({quantile:g}, {buckets})", f"p{quantile * 100:g} {legend}".rstrip()
    else:
        function = "max" if metric.name in LARGEST else "sum"
        yield _or_zero(f"{function}{by} ({full}{POD_FILTER})", metric), legend or _words(metric.name)


def _or_zero(expr: str, metric: Metric) -> str:
    """Return what has a value also where nothing was counted yet: 0, called `none`."""
    zero = "vector(0)"
    for name in metric.groups:  # a legend shows the name of a label that is not there
        zero = f'label_replace({zero}, "{name}", "none", "", "")'
    return f"{expr} or on () {zero}"


def unit(metric: Metric) -> str:
    """Return Grafana's unit of a panel."""
    if metric.name == "paused_seconds_total" or metric.name.endswith("_share"):
        return "percentunit"  # seconds per second
    return "s" if metric.name.endswith("_seconds") and metric.kind != "counter" else "short"


def _words(name: str) -> str:
    return WORDS.get(name, name.removesuffix("_total").removesuffix("_seconds").replace("_", " "))


def _title(metric: Metric) -> str:
    words = _words(metric.name)
    if metric.kind == "counter" and metric.name != "paused_seconds_total":
        words += " since the pods' start" if metric.name in RARE else " per second"
    return words[0].upper() + words[1:]


def _panel(number: int, metric: Metric, x: int, y: int) -> dict[str, Any]:
    targets = [
        {"refId": chr(ord("A") + at), "expr": expr, "legendFormat": legend, "editorMode": "code", "range": True}
        for at, (expr, legend) in enumerate(queries(metric))
    ]
    mappings = []
    if metric.name.endswith("breaker_state"):
        mappings = [{"type": "value", "options": {value: {"text": text} for value, text in STATES.items()}}]
    return {
        "id": number,
        "type": "timeseries",
        "title": _title(metric),
        "description": metric.meaning,
        "datasource": {"type": "prometheus", "uid": "$datasource"},
        "gridPos": {"x": x, "y": y, "w": WIDTH, "h": HEIGHT},
        "fieldConfig": {"defaults": {"unit": unit(metric), "min": 0, "mappings": mappings}, "overrides": []},
        "options": {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        "targets": targets,
    }


def _number(number: int, shown: Number, x: int, width: int) -> dict[str, Any]:
    steps = [{"color": "text", "value": None}]
    steps += [{"color": color, "value": at} for color, at in (("yellow", shown.warn), ("red", shown.alarm)) if at]
    return {
        "id": number,
        "type": "stat",
        "title": shown.title,
        "description": shown.meaning,
        "datasource": {"type": "prometheus", "uid": "$datasource"},
        "gridPos": {"x": x, "y": 0, "w": width, "h": NUMBER_HEIGHT},
        "fieldConfig": {
            "defaults": {
                "unit": shown.unit,
                "decimals": 0 if shown.title in {"Running", "Held", "Open breakers"} else None,
                "thresholds": {"mode": "absolute", "steps": steps},
            },
            "overrides": [],
        },
        "options": {
            "colorMode": "value",
            "graphMode": "area",
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
            "textMode": "value",
        },
        "targets": [
            {"refId": "A", "expr": shown.expr, "legendFormat": shown.title, "editorMode": "code", "range": True}
        ],
    }


def rows() -> dict[str, list[Metric]]:
    """Return every metric of the catalogue, by row."""
    every = (*catalogue(), *batch_catalogue())
    known = {item[0].removeprefix(PREFIX): Metric(item[0].removeprefix(PREFIX), *item[1:]) for item in every}
    placed = {title: [known.pop(name) for name in names if name in known] for title, names in ROWS.items()}
    return {title: metrics for title, metrics in {**placed, REST: list(known.values())}.items() if metrics}


def dashboard() -> dict[str, Any]:
    """Return the dashboard as Grafana imports it."""
    ids = count(1)
    first = numbers()
    width = COLUMNS // len(first)
    panels = [_number(next(ids), shown, at * width, width) for at, shown in enumerate(first)]
    y = NUMBER_HEIGHT
    for title, metrics in rows().items():
        row = {
            "id": next(ids),
            "type": "row",
            "title": title,
            "collapsed": title in CLOSED,
            "gridPos": {"x": 0, "y": y, "w": COLUMNS, "h": 1},
            "panels": [],
        }
        panels.append(row)
        y += 1
        per_line = COLUMNS // WIDTH
        graphs = [
            _panel(next(ids), metric, at % per_line * WIDTH, y + at // per_line * HEIGHT)
            for at, metric in enumerate(metrics)
        ]
        if title in CLOSED:  # Grafana keeps the panels of a closed row inside it
            row["panels"] = graphs
        else:
            panels += graphs
            y += -(-len(metrics) // per_line) * HEIGHT
    return {
        "uid": "inference-worker",
        "title": TITLE,
        "description": "Made from the catalogues of metrics by deploy/grafana/generate.py.",
        "tags": ["inference-worker"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "timezone": "browser",
        "annotations": {"list": []},
        "links": [],
        "templating": {"list": [_datasource(), _namespace()]},
        "panels": panels,
    }


def _datasource() -> dict[str, Any]:
    return {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus", "hide": 0}


def _namespace() -> dict[str, Any]:
    return {
        "name": "namespace",
        "label": "Namespace",
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "$datasource"},
        "query": {"query": f"label_values({PREFIX}build_info, namespace)", "refId": "namespace"},
        "refresh": 2,
        "includeAll": True,
        "allValue": ".*",  # also where nothing has a namespace
        "multi": True,
        "current": {"text": "All", "value": "$__all"},
        "hide": 0,
    }


def render() -> str:
    """Return the file's text."""
    return json.dumps(dashboard(), indent=2) + "\n"


def main() -> int:
    """Write the file, or with `--check` compare it; return the exit code."""
    text = render()
    if FILE.exists() and FILE.read_text() == text:
        return 0
    if "--check" in sys.argv:
        sys.stderr.write("deploy/grafana/dashboard.json is stale, run `python deploy/grafana/generate.py`\n")
        return 1
    FILE.write_text(text)
    sys.stdout.write("deploy/grafana/dashboard.json written\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
