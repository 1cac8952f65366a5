"""
Amazon SageMaker's runtime in front of the simulated server: its two operations, its errors, its frames.  Pure.

The simulated server is the container: it is asked by what the body holds, since SageMaker passes on no path, and every
error of it comes inside a `ModelError`.  What the service itself refuses never reaches the container.

Source: https://docs.aws.amazon.com/sagemaker/latest/APIReference/API_Operations_Amazon_SageMaker_Runtime.html and
https://smithy.io/2.0/aws/amazon-eventstream.html.
"""

import json
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any
from zlib import crc32

import msgspec

from worker.emulators.openai.dialects import Answer
from worker.emulators.openai.validation import Endpoint
from worker.wire.sagemaker import (
    ERROR_STATUSES,
    ERROR_TYPE,
    FIELDS,
    MAX_REQUEST_BYTES,
    MODEL_ERROR_STATUS,
    STREAM_ACCEPT,
)

SERVICE = "sagemaker"
ACCOUNT = "123456789012"
"""Of the texts, as in AWS's examples."""
_TARGET = re.compile(r"/endpoints/([^/]+)/invocations(-response-stream)?")
_BY_KEY = (("messages", Endpoint.CHAT), ("prompt", Endpoint.COMPLETIONS), ("input", Endpoint.EMBEDDINGS))
"""How a container tells the APIs apart."""

_TEXTS: Mapping[str, str] = {
    "InternalFailure": "An internal failure occurred.",
    "ServiceUnavailable": "Service is unavailable. Try your call again.",
    "ValidationError": "1 validation error detected.",
    "ModelError": 'Received server error (500) from primary with message "oops".',
    "ModelNotReadyException": "Model is not ready for inference request.",
    "InternalDependencyException": "Your request caused an exception with an internal dependency.",
    "ThrottlingException": "Rate exceeded",
    "AccessDeniedException": (
        f"User: arn:aws:sts::{ACCOUNT}:assumed-role/worker/x is not authorized to perform: sagemaker:InvokeEndpoint"
    ),
    "ExpiredTokenException": "The security token included in the request is expired",
    "UnrecognizedClientException": "The security token included in the request is invalid.",
    "InvalidSignatureException": "The request signature we calculated does not match the one you provided.",
}
ERRORS: Mapping[str, tuple[int, str]] = {name: (status, _TEXTS[name]) for name, status in ERROR_STATUSES.items()}
"""Status and text of each error by its name."""


class FrameBreak(StrEnum):
    """What ends the frames of an answer too early."""

    NONE = "none"
    MODEL_STREAM_ERROR = "model_stream_error"
    INTERNAL_STREAM_FAILURE = "internal_stream_failure"
    ERROR_MESSAGE = "error_message"
    BAD_CRC = "bad_crc"
    CUT_FRAME = "cut_frame"
    """HTTP ends as it should, in the middle of a frame."""
    END = "end"
    """The same between two frames."""


@dataclass(frozen=True, slots=True)
class FrameFault:
    """How the frames of an answer depart from plain ones."""

    break_: FrameBreak = FrameBreak.NONE
    after_bytes: int | None = None
    """Bytes of payload before the break; None is 64."""
    error_code: str = "ModelInvocationTimeExceeded"
    """Of `model_stream_error` and `error_message`."""
    message: str = "The simulated service broke the stream."
    part_bytes: int | None = None
    """Bytes of payload in a frame at most; None makes one frame of each write."""


PLAIN_FRAMES = FrameFault()
_BREAK_AFTER = 64


@dataclass(frozen=True, slots=True)
class Invocation:
    """What the path of a request says."""

    endpoint: str
    is_streamed: bool


def invocation_of(path: str) -> Invocation | None:
    """Return the invocation that a path asks for, None for any other path."""
    match = _TARGET.fullmatch(path)
    return None if match is None else Invocation(match[1], match[2] is not None)


def path_of(body: Mapping[str, Any]) -> str:
    """Return the path of the API that a container takes a body for."""
    return next((endpoint.value for key, endpoint in _BY_KEY if key in body), "/invocations")


class ServiceRefusalError(Exception):
    """The service refuses a request; the container never sees it."""

    def __init__(self, name: str, message: str | None = None, status: int | None = None) -> None:
        """Take the name of the error; `None` stands for its usual text and status."""
        usual_status, usual_message = ERRORS.get(name, (403, ""))
        super().__init__(message or usual_message)
        self.name = name
        self.message = message or usual_message
        self.status = status or usual_status

    def answer(self) -> Answer:
        """Return it as an HTTP answer."""
        return error_answer(self.name, self.status, {"Message": self.message})


