"""
Settings of one backend, and of the routes that lead to several.

Part of `worker.settings.schema`, which says how they are read, and imported only there.
"""

from collections.abc import Iterable
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

from worker.wire.http import is_header

Seconds = Annotated[float, Field(gt=0, le=31 * 86400)]
"""A duration in seconds; 31 days is the longest that Pub/Sub keeps a message."""

_OWN_HEADERS = {"authorization", "connection", "content-length", "host", "transfer-encoding"}
"""What the worker sets itself: the key, and what frames one request on a connection
(https://datatracker.ietf.org/doc/html/rfc9112#section-6.3)."""

StreamMode = Literal["auto", "always", "never", "as_requested"]
ContinuationMode = Literal["off", "vllm", "sglang", "prompt"]

_Names = TypeVar("_Names", bound=Iterable[str])


def refuse_own_headers(names: _Names) -> _Names:
    """
    Return the names of headers, all of which an operator or a requester may choose.

    Raises:
        ValueError: One of them is the worker's own.
    """
    for name in names:
        if name.lower() in _OWN_HEADERS:
            raise ValueError(f"{name!r} is set by the worker itself")
    return names


class Section(BaseModel):
    """Base of every section: frozen, unknown keys refused, docstrings below fields are their documentation."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _empty_is_default(cls, data: Any) -> Any:
        """Take a known key without a value for its default: a section whose lines are all commented out is `null`."""
        if not isinstance(data, dict):
            return data
        return {key: value for key, value in data.items() if value is not None or key not in cls.model_fields}


class TimeoutSettings(Section):
    """Bounds of one attempt against the backend."""

    connect_s: Seconds = 5.0
    """TCP and TLS."""
    first_byte_s: Seconds | None = None
    """From the request to the first sign of the answer: the response's headers, and of a stream the first generated
    text, since servers send headers before they begin.  Default: `total_s`, because a server that does not stream
    sends its headers only when the answer is complete."""
    idle_s: Seconds = 120.0
    """Longest silence inside an answer that has begun.  In a stream only data counts, keep-alive comments do not; set
    it above the longest thinking that the server does without showing it."""
    total_s: Seconds = 480.0
    """The whole attempt.  Must be less than `drain.grace_s`, or a rollout would cut requests."""


class WindowSettings(Section):
    """The adaptive number of requests that may run at once against one backend."""

    initial: Annotated[int, Field(ge=1, le=10_000)] = 8
    """Where it starts after a start of the process."""
    min: Annotated[int, Field(ge=1, le=10_000)] = 1
    """It never shrinks below this, however overloaded the backend is."""
    max: Annotated[int, Field(ge=1, le=10_000)] = 64
    """It never grows beyond this.  Must not exceed `pubsub.max_in_flight`."""


class BreakerSettings(Section):
    """When a backend is left alone, and how its return is noticed."""

    failures: Annotated[int, Field(ge=1, le=1000)] = 5
    """Counted failures in a row that open it.  Refused connections open it after 3; bad credentials, exhausted quota
    and a model that is still loading at once."""
    probe_interval_s: Seconds = 1.0
    """First wait before one message is let through as a probe; doubles with every failed probe."""
    max_probe_interval_s: Seconds = 4.0
    """Longest wait between probes; with the probe itself, full rate again within 5 s of the backend's recovery."""
    health_path: Annotated[str, Field(pattern=r"^/[!-~]*$")] | None = None
    """Path asked with GET every second while the breaker is open, for example `/health`; when it begins to answer
    2xx, a probe is let through at once.  It follows `base_url` without the `/v1` at its end."""


class RouteMatch(Section):
    """Which requests a route takes; every list that is given must match, by shell pattern, case-sensitive."""

    models: list[str] = []
    """Patterns for the body's `model`."""
    paths: list[str] = []
    """Patterns for the request's path."""


class BackendSettings(Section):
    """One OpenAI-compatible server, or a service in front of several."""

    base_url: str = ""
    """`http://host:port`, with a prefix if the server has one.  A prefix that ends in `/v1` is not doubled with the
    `/v1` of the request's path.  Required."""
    api_key: SecretStr | None = None
    """Sent as `Authorization: Bearer`.  Prefer `api_key_file`."""
    api_key_file: str | None = None
    """File that holds the key; read again when it changes, so that rotating a Secret needs no restart."""
    headers: dict[str, SecretStr] = {}
    """Headers added to every request; shown masked, since some servers take their key in one."""
    timeouts: TimeoutSettings = TimeoutSettings()
    window: WindowSettings = WindowSettings()
    breaker: BreakerSettings = BreakerSettings()
    stream: StreamMode = "as_requested"
    """Which chat completions, completions and responses the backend is asked to stream; the worker assembles the
    answer, and the requester gets one JSON body in any case.  `as_requested`: those whose body says `"stream": true`;
    every other body reaches the backend byte for byte.  `auto`: those whose assembled answer equals the whole one, if
    the server does not refuse; it notices a generation that hangs and measures the time to the first token.  `always`:
    also with tools, log probabilities and several choices, and a refusal is the answer.  `never`: none.  See
    docs/streaming.md."""
    continuation: ContinuationMode = "off"
    """Whether the attempt after a broken stream goes on from the text that came, instead of generating it again.
    `vllm`, `sglang`: in that server's own way, for chats and completions; `prompt`: completions only, on any server."""
    max_response_bytes: Annotated[int, Field(ge=1_000, le=1_000_000_000)] = 64_000_000
    """A longer response, of a stream all its events together, is cut off and answered as an error; bounds memory."""

    @field_validator("base_url")
    @classmethod
    def _usable_url(cls, value: str) -> str:
        if not value:
            return value
        parts = urlsplit(value)
        if parts.scheme not in {"http", "https"} or not parts.hostname or any(char.isspace() for char in value):
            raise ValueError("must be http://host[:port] or https://host[:port]")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError("must not carry credentials, a query or a fragment")
        if parts.port == 0:  # reading the port raises ValueError for what is none
            raise ValueError("must name a port from 1 to 65535")
        return value.rstrip("/")

    @field_validator("headers")
    @classmethod
    def _plain_headers(cls, value: dict[str, SecretStr]) -> dict[str, SecretStr]:
        for name, text in value.items():
            if not is_header(name, text.get_secret_value()):
                raise ValueError(f"{name!r} is not a usable header")
        return refuse_own_headers(value)


class RouteSettings(BackendSettings):
    """One of several backends."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,39}$")]
    """Stands in metrics, logs and the reply's attribute `backend`."""
    match: RouteMatch = RouteMatch()
