"""
What requests and replies look like: the reply objects, and the reading of a request to create a batch.

The objects are those of https://github.com/openai/openai-openapi; each optional field is always there, `null` when it
is unset, as in OpenAI's own replies.  Fields below "extensions" are ours: the official client takes them, also with
strict validation, as attributes.  `worker.batches.api.openapi` describes these same classes.
"""

import hashlib
import math
from collections.abc import Collection, Mapping
from typing import Any, Literal

import msgspec

from worker.batches.api.errors import (
    ApiError,
    invalid_value,
    missing,
    out_of_range,
    unreadable_json,
    wrong_type,
)

WINDOW = "24h"
ANCHOR = "created_at"
MIN_EXPIRY_S = 3600
MAX_EXPIRY_S = 30 * 86_400
MAX_METADATA_PAIRS = 16
MAX_METADATA_KEY_CHARS = 64
MAX_METADATA_VALUE_CHARS = 512
MAX_KEY_CHARS = 255
"""Of an idempotency key."""

BatchStatus = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
]


class FileObject(msgspec.Struct, kw_only=True):
    """A file."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    """Unix seconds, as all times."""
    expires_at: int | None
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"
    """Deprecated, and required by clients."""
    status_details: str | None = None


class FileDeleted(msgspec.Struct, kw_only=True):
    """Reply to the deletion of a file."""

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class FileList(msgspec.Struct, kw_only=True):
    """A page of files."""

    object: Literal["list"] = "list"
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class BatchError(msgspec.Struct, kw_only=True):
    """Why a batch failed in validation."""

    code: str
    message: str
    param: str | None
    line: int | None
    """Number of the line in the file, from 1."""


class BatchErrors(msgspec.Struct, kw_only=True):
    """All reasons why a batch failed in validation, ordered by line."""

    object: Literal["list"] = "list"
    data: list[BatchError]


class RequestCounts(msgspec.Struct, kw_only=True):
    """Lines of a batch; those that a cancelled or expired batch did not run are in `failed`."""

    total: int
    completed: int
    failed: int


class InputTokensDetails(msgspec.Struct, kw_only=True):
    """Part of `usage`."""

    cached_tokens: int


class OutputTokensDetails(msgspec.Struct, kw_only=True):
    """Part of `usage`."""

    reasoning_tokens: int


class BatchUsage(msgspec.Struct, kw_only=True):
    """Sum over the lines of the output file."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class Progress(msgspec.Struct, kw_only=True):
    """How far a batch is; an extension."""

    published: int
    """Lines that were sent to the request topic."""
    in_flight: int
    """Of these, lines without a result so far."""
    rate_per_s: float | None
    """Results in a second, lately; `null` while none are known."""
    eta_s: int | None
    """Seconds until the last line at that rate; `null` when there is no rate."""
    waiting_for: str | None
    """Why the batch does not go on, if it does not."""


class Failure(msgspec.Struct, kw_only=True):
    """Lines that failed with one code; an extension."""

    code: str
    count: int
    example_line: int
    example_message: str


