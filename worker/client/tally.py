"""
What a run has come to: counts that grow, and two frozen views of them.

`Progress` is the view while it runs, `Summary` the one at its end.  Constant memory: of latencies a sketch is kept.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from worker.client.io.outputs import Answer
from worker.client.sketch import QuantileSketch


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """A run at one moment; counts only grow."""

    lines: int
    """Taken up so far, blank ones left out."""
    skipped: int
    """Those of them that an earlier run has answered."""
    answered: int
    """Answers written by this run."""
    errors: int
    """Those of them that are no success."""
    publish_retries: int
    """Publishes that failed and were tried again."""
    output_tokens: int
    lines_read: int
    """Read from the input so far; runs ahead of `lines`."""
    bytes_read: int
    """What those lines took in the file."""
    bytes_total: int | None
    """Size of the input file; `None` for a pipe."""
    is_input_read: bool
    """The input has ended, so that `lines` is final."""
    duration_s: float

    @property
    def unanswered(self) -> int:
        """Lines taken up that have no answer yet."""
        return self.lines - self.skipped - self.answered

    @property
    def expected_lines(self) -> int | None:
        """How many lines the input has: known at its end, before that estimated from bytes; `None` for a pipe."""
        if self.is_input_read:
            return self.lines
        if not self.bytes_total or not self.bytes_read:
            return None
        return max(self.lines_read, round(self.lines_read * self.bytes_total / self.bytes_read))


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What a run came to; also of one that was interrupted."""

    is_complete: bool
    """The input was read to its end and every line has an answer."""
    lines: int
    """Lines of the input that are not blank, as far as it was read."""
    skipped: int
    """Answered by an earlier run."""
    answered: int
    """Answers written by this run, errors among them."""
    unanswered: int
    """Read and not answered: 0 unless the run was cut short."""
    status_classes: Mapping[str, int]
    """Answers by `2xx`, `4xx`, `5xx`; sorted."""
    error_classes: Mapping[str, int]
    """Error answers by class, the most frequent first."""
    duplicates: int
    """Answers dropped because their line had one."""
    unmatched_answers: int
    """Answers dropped because no line of this input has their id."""
    publish_retries: int
    """Publishes that failed and were tried again."""
    duration_s: float
    lines_per_s: float
    """Answers a second."""
    input_tokens: int | None
    """Sum over the answers that reported usage; `None` when none did."""
    output_tokens: int | None
    output_tokens_per_s: float | None
    latency_p50_s: float | None
    """From handing a line to the broker to its answer, within 1 %; `None` without answers from the broker."""
    latency_p90_s: float | None


class Tally:
    """The counts of one run; not thread-safe, the event loop owns it."""

    def __init__(self) -> None:
        self.lines = 0
        self.skipped = 0
        self.answered = 0
        self.errors = 0
        self.duplicates = 0
        self.unmatched_answers = 0
        self.publish_retries = 0
        self._input_tokens: int | None = None
        self._output_tokens: int | None = None
        self._statuses: Counter[str] = Counter()
        self._classes: Counter[str] = Counter()
        self._latencies = QuantileSketch()

    def count(self, answer: Answer, latency_s: float | None) -> None:
        """Count one written answer; `latency_s` is `None` for one that was made here."""
        self.answered += 1
        self._statuses[f"{answer.status_code // 100}xx"] += 1
        if answer.is_error:
            self.errors += 1
            self._classes[answer.error_class or "unclassified"] += 1
        if answer.input_tokens is not None:
            self._input_tokens = (self._input_tokens or 0) + answer.input_tokens
        if answer.output_tokens is not None:
            self._output_tokens = (self._output_tokens or 0) + answer.output_tokens
        if latency_s is not None:
            self._latencies.add(latency_s)

    def progress(
        self, *, duration_s: float, lines_read: int, bytes_read: int, bytes_total: int | None, is_input_read: bool
    ) -> Progress:
        """Return the counts as they are now."""
        return Progress(
            lines=self.lines,
            skipped=self.skipped,
            answered=self.answered,
            errors=self.errors,
            publish_retries=self.publish_retries,
            output_tokens=self._output_tokens or 0,
            lines_read=lines_read,
            bytes_read=bytes_read,
            bytes_total=bytes_total,
            is_input_read=is_input_read,
            duration_s=duration_s,
        )

    def summary(self, *, duration_s: float, is_input_read: bool) -> Summary:
        """Return what the run came to within `duration_s` seconds."""
        span = max(duration_s, 1e-9)
        return Summary(
            is_complete=is_input_read and self.lines == self.skipped + self.answered,
            lines=self.lines,
            skipped=self.skipped,
            answered=self.answered,
            unanswered=self.lines - self.skipped - self.answered,
            status_classes=dict(sorted(self._statuses.items())),
            error_classes=dict(sorted(self._classes.items(), key=lambda item: (-item[1], item[0]))),
            duplicates=self.duplicates,
            unmatched_answers=self.unmatched_answers,
            publish_retries=self.publish_retries,
            duration_s=duration_s,
            lines_per_s=self.answered / span,
            input_tokens=self._input_tokens,
            output_tokens=self._output_tokens,
            output_tokens_per_s=None if self._output_tokens is None else self._output_tokens / span,
            latency_p50_s=self._latencies.percentile(50),
            latency_p90_s=self._latencies.percentile(90),
        )
