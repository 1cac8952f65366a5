"""
The routes of the API, each with what it takes and answers; the OpenAPI document and its page are made of this table.

`worker.batches.api.app` binds a handler to every row and fails to start when one is missing, so that the document
describes what is served.  Shapes come from the classes in `worker.batches.api.schemas`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import msgspec

from worker.batches.api import schemas

VERSION = "3.1.0"


class Parameter(NamedTuple):
    """A parameter of a path, query or header."""

    name: str
    place: str
    """`path`, `query` or `header`."""
    shape: Mapping[str, Any]
    description: str


class Operation(NamedTuple):
    """A method of a path."""

    method: str
    path: str
    name: str
    """Of the handler; unique."""
    summary: str
    reply: type[msgspec.Struct] | None
    """`None`: described by `summary` alone."""
    parameters: tuple[Parameter, ...] = ()
    body: Mapping[str, Any] | None = None
    """Content of the request, by media type."""
    errors: tuple[int, ...] = ()
    """Statuses beyond those of every operation."""


_FILE_ID = Parameter("file_id", "path", {"type": "string"}, "Id of a file.")
_BATCH_ID = Parameter("batch_id", "path", {"type": "string"}, "Id of a batch.")
_AFTER = Parameter(
    "after", "query", {"type": "string"}, "The page begins after the object with this id, which may be gone."
)
_KEY = Parameter(
    "Idempotency-Key",
    "header",
    {"type": "string", "maxLength": schemas.MAX_KEY_CHARS},
    "A second request with the same key returns the first one's batch.",
)
_EXPIRY = {
    "type": "object",
    "required": ["anchor", "seconds"],
    "properties": {
        "anchor": {"const": schemas.ANCHOR},
        "seconds": {"type": "integer", "minimum": schemas.MIN_EXPIRY_S, "maximum": schemas.MAX_EXPIRY_S},
    },
}
_UPLOAD = {
    "multipart/form-data": {
        "schema": {
            "type": "object",
            "required": ["file", "purpose"],
            "properties": {
                "file": {"type": "string", "format": "binary", "description": "JSONL, one request a line."},
                "purpose": {"const": "batch"},
                "expires_after[anchor]": {"const": schemas.ANCHOR},
                "expires_after[seconds]": _EXPIRY["properties"]["seconds"],  # type: ignore[index]
            },
        }
    }
}
_CREATE = {
    "application/json": {
        "schema": {
            "type": "object",
            "required": ["input_file_id", "endpoint", "completion_window"],
            "properties": {
                "input_file_id": {"type": "string"},
                "endpoint": {"type": "string"},
                "completion_window": {"const": schemas.WINDOW},
                "metadata": {
                    "type": ["object", "null"],
                    "maxProperties": schemas.MAX_METADATA_PAIRS,
                    "additionalProperties": {"type": "string", "maxLength": schemas.MAX_METADATA_VALUE_CHARS},
                },
                "output_expires_after": _EXPIRY,
                "idempotency_key": {"type": "string", "maxLength": schemas.MAX_KEY_CHARS},
            },
        }
    }
}

OPERATIONS = (
    Operation(
        "POST",
        "/v1/files",
        "create_file",
        "Upload a file of requests.",
        schemas.FileObject,
        body=_UPLOAD,
    ),
    Operation(
        "GET",
        "/v1/files",
        "list_files",
        "List files.",
        schemas.FileList,
        (
            Parameter("purpose", "query", {"type": "string"}, "Only files of this purpose."),
            Parameter("limit", "query", {"type": "integer", "minimum": 1, "maximum": 10_000}, "10,000 by default."),
            Parameter("order", "query", {"enum": ["asc", "desc"]}, "By creation; newest first by default."),
            _AFTER,
        ),
    ),
    Operation(
        "GET", "/v1/files/{file_id}", "retrieve_file", "Describe a file.", schemas.FileObject, (_FILE_ID,), None, (404,)
    ),
    Operation(
        "DELETE",
        "/v1/files/{file_id}",
        "delete_file",
        "Delete a file; batches made of it go on.",
        schemas.FileDeleted,
        (_FILE_ID,),
        None,
        (404,),
    ),
    Operation(
        "GET",
        "/v1/files/{file_id}/content",
        "retrieve_file_content",
        "Return a file's bytes, or the range of them that the header Range names.",
        None,
        (_FILE_ID, Parameter("Range", "header", {"type": "string"}, "For example `bytes=0-999`.")),
        None,
        (404, 416),
    ),
    Operation(
        "POST",
        "/v1/batches",
        "create_batch",
        "Create a batch of an uploaded file.",
        schemas.BatchObject,
        (_KEY,),
        _CREATE,
        (409,),
    ),
    Operation(
        "GET",
        "/v1/batches",
        "list_batches",
        "List batches, newest first.",
        schemas.BatchList,
        (
            Parameter("limit", "query", {"type": "integer", "minimum": 1, "maximum": 100}, "20 by default."),
            _AFTER,
        ),
    ),
    Operation(
        "GET",
        "/v1/batches/{batch_id}",
        "retrieve_batch",
        "Describe a batch.",
        schemas.BatchObject,
        (_BATCH_ID,),
        None,
        (404,),
    ),
    Operation(
        "POST",
        "/v1/batches/{batch_id}/cancel",
        "cancel_batch",
        "Cancel a batch; results that exist are kept.",
        schemas.BatchObject,
        (_BATCH_ID,),
        None,
        (404, 409),
    ),
    Operation(
        "POST",
        "/v1/batches/{batch_id}/retry",
        "retry_batch",
        "Create a batch of the failed lines of a finished one (an extension). A second call returns the same batch, "
        "unless it has another idempotency key.",
        schemas.BatchObject,
        (_BATCH_ID, _KEY),
        None,
        (404, 409),
    ),
    Operation("GET", "/v1/models", "list_models", "The model server's own list of models.", None),
    Operation(
        "GET",
        "/v1/models/{model}",
        "retrieve_model",
        "The model server's own description of a model.",
        None,
        (Parameter("model", "path", {"type": "string"}, "Name of a model."),),
        None,
        (404,),
    ),
)

_EVERYWHERE = (400, 401, 429, 500, 503)
_MEANINGS = {
    400: "The request cannot be used.",
    401: "No key, or an unknown one.",
    404: "There is no such object.",
    409: "The object's state, or another request, does not allow it; do not repeat.",
    416: "The range is beyond the end of the file.",
    429: "A limit is reached; see Retry-After.",
    500: "A fault of the server.",
    503: "A part of the server is away; see Retry-After.",
}


def build_document(*, endpoints: list[str], needs_key: bool) -> dict[str, Any]:
    """
    Return the OpenAPI document.

    Args:
        endpoints: Those that a batch may name.
        needs_key: Whether requests carry a key.
    """
    replies = [operation.reply for operation in OPERATIONS if operation.reply is not None]
    _, components = msgspec.json.schema_components(
        [*replies, schemas.ErrorObject], ref_template="#/components/schemas/{name}"
    )
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _described(operation, endpoints)
    document: dict[str, Any] = {
        "openapi": VERSION,
        "info": {
            "title": "Files and Batches",
            "version": "1",
            "description": "OpenAI's Files and Batches API in front of a fleet of inference workers.",
        },
        "paths": paths,
        "components": {"schemas": dict(components)},
    }
    if needs_key:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    return document


def _described(operation: Operation, endpoints: list[str]) -> dict[str, Any]:
    described: dict[str, Any] = {"operationId": operation.name, "summary": operation.summary, "responses": {}}
    if operation.parameters:
        described["parameters"] = [
            {
                "name": each.name,
                "in": each.place,
                "required": each.place == "path",
                "schema": dict(each.shape),
                "description": each.description,
            }
            for each in operation.parameters
        ]
    if operation.body is not None:
        described["requestBody"] = {"required": True, "content": _with_endpoints(operation.body, endpoints)}
    content: dict[str, Any] = {"application/octet-stream": {}} if operation.path.endswith("/content") else {}
    if operation.reply is not None:
        content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{operation.reply.__name__}"}}}
    described["responses"]["200"] = {"description": operation.summary, "content": content}
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorObject"}}}
    for status in sorted({*_EVERYWHERE, *operation.errors}):
        described["responses"][str(status)] = {"description": _MEANINGS[status], "content": error}
    return described


def _with_endpoints(body: Mapping[str, Any], endpoints: list[str]) -> dict[str, Any]:
    copied: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(body))
    for content in copied.values():
        if "endpoint" in content["schema"]["properties"]:
            content["schema"]["properties"]["endpoint"] = {"enum": endpoints}
    return copied


_PAGE = jinja2.Environment(autoescape=True).from_string((Path(__file__).parent / "reference.html").read_text("utf-8"))


def build_page(document: Mapping[str, Any]) -> str:
    """Return the document as a web page that needs nothing else."""
    return _PAGE.render(document=document)