class BatchObject(msgspec.Struct, kw_only=True):
    """A batch."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    model: str | None
    """The one model of the input; `null` when it names several."""
    errors: BatchErrors | None
    input_file_id: str
    completion_window: str
    status: BatchStatus
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int | None
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    usage: BatchUsage | None
    metadata: dict[str, str] | None
    progress: Progress | None = None
    """Extension: while the batch is in progress."""
    failures: list[Failure] = msgspec.field(default_factory=list)
    """Extension: what failed, by code, the most frequent first."""
    retry_of: str | None = None
    """Extension: the batch whose failed lines this one repeats."""


class BatchList(msgspec.Struct, kw_only=True):
    """A page of batches, newest first."""

    object: Literal["list"] = "list"
    data: list[BatchObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class ExpiresAfter(msgspec.Struct, kw_only=True, frozen=True):
    """When a file expires."""

    anchor: Literal["created_at"] = "created_at"
    seconds: int
    """From `MIN_EXPIRY_S` to `MAX_EXPIRY_S`."""


class CreateBatch(msgspec.Struct, kw_only=True, frozen=True):
    """What a request to create a batch asks for."""

    input_file_id: str
    endpoint: str
    completion_window: str
    metadata: dict[str, str] | None = None
    output_expires_after: ExpiresAfter | None = None
    idempotency_key: str | None = None

    @property
    def digest(self) -> str:
        """What two requests with one idempotency key must have in common; the order of the metadata does not count."""
        content = msgspec.structs.replace(self, idempotency_key=None)
        return hashlib.sha256(msgspec.json.encode(content, order="sorted")).hexdigest()


class ErrorDetail(msgspec.Struct, kw_only=True):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorObject(msgspec.Struct, kw_only=True):
    """Every reply that is not a success."""

    error: ErrorDetail


def read_object(body: bytes) -> dict[str, Any]:
    """
    Return a request's body, which must be a JSON object.

    Raises:
        ApiError: 400; it is not.
    """
    try:
        found = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError, ValueError):  # not JSON, nested too deeply, not UTF-8
        raise unreadable_json() from None
    if not isinstance(found, dict):
        raise unreadable_json()
    return found


def read_create_batch(document: Mapping[str, Any], key_header: str | None, endpoints: Collection[str]) -> CreateBatch:
    """
    Return what a request to create a batch asks for; unknown fields are ignored.

    Args:
        document: The request's body.
        key_header: Its header `Idempotency-Key`.
        endpoints: Those that are served here, in the order of the message.

    Raises:
        ApiError: 400; names the first field at fault.
    """
    input_file_id = _required_text(document, "input_file_id")
    endpoint = _required_text(document, "endpoint")
    if endpoint not in endpoints:
        raise invalid_value("endpoint", endpoint, tuple(endpoints))
    window = _required_text(document, "completion_window")
    if window != WINDOW:
        raise invalid_value("completion_window", window, (WINDOW,))
    return CreateBatch(
        input_file_id=input_file_id,
        endpoint=endpoint,
        completion_window=window,
        metadata=read_metadata(document.get("metadata")),
        output_expires_after=_read_expires_after(document.get("output_expires_after")),
        idempotency_key=read_idempotency_key(document.get("idempotency_key"), key_header),
    )


def read_metadata(value: object) -> dict[str, str] | None:
    """
    Return the metadata of a batch; `None` where there are none, which is not the same as `{}`.

    Raises:
        ApiError: 400; too many pairs, too long, or a value that is no string.
    """
    if value is None:
        return None
    if not isinstance(value, dict):
        raise wrong_type("metadata", "an object", value)
    if len(value) > MAX_METADATA_PAIRS:
        raise ApiError(
            400,
            f"Invalid 'metadata': too many properties. Expected an object with at most {MAX_METADATA_PAIRS} "
            f"properties, but got an object with {len(value)} properties instead.",
            code="object_above_max_properties",
            param="metadata",
        )
    for key, text in value.items():
        if len(key) > MAX_METADATA_KEY_CHARS:
            raise _too_long("metadata", "a key", MAX_METADATA_KEY_CHARS, len(key))
        if not isinstance(text, str):
            raise wrong_type(f"metadata.{key}", "a string", text)
        if len(text) > MAX_METADATA_VALUE_CHARS:
            raise _too_long(f"metadata.{key}", "a string", MAX_METADATA_VALUE_CHARS, len(text))
        if "\0" in key or "\0" in text:
            raise _has_nul("metadata")
    return value


def read_expiry(anchor: object, seconds: object, param: str) -> ExpiresAfter:
    """
    Return when a file expires.

    Args:
        anchor: `None` when absent.
        seconds: `None` when absent.
        param: Name of the whole in messages, for example `expires_after`.

    Raises:
        ApiError: 400; a part is absent or cannot have this value.
    """
    if anchor is None:
        raise missing(f"{param}.anchor")
    if anchor != ANCHOR:
        raise invalid_value(f"{param}.anchor", anchor, (ANCHOR,))
    if seconds is None:
        raise missing(f"{param}.seconds")
    if isinstance(seconds, float) and math.isfinite(seconds) and seconds.is_integer():
        seconds = int(seconds)
    if not isinstance(seconds, int) or isinstance(seconds, bool):
        raise wrong_type(f"{param}.seconds", "an integer", seconds)
    if not MIN_EXPIRY_S <= seconds <= MAX_EXPIRY_S:
        raise out_of_range(f"{param}.seconds", seconds, MIN_EXPIRY_S, MAX_EXPIRY_S)
    return ExpiresAfter(seconds=seconds)


def read_idempotency_key(field: object, header: str | None) -> str | None:
    """
    Return the idempotency key of a request, which may stand in its body, in a header, or in both.

    Raises:
        ApiError: 400; they differ, or it is empty, too long or no string.
    """
    if field is not None and not isinstance(field, str):
        raise wrong_type("idempotency_key", "a string", field)
    if field is not None and header is not None and field != header:
        raise ApiError(
            400,
            "The field idempotency_key and the header Idempotency-Key have different values.",
            code="idempotency_key_mismatch",
            param="idempotency_key",
        )
    key = field if field is not None else header
    if key is None:
        return None
    if not key:
        raise ApiError(400, "Invalid 'idempotency_key': it is empty.", code="invalid_value", param="idempotency_key")
    if len(key) > MAX_KEY_CHARS:
        raise _too_long("idempotency_key", "a string", MAX_KEY_CHARS, len(key))
    if "\0" in key:
        raise _has_nul("idempotency_key")
    return key


def _read_expires_after(value: object) -> ExpiresAfter | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise wrong_type("output_expires_after", "an object", value)
    return read_expiry(value.get("anchor"), value.get("seconds"), "output_expires_after")


def _required_text(document: Mapping[str, Any], name: str) -> str:
    if name not in document:
        raise missing(name)
    value = document[name]
    if not isinstance(value, str):
        raise wrong_type(name, "a string", value)
    return value


def _too_long(param: str, what: str, limit: int, length: int) -> ApiError:
    return ApiError(
        400,
        f"Invalid '{param}': expected {what} with at most {limit} characters, but got one with {length} instead.",
        code="string_above_max_length",
        param=param,
    )


def _has_nul(param: str) -> ApiError:
    return ApiError(400, f"Invalid '{param}': the character U+0000 is not allowed.", code="invalid_value", param=param)
