"""
What one attempt measured: times and tokens, for the answer's `stats`, the metrics and the log alike.

One function computes them all, so that a report over the answers and the live metrics of the same run agree.  What is
not known is `None`, never 0.

* **TTFT**: from the attempt's start to the first generated text; reasoning, tool calls and refusals count.  Only of
  streamed answers.
* **TTLT**: from the attempt's start to its end, also when it failed.
* **TPOT**: the time per output token after the first, (TTLT - TTFT) / (output tokens - 1).

Tokens are those of the last attempt.  Of an answer that goes on from an earlier try they are the tokens of the rest;
`salvaged_tokens` are those it went on from.
"""

from dataclasses import dataclass

from worker.ports import AttemptResult
from worker.telemetry.usage import Usage, read_usage, usage_of

_NO_USAGE = Usage()


@dataclass(frozen=True, slots=True, kw_only=True)
class Measures:
    """What one attempt measured; durations in seconds."""

    ttft_s: float | None = None
    ttlt_s: float | None = None
    tpot_s: float | None = None
    usage: Usage = _NO_USAGE
    streamed: bool = False
    salvaged_tokens: int | None = None


def measure(result: AttemptResult, body: bytes) -> Measures:
    """
    Return the measures of an attempt.

    Args:
        result: Of the attempt.
        body: Where an answer that was not streamed tells its usage; `{}` for an error.
    """
    usage = _usage(result, body)
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


def output_tokens(result: AttemptResult | None) -> int | None:
    """Return the size of a good answer, by which the window tells a long generation from a slow backend."""
    return None if result is None else _usage(result, result.body).output


def _usage(result: AttemptResult, body: bytes) -> Usage:
    """Return the usage: of a stream as it was counted there, since the answer itself may have to do without."""
    found = usage_of(result.usage) if result.usage is not None else read_usage(body)
    return found or _NO_USAGE
