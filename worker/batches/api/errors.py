"""
Errors as OpenAI's clients expect them: every reply that is not a success carries the same JSON object.

`{"error": {"message", "type", "param", "code"}}`, all four keys, whatever went wrong, also for an unknown route, a
wrong method or bytes that are no HTTP (`worker.batches.api.server`).  The type follows from the status.  Version 3 of
the official Python client shows nothing but the message, so a code always stands in the message as well.

Sources: https://github.com/openai/openai-openapi (`ErrorResponse`); the texts marked in
`docs/batches.md` are those that clients search for.
"""

import secrets
from collections.abc import Mapping
from http import HTTPStatus

import msgspec

from worker.errors import WorkerError

_TYPES: Mapping[int, str] = {
    HTTPStatus.UNAUTHORIZED: "authentication_error",
    HTTPStatus.FORBIDDEN: "permission_error",
    HTTPStatus.TOO_MANY_REQUESTS: "rate_limit_error",
}
_TYPE_NAMES: Mapping[type, str] = {
    type(None): "null",
    bool: "a boolean",
    int: "an integer",
    float: "a decimal",
    str: "a string",
    list: "an array",
}
_SERVER_ERROR = "server_error"
_INVALID_REQUEST = "invalid_request_error"
STORE_RETRY_AFTER_S = 5
"""A database restarts in seconds; the client's own limit for a hint is 120 s."""
MODELS_RETRY_AFTER_S = 10
MAX_ECHO_CHARS = 100
"""Of a value that a message repeats."""


class ApiError(WorkerError):
    """
    A request that is answered with an error; nothing was created or changed by it.

    Args:
        status: HTTP status, from 400.
        message: For the requester; a code that it does not contain is added to it.
        code: OpenAI's word for the fault, or `None`.
        param: The parameter at fault, or `None`.
        headers: Further headers of the reply.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.status = status
        self.message = message if code is None or code in message else f"{message} ({code})"
        self.code = code
        self.param = param
        self.headers = dict(headers or {})
        if status == HTTPStatus.CONFLICT:  # the client would send a 409 three times
            self.headers["x-should-retry"] = "false"
        super().__init__(self.message)

    @property
    def body(self) -> bytes:
        """The reply's body."""
        return error_body(self.status, self.message, code=self.code, param=self.param)


def new_request_id() -> str:
    """Return the `x-request-id` of a reply; the log has it as well."""
    return f"req_{secrets.token_hex(16)}"


def error_body(status: int, message: str, *, code: str | None = None, param: str | None = None) -> bytes:
    """Return the JSON of an error."""
    kind = _TYPES.get(status) or (_SERVER_ERROR if status >= HTTPStatus.INTERNAL_SERVER_ERROR else _INVALID_REQUEST)
    return msgspec.json.encode({"error": {"message": message, "type": kind, "param": param, "code": code}})


def shown(value: object) -> str:
    """Return a value of a request for a message: quoted, cut to a readable length."""
    text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    text = text.encode("utf-8", "replace").decode()
    return repr(text if len(text) <= MAX_ECHO_CHARS else text[:MAX_ECHO_CHARS] + "…")


def unknown_route(method: str, path: str) -> ApiError:
    """No route has this path."""
    return ApiError(HTTPStatus.NOT_FOUND, f"Invalid URL ({method} {shown(path)})")


def wrong_method(method: str, path: str, allowed: str) -> ApiError:
    """A route has this path, but not for this method."""
    return ApiError(
        HTTPStatus.METHOD_NOT_ALLOWED,
        f"Not allowed to {method} on {path}; allowed: {allowed}",
        headers={"allow": allowed},
    )


def no_batch(batch_id: str) -> ApiError:
    """The tenant has no such batch."""
    return ApiError(HTTPStatus.NOT_FOUND, f"No batch found with id {shown(batch_id)}.")


