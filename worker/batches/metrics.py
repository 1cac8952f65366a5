"""
The metrics of `batches serve`: every name, kind, label and meaning, as `worker.telemetry.metrics` has the worker's.

A process shows all of them, whatever its roles; what only another role counts stays 0 or has no series.  What is told
of all batches is told by the process that coordinates, and by no other.
"""

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry

from worker.telemetry.series import Families

_REQUESTS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
"""From reading a batch to uploading 200 MB over a slow line."""
_TRANSACTIONS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5, 10, 60)


class BatchMetrics:
    """
    One set of them on one registry.

    Args:
        registry: Where they are registered; a fresh one when `None`.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.families = families = Families(registry)
        self.registry = families.registry
        counter, gauge, histogram = families.counter, families.gauge, families.histogram

        self.answers_total = counter(
            "batch_answers",
            "Messages of the response subscription by what became of them. outcome: stored, repeated (the line had a "
            "result), late (its batch had ended), unknown (no such batch or line), foreign (no answer to a line), "
            "nacked (not stored, comes again).",
            ("outcome",),
        )
        self.store_duration_seconds = histogram(
            "batch_store_duration_seconds",
            "One transaction in which a collector stored answers, the time that the database was away included.",
            (),
            _TRANSACTIONS,
        ).labels()
        self.lines_published_total = counter(
            "batch_lines_published", "Lines that the request topic has confirmed."
        ).labels()
        self.publish_failures_total = counter(
            "batch_publish_failures", "Lines that could not be published and are tried again."
        ).labels()
        self.ended_total = counter("batches_ended", "Batches that got a final status.", ("status",))
        self.step_failures_total = counter(
            "batch_step_failures",
            "Steps of a batch that failed and are tried again. "
            "step: validate, complete, finalize, cancel, expire, cancel_unstarted, expire_unstarted.",
            ("step",),
        )
        self.events_total = counter(
            "batch_events",
            "Attempts to tell that a batch has ended. place: webhook, topic. outcome: ok, failed.",
            ("place", "outcome"),
        )
        self.coordinating = gauge("batch_coordinating", "1 in the process that coordinates, else 0.").labels()
        self.unfinished = gauge(
            "batches_unfinished", "Batches that have not ended; told by the process that coordinates.", ("status",)
        )
        self.lines_outstanding = gauge(
            "batch_lines_outstanding",
            "Published lines without a result, over all batches; told by the process that coordinates.",
        ).labels()
        self.lines_unpublished = gauge(
            "batch_lines_unpublished",
            "Lines of running batches that are not published; told by the process that coordinates.",
        ).labels()
        self.silence_seconds = gauge(
            "batch_silence_seconds",
            "Time since the last result of any batch while published lines have none; told by the process that "
            "coordinates.",
        ).labels()
        self.api_request_duration_seconds = histogram(
            "batch_api_request_duration_seconds",
            "One request to the API, until its reply is sent. route: the path, with the names of its parameters.",
            ("method", "route", "status_code"),
            _REQUESTS,
        )

    def stop_coordinating(self) -> None:
        """Tell nothing of all batches any more: another process does."""
        self.coordinating.set(0)
        self.unfinished.clear()
        for gauge in (self.lines_outstanding, self.lines_unpublished, self.silence_seconds):
            gauge.set(0)

    def set_unfinished(self, counts: Mapping[str, int]) -> None:
        """Show how many batches there are of each status that is not final."""
        for status, count in counts.items():
            self.unfinished.labels(status).set(count)


def batch_catalogue() -> Iterator[tuple[str, str, tuple[str, ...], str]]:
    """Return `(name as scraped, kind, labels, meaning)` of every metric, sorted by name."""
    return BatchMetrics().families.rows()
