"""
Amazon SageMaker's runtime API as far as it is data: the fields of its two operations, and in which headers they stand.

`InvokeEndpoint` answers with one body, `InvokeEndpointWithResponseStream` with frames of an event stream.  Both take
the model's input as the body and everything else in headers.  The container behind the endpoint sees the body, the
content type, the custom attributes, and nothing else of a request.

Source: https://docs.aws.amazon.com/sagemaker/latest/APIReference/API_runtime_InvokeEndpoint.html and
API_runtime_InvokeEndpointWithResponseStream.html; a test compares the tables with botocore's model of the service.
"""

import re
from collections.abc import Mapping

import msgspec

MAX_REQUEST_BYTES = 6_291_456
"""Of the body of a request (`BodyBlob`); the service refuses more."""
EVENT_STREAM = "application/vnd.amazon.eventstream"
"""Content type of an answer in frames."""
STREAM_CONTENT_TYPE = "x-amzn-sagemaker-content-type"
"""Header with the content type of what is inside the frames."""
ERROR_TYPE = "x-amzn-errortype"
"""Header with the name of an error."""
MODEL_ERROR_STATUS = 424
"""Of `ModelError`, which has the container's own status inside."""

_NAME = r"[a-zA-Z0-9](?:-*[a-zA-Z0-9])*"
_VISIBLE = r"[!-~](?:[ -~]*[!-~])?"
"""Spaces at either end would be lost on the way: they are no part of a header's value (RFC 9110, section 5.5)."""


class Field(msgspec.Struct, frozen=True, kw_only=True):
    """One field of a request."""

    header: str
    """In lower case."""
    pattern: str
    """Which the whole value must match."""
    max_chars: int
    says: str
    """What the pattern allows, to end a sentence that begins with the name of the field."""
    is_streamable: bool = True
    """`InvokeEndpointWithResponseStream` has it too."""
    is_settable: bool = True
    """A message may set it where the operator allows that; the other ones concern how the answer is read."""

    def fault(self, value: str) -> str | None:
        """Return what is wrong with a value, `None` for a good one; the value itself is not quoted."""
        if len(value) > self.max_chars:
            return f"is longer than {self.max_chars} characters ({len(value)})"
        if re.fullmatch(self.pattern, value, re.ASCII) is None:
            return f"must be {self.says}"
        return None


_WORDS = "letters, digits and hyphens"
_TEXT = "visible ASCII characters with spaces only between them"

FIELDS: Mapping[str, Field] = {
    "content_type": Field(header="content-type", pattern=_VISIBLE, max_chars=1024, says=_TEXT, is_settable=False),
    "accept": Field(header="accept", pattern=_VISIBLE, max_chars=1024, says=_TEXT, is_settable=False),
    "custom_attributes": Field(
        header="x-amzn-sagemaker-custom-attributes", pattern=_VISIBLE, max_chars=1024, says=_TEXT
    ),
    "target_variant": Field(header="x-amzn-sagemaker-target-variant", pattern=_NAME, max_chars=63, says=_WORDS),
    "target_model": Field(
        header="x-amzn-sagemaker-target-model", pattern=_VISIBLE, max_chars=1024, says=_TEXT, is_streamable=False
    ),
    "target_container_hostname": Field(
        header="x-amzn-sagemaker-target-container-hostname", pattern=_NAME, max_chars=63, says=_WORDS
    ),
    "inference_component_name": Field(
        header="x-amzn-sagemaker-inference-component", pattern=_NAME, max_chars=63, says=_WORDS
    ),
    "session_id": Field(
        header="x-amzn-sagemaker-session-id", pattern=f"NEW_SESSION|{_NAME}", max_chars=256, says=_WORDS
    ),
    "inference_id": Field(header="x-amzn-sagemaker-inference-id", pattern=_VISIBLE, max_chars=64, says=_TEXT),
    "prefix_aware_id": Field(header="x-amzn-sagemaker-prefix-aware-id", pattern=_VISIBLE, max_chars=64, says=_TEXT),
    "enable_explanations": Field(
        header="x-amzn-sagemaker-enable-explanations",
        pattern=_VISIBLE,
        max_chars=64,
        says=_TEXT,
        is_streamable=False,
    ),
}
"""By the name of the setting."""

STREAM_ACCEPT = "x-amzn-sagemaker-accept"
"""Header of `accept` in `InvokeEndpointWithResponseStream`."""

SETTABLE: Mapping[str, str] = {field.header: name for name, field in FIELDS.items() if field.is_settable}
"""Headers by which a message may set a field, with the name of the field."""

ERROR_STATUSES: Mapping[str, int] = {
    "InternalFailure": 500,
    "ServiceUnavailable": 503,
    "ValidationError": 400,
    "ModelError": MODEL_ERROR_STATUS,
    "ModelNotReadyException": 429,
    "InternalDependencyException": 530,
    "ThrottlingException": 400,
    "AccessDeniedException": 403,
    "ExpiredTokenException": 403,
    "UnrecognizedClientException": 403,
    "InvalidSignatureException": 403,
}
"""HTTP status of each error by its name; the last five are of every service of AWS."""
STREAM_ERRORS = ("ModelStreamError", "InternalStreamFailure")
"""Exceptions inside a stream."""
STREAM_ERROR_CODES = ("ModelInvocationTimeExceeded", "StreamBroken")
"""Codes of a `ModelStreamError`."""

VARIANT = "sagemaker_variant"
REPLY_ATTRIBUTES: Mapping[str, str] = {
    "x-amzn-sagemaker-custom-attributes": "sagemaker_custom_attributes",
    "x-amzn-invoked-production-variant": VARIANT,
    "x-amzn-sagemaker-new-session-id": "sagemaker_new_session_id",
    "x-amzn-sagemaker-closed-session-id": "sagemaker_closed_session_id",
}
"""Headers of a response with the attributes of the reply that they become."""
CONTENT_TYPE_ATTRIBUTE = "sagemaker_content_type"
"""Attribute with the content type of what the container answered."""


def public_address(region: str) -> str:
    """Return the base URL of the service in a region."""
    suffix = ".cn" if region.startswith("cn-") else ""
    return f"https://runtime.sagemaker.{region}.amazonaws.com{suffix}"
