# ruff: noqa: INP001 - a script beside what it writes
"""
Write the Grafana dashboard, dashboard.json, from the catalogue of metrics.

`python deploy/grafana/generate.py` writes it, `--check` fails when it is stale.  Every metric has exactly one panel and
no panel asks for anything else; which query a metric gets follows from its kind.  `ROWS` orders them; a metric that is
in no row stands in the last one, so that none is forgotten.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from worker.telemetry.metrics import PREFIX, catalogue

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
    "Time": (
        "queue_wait_seconds",
        "held_seconds",
        "request_duration_seconds",
        "time_to_first_token_seconds",
        "time_per_output_token_seconds",
    ),
    "Publishing": ("publish_duration_seconds", "publish_failures_total", "intake_paused", "dead_letter_copies_total"),
    "Object storage": ("payload_duration_seconds", "payload_bytes_total", "payload_memory_bytes"),
    "Tokens": ("tokens_total", "salvaged_tokens_total", "partial_responses_total", "missing_done_total"),
    "The worker itself": (
        "lost_leases_total",
        "subscription_reopens_total",
        "internal_errors_total",
        "policy_hook_total",
        "dedupe_skipped_total",
        "draining",
        "build_info",
    ),
}
REST = "More"
GROUPED_BY: Mapping[str, tuple[str, ...]] = {
    "requests_total": ("outcome", "status_code"),
    "attempts_total": ("error_class", "disposition"),
    "tokens_total": ("kind",),
    "salvaged_tokens_total": ("backend",),
    "request_duration_seconds": ("backend", "outcome"),
    "payload_duration_seconds": ("kind", "outcome"),
}
"""Fewer labels than the metric has, where all of them would be too many lines; histograms go by backend if they can."""
LARGEST = {
    "breaker_state",
    "model_breaker_state",
    "model_failing_share",
    "error_answer_share",
    "intake_paused",
    "draining",
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
}
"""
Counters of what should not happen often: shown as they stand, not as a rate.  A labelled counter comes into being with
its first event, which a rate does not see.
"""
WORDS: Mapping[str, str] = {
    "build_info": "workers by version",
    "held_seconds": "waiting between attempts",
    "missing_done_total": "streams without [DONE]",
    "paused_seconds_total": "share of time paused",
    "policy_hook_total": "hook calls",
}
"""Titles that the name alone does not give."""
QUANTILES = (0.5, 0.95, 0.99)
WIDTH, HEIGHT, COLUMNS = 6, 7, 24
RATE = "$__rate_interval"
POD_FILTER = '{namespace=~"$namespace"}'
STATES = {"0": "closed", "1": "half open", "2": "open"}


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


def queries(metric: Metric) -> Iterator[tuple[str, str]]:
    """Yield `(PromQL, legend)` of each line: rate for a counter, quantiles for a histogram, else the value."""
    by = f" by ({', '.join(metric.groups)})" if metric.groups else ""
    legend = " ".join(f"{{{{{name}}}}}" for name in metric.groups)
    full = PREFIX + metric.name
    if metric.kind == "counter" and metric.name not in RARE:
        function = "avg" if metric.name == "paused_seconds_total" else "sum"
        yield f"{function}{by} (rate({full}{POD_FILTER}[{RATE}]))", legend or _words(metric.name)
    elif metric.kind == "histogram":
        buckets = f"sum by ({', '.join(('le', *metric.groups))}) (rate({full}_bucket{POD_FILTER}[{RATE}]))"
        for quantile in QUANTILES:
            yield f"histogram_quantile({quantile:g}, {buckets})", f"p{quantile * 100:g} {legend}".rstrip()
    else:
        function = "max" if metric.name in LARGEST else "sum"
        yield f"{function}{by} ({full}{POD_FILTER})", legend or _words(metric.name)


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


def rows() -> dict[str, list[Metric]]:
    """Return every metric of the catalogue, by row."""
    known = {item[0].removeprefix(PREFIX): Metric(item[0].removeprefix(PREFIX), *item[1:]) for item in catalogue()}
    placed = {title: [known.pop(name) for name in names if name in known] for title, names in ROWS.items()}
    return {title: metrics for title, metrics in {**placed, REST: list(known.values())}.items() if metrics}


def dashboard() -> dict[str, Any]:
    """Return the dashboard as Grafana imports it."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, metrics in rows().items():
        panels.append(
            {
                "id": len(panels) + 1,
                "type": "row",
                "title": title,
                "collapsed": False,
                "gridPos": {"x": 0, "y": y, "w": COLUMNS, "h": 1},
                "panels": [],
            }
        )
        y += 1
        per_line = COLUMNS // WIDTH
        for at, metric in enumerate(metrics):
            across, down = at % per_line * WIDTH, y + at // per_line * HEIGHT
            panels.append(_panel(len(panels) + 1, metric, across, down))
        y += -(-len(metrics) // per_line) * HEIGHT
    return {
        "uid": "inference-worker",
        "title": TITLE,
        "description": "Made from the worker's catalogue of metrics by deploy/grafana/generate.py.",
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