def check_invocation(invocation: Invocation, headers: Mapping[str, str], size: int, endpoints: tuple[str, ...]) -> None:
    """
    Return when the service would pass a request on.

    Args:
        invocation: Of its path.
        headers: Names in lower case.
        size: Bytes of its body.
        endpoints: Those that exist; empty for every one.

    Raises:
        ServiceRefusalError: It would not.
    """
    if size > MAX_REQUEST_BYTES:
        text = f"The request is too large: {size} bytes, {MAX_REQUEST_BYTES} are allowed."
        raise ServiceRefusalError("RequestEntityTooLargeException", text, 413)
    for name, field in FIELDS.items():
        header = STREAM_ACCEPT if name == "accept" and invocation.is_streamed else field.header
        value = headers.get(header)
        if value is not None and (fault := field.fault(value)) is not None:
            raise ServiceRefusalError("ValidationError", f"1 validation error detected: Value at '{name}' {fault}")
        if value is not None and invocation.is_streamed and not field.is_streamable:
            raise ServiceRefusalError("ValidationError", f"{name} is not supported by InvokeEndpointWithResponseStream")
    if endpoints and invocation.endpoint not in endpoints:
        text = f"Endpoint {invocation.endpoint} of account {ACCOUNT} not found."
        raise ServiceRefusalError("ValidationError", text)


def variant_of(headers: Mapping[str, str], variants: tuple[str, ...], body_key: int) -> str:
    """
    Return the variant that answers: the one that is asked for, or one by the body.

    Raises:
        ServiceRefusalError: There is no such variant.
    """
    wanted = headers.get(FIELDS["target_variant"].header)
    if wanted is None:
        return variants[body_key % len(variants)]
    if wanted not in variants:
        raise ServiceRefusalError("ValidationError", f"Variant {wanted} not found for Request")
    return wanted


def error_answer(name: str, status: int, fields: Mapping[str, Any]) -> Answer:
    """Return an error of the service."""
    kind = f"{name}:http://internal.amazon.com/coral/com.amazonaws.sagemaker.runtime/"
    return Answer(status, msgspec.json.encode(fields), headers={ERROR_TYPE: kind})


def model_error(status: int, body: bytes, variant: str) -> Answer:
    """Return a container's error as the service passes it on."""
    text = body.decode("utf-8", "replace")
    whose = "server" if status >= 500 else "client"  # noqa: PLR2004
    fields = {
        "ErrorCode": f"{whose.upper()}_ERROR_FROM_MODEL",
        "LogStreamArn": f"arn:aws:logs:us-east-1:{ACCOUNT}:log-group:/aws/sagemaker/Endpoints/simulated",
        "Message": f'Received {whose} error ({status}) from {variant} with message "{text[:512]}".',
        "OriginalMessage": text,
        "OriginalStatusCode": status,
    }
    return error_answer("ModelError", MODEL_ERROR_STATUS, fields)


def frame(headers: Mapping[str, str], payload: bytes = b"") -> bytes:
    """Return one message of an event stream; all headers are texts."""
    block = b"".join(
        bytes((len(name),)) + name.encode() + b"\x07" + struct.pack(">H", len(value.encode())) + value.encode()
        for name, value in headers.items()
    )
    prelude = struct.pack(">II", 16 + len(block) + len(payload), len(block))
    message = prelude + struct.pack(">I", crc32(prelude)) + block + payload
    return message + struct.pack(">I", crc32(message))


_PART = {":event-type": "PayloadPart", ":content-type": "application/octet-stream", ":message-type": "event"}


class Framer:
    """
    Puts the body of one answer into frames, up to its break.

    Attributes:
        is_over: The break has come: nothing follows.
    """

    def __init__(self, fault: FrameFault) -> None:
        """Break as `fault` says."""
        self._fault = fault
        after = _BREAK_AFTER if fault.after_bytes is None else fault.after_bytes
        self._left = None if fault.break_ is FrameBreak.NONE else after
        self.is_over = False

    def feed(self, data: bytes) -> bytes:
        """Return the frames of a part of the body."""
        return b"".join(self._frames(data))

    def _frames(self, data: bytes) -> Iterator[bytes]:
        if self.is_over:
            return
        breaks_here = self._left is not None and len(data) >= self._left
        if self._left is not None:
            data = data[: self._left]
            self._left -= len(data)
        size = self._fault.part_bytes or len(data) or 1
        for at in range(0, len(data), size):
            yield frame(_PART, data[at : at + size])
        if breaks_here:
            self.is_over = True
            yield self._broken()

    def _broken(self) -> bytes:
        fault = self._fault
        json_headers = {":content-type": "application/json", ":message-type": "exception"}
        match fault.break_:
            case FrameBreak.MODEL_STREAM_ERROR:
                body = {"ErrorCode": fault.error_code, "Message": fault.message}
                return frame({":exception-type": "ModelStreamError", **json_headers}, json.dumps(body).encode())
            case FrameBreak.INTERNAL_STREAM_FAILURE:
                body = {"Message": fault.message}
                return frame({":exception-type": "InternalStreamFailure", **json_headers}, json.dumps(body).encode())
            case FrameBreak.ERROR_MESSAGE:
                return frame(
                    {":message-type": "error", ":error-code": fault.error_code, ":error-message": fault.message}
                )
            case FrameBreak.BAD_CRC:
                good = frame(_PART, b"x")
                return good[:-1] + bytes((good[-1] ^ 1,))
            case FrameBreak.CUT_FRAME:
                return frame(_PART, b"x" * 40)[:-20]
        return b""
