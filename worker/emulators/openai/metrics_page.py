"""
What an engine says about its load on `GET /metrics`: the few metrics of vLLM, or of SGLang, that others decide by.

Source: https://docs.vllm.ai/en/stable/usage/metrics/, https://docs.sglang.io/references/production_metrics.html
"""

from typing import NamedTuple


class EngineLoad(NamedTuple):
    """What the simulated server does now."""

    running: int
    """Requests in service."""
    waiting: int
    """Requests in the queue."""
    cache_share: float
    """Share of the memory for keys and values that is in use, 0 to 1."""
    generated_tokens: int
    """Since the start or the last reset; so are the next two."""
    prompt_tokens: int
    cached_prompt_tokens: int


CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_NAMES = {
    "vllm": (
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "vllm:generation_tokens_total",
        "vllm:prefix_cache_queries_total",
        "vllm:prefix_cache_hits_total",
    ),
    "sglang": (
        "sglang:num_running_reqs",
        "sglang:num_queue_reqs",
        "sglang:token_usage",
        "sglang:generation_tokens_total",
        "sglang:prompt_tokens_total",
        "sglang:cached_tokens_total",
    ),
}
_KINDS = ("gauge", "gauge", "gauge", "counter", "counter", "counter")
_MEANINGS = (
    "Requests in service.",
    "Requests that wait.",
    "Share of the memory for keys and values in use.",
    "Tokens generated.",
    "Tokens of prompts.",
    "Tokens of prompts that were found in the cache.",
)


def metrics_page(dialect: str, model: str, load: EngineLoad) -> str:
    """
    Return the page in Prometheus' text form.

    Args:
        dialect: `sglang` has SGLang's names, every other one vLLM's.
        model: Value of the label `model_name`.
        load: What it shows.
    """
    label = model.replace("\\", "\\\\").replace('"', '\\"')
    lines = []
    for name, kind, meaning, value in zip(_NAMES.get(dialect, _NAMES["vllm"]), _KINDS, _MEANINGS, load, strict=True):
        lines += [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}", f'{name}{{model_name="{label}"}} {value}']
    return "\n".join(lines) + "\n"
