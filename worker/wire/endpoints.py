"""
The APIs that this program knows, and which of them a path belongs to: the only table of paths.

A path counts by its end, so that any prefix may stand before it (Azure's deployments, a gateway's tenant), and any
query behind it.  What is not in the table is sent all the same: its answer has to be a JSON object and nothing more, it
is not streamed, and its spans say `inference`.  Which paths are allowed is a setting.

Source: https://platform.openai.com/docs/api-reference for the shapes; vLLM, SGLang and Jina for `rerank` and `score`;
https://opentelemetry.io/docs/specs/semconv/registry/attributes/gen-ai/#gen-ai-operation-name for the operations, of
which the last six have no name.
"""

from functools import lru_cache

import msgspec


class Endpoint(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """One API; there is one object for each, compared by identity."""

    name: str
    """The end of its paths."""
    operation: str
    """`gen_ai.operation.name` of its spans."""
    input: str | None = None
    """Key of the request that holds what is asked about."""
    output: str | None = None
    """Key of the answer that holds the list of results; an answer without any is none."""
    is_streamable: bool = False
    """Whether its answers can be streamed and assembled again."""
    counts_on_request: bool = False
    """Whether a stream tells the usage only where `stream_options.include_usage` asks for it."""


CHAT = Endpoint(
    name="chat/completions",
    operation="chat",
    input="messages",
    output="choices",
    is_streamable=True,
    counts_on_request=True,
)
COMPLETIONS = Endpoint(
    name="completions",
    operation="text_completion",
    input="prompt",
    output="choices",
    is_streamable=True,
    counts_on_request=True,
)
RESPONSES = Endpoint(name="responses", operation="chat", input="input", output="output", is_streamable=True)
EMBEDDINGS = Endpoint(name="embeddings", operation="embeddings", input="input", output="data")

ENDPOINTS = (
    CHAT,  # before completions: its name ends like theirs
    COMPLETIONS,
    RESPONSES,
    EMBEDDINGS,
    Endpoint(name="moderations", operation="moderation"),
    Endpoint(name="rerank", operation="rerank"),
    Endpoint(name="score", operation="score"),
    Endpoint(name="images/generations", operation="image_generation"),
    Endpoint(name="images/edits", operation="image_edit"),
    Endpoint(name="videos", operation="video_generation"),
)
OTHER = Endpoint(name="other", operation="inference")
"""Any API that is not in the table."""


@lru_cache(maxsize=1024)
def endpoint_of(path: str) -> Endpoint:
    """Return the API of a request's path; `OTHER` for one that is not in the table."""
    path = path.partition("?")[0].rstrip("/")
    return next((each for each in ENDPOINTS if path.endswith("/" + each.name)), OTHER)