def no_file(file_id: str) -> ApiError:
    """The tenant has no such file, or it is deleted or expired."""
    return ApiError(HTTPStatus.NOT_FOUND, f"No such File object: {shown(file_id)}", param="id")


def no_model(model: str) -> ApiError:
    """The backend's list does not have this model."""
    return ApiError(
        HTTPStatus.NOT_FOUND, f"The model {shown(model)} does not exist.", code="model_not_found", param="model"
    )


def missing(param: str) -> ApiError:
    """A required parameter is absent."""
    return ApiError(
        HTTPStatus.BAD_REQUEST,
        f"Missing required parameter: '{param}'.",
        code="missing_required_parameter",
        param=param,
    )


def wrong_type(param: str, expected: str, value: object) -> ApiError:
    """A parameter has a type that it cannot have; `expected` comes with its article."""
    return ApiError(
        HTTPStatus.BAD_REQUEST,
        f"Invalid type for '{param}': expected {expected}, but got {_type_name(value)} instead.",
        code="invalid_type",
        param=param,
    )


def invalid_value(param: str, value: object, supported: tuple[str, ...]) -> ApiError:
    """A parameter has none of the values it can have."""
    values = ", ".join(f"'{each}'" for each in supported)
    return ApiError(
        HTTPStatus.BAD_REQUEST,
        f"Invalid value for {param}: {shown(value)}. Supported values are: {values}.",
        code="invalid_value",
        param=param,
    )


def out_of_range(param: str, value: int, low: int, high: int) -> ApiError:
    """An integer is below or above what it can be."""
    code = "integer_below_min_value" if value < low else "integer_above_max_value"
    return ApiError(
        HTTPStatus.BAD_REQUEST,
        f"Invalid '{param}': expected an integer from {low} to {high}, but got {value} instead.",
        code=code,
        param=param,
    )


def unreadable_json() -> ApiError:
    """The body is no JSON."""
    return ApiError(
        HTTPStatus.BAD_REQUEST,
        "We could not parse the JSON body of your request. The API expects a JSON object, in UTF-8.",
    )


def body_too_large(max_bytes: int) -> ApiError:
    """A body that is no upload exceeds what any such body needs."""
    return ApiError(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        f"The body of the request is larger than {max_bytes:,} bytes.",
        code="request_too_large",
    )


def headers_too_large(max_bytes: int) -> ApiError:
    """The request line and the headers exceed what any request needs."""
    return ApiError(
        HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
        f"The headers of the request are larger than {max_bytes:,} bytes.",
        code="headers_too_large",
        headers={"connection": "close"},
    )


def too_many(what: str, retry_after_s: float, *, code: str = "rate_limit_exceeded") -> ApiError:
    """A limit of the tenant is reached; the hint is whole seconds, from 1."""
    seconds = max(1, -int(-retry_after_s // 1))
    return ApiError(
        HTTPStatus.TOO_MANY_REQUESTS,
        f"{what} Please try again in {seconds} s.",
        code=code,
        headers={"retry-after": str(seconds)},
    )


def unavailable(what: str, retry_after_s: int = STORE_RETRY_AFTER_S) -> ApiError:
    """A part that the request needs is away; the same request may work in a moment."""
    return ApiError(
        HTTPStatus.SERVICE_UNAVAILABLE,
        f"{what} Please try again in {retry_after_s} s.",
        code="service_unavailable",
        headers={"retry-after": str(retry_after_s)},
    )


def models_away() -> ApiError:
    """The list of models is asked for while the backend is away."""
    return unavailable("The model server is not available.", MODELS_RETRY_AFTER_S)


def unexpected(request_id: str) -> ApiError:
    """A fault of ours, which the log explains under the request's id."""
    return ApiError(
        HTTPStatus.INTERNAL_SERVER_ERROR,
        f"The server had an error while processing your request (request id {request_id}).",
    )


def _type_name(value: object) -> str:
    """Return JSON's name of a value's type, with its article."""
    return _TYPE_NAMES.get(type(value), "an object")
