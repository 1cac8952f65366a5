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

from worker.ports import Draft
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


def measure(draft: Draft, body: bytes) -> Measures:
    """
    Return the measures of an attempt.

    Args:
        draft: Of the attempt.
        body: Where an answer that was not streamed tells its usage; `{}` for an error.
    """
    usage = _usage(draft, body)
    ttft_s = None if draft.first_token_at is None else draft.first_token_at - draft.started
    ttlt_s = None if draft.ended is None else draft.ended - draft.started
    tpot_s = None
    if ttft_s is not None and ttlt_s is not None and usage.output is not None and usage.output > 1:
        tpot_s = (ttlt_s - ttft_s) / (usage.output - 1)
    return Measures(
        ttft_s=ttft_s,
        ttlt_s=ttlt_s,
        tpot_s=tpot_s,
        usage=usage,
        streamed=draft.streamed,
        salvaged_tokens=draft.salvaged_tokens,
    )


def output_tokens(draft: Draft | None) -> int | None:
    """Return the size of a good answer, by which the window tells a long generation from a slow backend."""
    return None if draft is None else _usage(draft, draft.body).output


def _usage(draft: Draft, body: bytes) -> Usage:
    """Return the usage: of a stream as it was counted there, since the answer itself may have to do without."""
    found = usage_of(draft.usage) if draft.usage is not None else read_usage(body)
    return found or _NO_USAGE
