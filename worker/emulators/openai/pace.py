"""When the first and the last token of an answer are due."""

from collections.abc import Callable
from dataclasses import dataclass

from worker.emulators.openai.dice import Dice
from worker.emulators.openai.options import SimOptions


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds since a request entered service."""

    first_s: float
    total_s: float

    def due_s(self, tokens: int, of: int) -> float:
        """Return when `tokens` of `of` tokens have been generated; the first byte is never before `first_s`."""
        return self.first_s + (self.total_s - self.first_s) * (tokens / of if of else 1.0)


def pace(options: SimOptions, tokens: int, roll: Callable[[], Dice], factor: float) -> Pace:
    """
    Return the pace of one answer.

    Latency is the least time to a whole answer; a generation speed adds its time to the first token.  The same holds
    streamed and not, so that a rehearsal can compare the two.

    Args:
        options: The distributions.
        tokens: Length of the answer.
        roll: Makes what the draws come from: the request's body and how often it was seen. Not asked without latency.
        factor: By what everything takes longer because of the crowd.
    """
    if options.latency.is_zero and options.ttft is None and options.tokens_per_s is None:
        return Pace(0.0, 0.0)
    luck = roll()
    latency_s = options.latency.draw(luck.uniform("latency"))
    first_s = latency_s if options.ttft is None else options.ttft.draw(luck.uniform("ttft"))
    generation_s = tokens / options.tokens_per_s if options.tokens_per_s else 0.0
    return Pace(first_s * factor, max(latency_s, first_s + generation_s) * factor)
