"""
What stands in spans: names and values by OpenTelemetry's conventions.  Pure.

Names of their own begin with `inference_worker.` and are listed in docs/tracing.md.

Source: https://opentelemetry.io/docs/specs/semconv/messaging/gcp-pubsub/ and
https://github.com/open-telemetry/semantic-conventions-genai/blob/main/docs/gen-ai/client-inference.md.
"""

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import msgspec
from opentelemetry.util.types import AttributeValue

from worker.ports import AttemptResult
from worker.telemetry.measures import measure

OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
    "/v1/moderations": "moderation",
    "/v1/rerank": "rerank",
    "/v1/score": "score",
    "/v1/images/generations": "image_generation",
}
"""`gen_ai.operation.name` by path; any other is `inference`.  The last four have no name of OpenTelemetry's."""
MAX_CHARS = 256
"""Of what requesters and servers choose: models, ids, messages."""
_USAGE = {
    "input": "gen_ai.usage.input_tokens",
    "output": "gen_ai.usage.output_tokens",
    "input_cached": "gen_ai.usage.cache_read.input_tokens",
    "output_reasoning": "gen_ai.usage.reasoning.output_tokens",
}


class _Choice(msgspec.Struct):
    finish_reason: Any = None


class _Answer(msgspec.Struct):
    id: Any = None
    model: Any = None
    choices: list[_Choice] = []


_decode_answer = msgspec.json.Decoder(_Answer).decode


def measured(result: AttemptResult, *, is_good: bool) -> dict[str, AttributeValue | None]:
    """Return what is known about an attempt at its end."""
    measures = measure(result, result.body if is_good else b"{}")
    answer = _read_answer(result.body) if is_good else _Answer()
    reasons = [choice.finish_reason for choice in answer.choices if isinstance(choice.finish_reason, str)]
    return {
        "http.response.status_code": result.status,
        "gen_ai.request.stream": result.streamed or None,
        "gen_ai.response.time_to_first_chunk": measures.ttft_s,
        "gen_ai.response.id": text(answer.id),
        "gen_ai.response.model": text(answer.model),
        "gen_ai.response.finish_reasons": reasons or None,
        "inference_worker.phase": None if is_good else result.phase.value,
        "inference_worker.backend_request_id": text(result.backend_request_id),
        "inference_worker.salvaged_tokens": measures.salvaged_tokens,
        **{_USAGE[kind]: count for kind, count in measures.usage.kinds()},
    }


def _read_answer(body: bytes) -> _Answer:
    try:
        return _decode_answer(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _Answer()


def text(value: Any) -> str | None:
    """Return a text of somebody else's, not too long; `None` for what is none."""
    return value[:MAX_CHARS] if isinstance(value, str) and value else None


def known(values: Mapping[str, AttributeValue | None]) -> dict[str, AttributeValue]:
    """Return the values that are there: a span has no null."""
    return {name: value for name, value in values.items() if value is not None}


def messaging(operation: str, destination: str) -> dict[str, AttributeValue]:
    """Return what every span of a Pub/Sub operation says."""
    return {
        "messaging.system": "gcp_pubsub",
        "messaging.operation.name": operation,
        "messaging.operation.type": operation,
        "messaging.destination.name": destination,
    }


def server(base_url: str) -> dict[str, AttributeValue]:
    """Return host and port of a backend."""
    parts = urlsplit(base_url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    return {"server.address": parts.hostname or "", "server.port": port}
