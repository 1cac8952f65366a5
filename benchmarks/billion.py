"""
A large run on paper: `python -m benchmarks.billion`; shape of the fleet, volumes, and what Pub/Sub and logs cost.

Nothing is measured here.  It is arithmetic with figures of docs/performance.md and docs/submit.md, and with Google's
list prices in USD as of September 2026; docs/how-to/a-billion-lines.md shows what it prints.  The model
servers cost far more than everything below and are counted in hours only.
"""

import argparse
import math
from dataclasses import dataclass

TIB = 2**40
GIB = 2**30
DAY_S = 86_400

PUBSUB_USD_PER_TIB = 40.0
"""Publishing, and delivery to a pull subscription; each message passes once for each
(https://cloud.google.com/pubsub/pricing)."""
IMPORT_USD_PER_TIB = 80.0
"""An import topic that reads Cloud Storage, in place of publishing (the same page)."""
EXPORT_USD_PER_TIB = 50.0
"""A BigQuery or Cloud Storage subscription, in place of delivery (the same page)."""
LOGS_USD_PER_GIB = 0.50
"""Cloud Logging, 30 days included (https://cloud.google.com/stackdriver/pricing)."""

REQUEST_OVERHEAD_BYTES = 40
"""What is billed beside the data: 20 bytes for the time and the message's id (the same page as above)."""
ANSWER_OVERHEAD_BYTES = 240
"""The same, with the attributes of an answer and the envelope around its body (docs/contract.md)."""
LOG_LINE_BYTES = 600
"""One line for each answer (docs/log.md)."""
CPU_S = 0.26e-3
"""Of a worker for one message of 1 KB (docs/performance.md)."""
LEDGER_BYTES = 44
SUBMIT_LINES_PER_CPU_S = 12_200
COLLECT_BYTES = 4
"""For each line: `submit` on disk and in time, `collect` in memory (docs/submit.md)."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is known beforehand."""

    requests: int = 1_000_000_000
    request_bytes: int = 2_000
    answer_bytes: int = 2_000
    seconds: float = 5.0
    """Mean duration of a request at the model server."""
    days: float = 7.0
    """Within which all is to be answered."""
    server_requests: int = 128
    """That one model server runs in parallel."""
    pod_requests: int = 256
    """`backend.window.max` of one worker pod; its default."""
    log_ratio: float = 1.0
    """`log.answer_ratio`."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What follows."""

    rate: float
    """Requests a second."""
    at_once: int
    """At the model servers, by Little's law."""
    servers: int
    server_hours: float
    pods: int
    cores: float
    """Of all worker pods together."""
    publish_usd: float
    import_usd: float
    deliver_usd: float
    answer_usd: float
    pull_usd: float
    export_usd: float
    logs_usd: float
    request_mb_s: float
    """Of the request topic, in each direction; 10^6 bytes."""
    answer_mb_s: float
    submit_hours: float
    ledger_gb: float
    collect_gb: float


def estimate(run: Run) -> Estimate:
    """
    Return the shape and the cost of a run.

    Raises:
        ValueError: A number is not above zero, or the ratio of log lines not between 0 and 1.
    """
    sizes = (
        run.requests,
        run.request_bytes,
        run.answer_bytes,
        run.seconds,
        run.days,
        run.server_requests,
        run.pod_requests,
    )
    if min(sizes) <= 0 or not 0 <= run.log_ratio <= 1:
        raise ValueError("every number must be above zero, and log-ratio between 0 and 1")
    rate = run.requests / (run.days * DAY_S)
    at_once = math.ceil(rate * run.seconds)
    servers = math.ceil(at_once / run.server_requests)
    asked = run.requests * (run.request_bytes + REQUEST_OVERHEAD_BYTES)
    answered = run.requests * (run.answer_bytes + ANSWER_OVERHEAD_BYTES)
    return Estimate(
        rate=rate,
        at_once=at_once,
        servers=servers,
        server_hours=servers * run.days * 24,
        pods=math.ceil(at_once / run.pod_requests),
        cores=rate * CPU_S,
        publish_usd=asked / TIB * PUBSUB_USD_PER_TIB,
        import_usd=asked / TIB * IMPORT_USD_PER_TIB,
        deliver_usd=asked / TIB * PUBSUB_USD_PER_TIB,
        answer_usd=answered / TIB * PUBSUB_USD_PER_TIB,
        pull_usd=answered / TIB * PUBSUB_USD_PER_TIB,
        export_usd=answered / TIB * EXPORT_USD_PER_TIB,
        logs_usd=run.requests * run.log_ratio * LOG_LINE_BYTES / GIB * LOGS_USD_PER_GIB,
        request_mb_s=rate * (run.request_bytes + REQUEST_OVERHEAD_BYTES) / 1e6,
        answer_mb_s=rate * (run.answer_bytes + ANSWER_OVERHEAD_BYTES) / 1e6,
        submit_hours=run.requests / SUBMIT_LINES_PER_CPU_S / 3600,
        ledger_gb=run.requests * LEDGER_BYTES / 1e9,
        collect_gb=run.requests * COLLECT_BYTES / 1e9,
    )


def page(run: Run) -> str:
    """Return what the command prints."""
    it = estimate(run)
    rows = [
        ("requests", f"{run.requests:,} of {run.request_bytes:,} bytes, answers of {run.answer_bytes:,}"),
        ("time", f"{run.days:g} days, {run.seconds:g} s for each request"),
        ("", ""),
        ("rate", f"{it.rate:,.0f} requests/s"),
        ("at once", f"{it.at_once:,} requests"),
        (
            "model servers",
            f"{it.servers:,} of {run.server_requests} requests each, {it.server_hours:,.0f} server hours",
        ),
        ("worker pods", f"{it.pods:,} of {run.pod_requests} requests each, {it.cores:.2g} cores in all"),
        ("Pub/Sub", f"{it.request_mb_s:.2g} MB/s of requests, {it.answer_mb_s:.2g} MB/s of answers"),
        ("", ""),
        (
            "publish requests",
            f"{it.publish_usd:,.0f} USD; import them from Cloud Storage instead: {it.import_usd:,.0f} USD",
        ),
        ("deliver requests", f"{it.deliver_usd:,.0f} USD"),
        ("publish answers", f"{it.answer_usd:,.0f} USD"),
        (
            "pull answers",
            f"{it.pull_usd:,.0f} USD; export to BigQuery or Cloud Storage instead: {it.export_usd:,.0f} USD",
        ),
        ("logs", f"{it.logs_usd:,.0f} USD with log.answer_ratio {run.log_ratio:g}"),
        ("", ""),
        ("one submit", f"{it.submit_hours:,.0f} h, a ledger of {it.ledger_gb:,.0f} GB"),
        ("one collect", f"{it.collect_gb:,.1f} GB of memory"),
    ]
    return "\n".join(f"{name:18}{text}".rstrip() for name, text in rows) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Print the estimate for the numbers given; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.billion", description="A large run on paper.")
    for name, default in vars(Run()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default, metavar="N")
    run = Run(**vars(parser.parse_args(arguments)))
    try:
        print(page(run), end="")
    except ValueError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
