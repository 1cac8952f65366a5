"""
Validation of an input file: one pass, every fault with its line, before any line is sent.

The memory does not depend on the length of the file: of each line a digest of its `custom_id` is kept, and its faults.
Parts of the file are read on the event loop and looked at in a thread.

A line is parsed as strictly as those will parse it that come after: what Python's parser would take or break on (NaN,
halves of surrogate pairs, deep nesting, integers of thousands of digits) is not valid JSON here.

Source: section 1.7 of the contract (docs/decisions/0023); clients match the words of the messages.
"""

import asyncio
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import aclosing

import msgspec

from worker.batches.objects import Objects
from worker.batches.records import MAX_RECORD_BYTES, Record, RecordCutter
from worker.batches.store import Fault

INVALID_JSON = "invalid_json_line"
INVALID = "invalid_request"
MISSING = "missing_required_parameter"
_LONG_NUMBER = re.compile(rb"\d{4301}")
"""More digits than Python's parser takes; perhaps only in a string, or in a float."""
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_SHOWN_CHARS = 100
_PARSED_BYTES = 1 << 20
"""Of the file that a thread looks at, before the event loop turns."""

_Kind = tuple[str, Callable[[bytes], bool]]


def _starts_with(*starts: bytes) -> Callable[[bytes], bool]:
    return lambda raw: raw.startswith(starts)


_STRING: _Kind = ("a string", _starts_with(b'"'))
_LIST: _Kind = ("a list", _starts_with(b"["))
_STRING_OR_LIST: _Kind = ("a string or a list", _starts_with(b'"', b"["))

REQUIRED: dict[str, dict[str, _Kind]] = {
    "/v1/chat/completions": {"model": _STRING, "messages": _LIST},
    "/v1/completions": {"model": _STRING, "prompt": _STRING_OR_LIST},
    "/v1/responses": {"model": _STRING, "input": _STRING_OR_LIST},
    "/v1/embeddings": {"model": _STRING, "input": _STRING_OR_LIST},
    "/v1/moderations": {"input": _STRING_OR_LIST},
    "/v1/images/generations": {"prompt": _STRING},
    "/v1/images/edits": {"prompt": _STRING},
    "/v1/videos": {"prompt": _STRING},
}
"""Fields that a body must have, by endpoint; of any other endpoint nothing is known.  Moderations, images and videos
have a default model (https://platform.openai.com/docs/api-reference)."""
EMBEDDINGS = "/v1/embeddings"

_UNSET = msgspec.UNSET
_Optional = msgspec.Raw | msgspec.UnsetType


class _Line(msgspec.Struct):
    custom_id: _Optional = _UNSET
    method: _Optional = _UNSET
    url: _Optional = _UNSET
    body: _Optional = _UNSET


class _Body(msgspec.Struct):
    model: _Optional = _UNSET
    messages: _Optional = _UNSET
    prompt: _Optional = _UNSET
    input: _Optional = _UNSET
    stream: _Optional = _UNSET


_decode_any = msgspec.json.Decoder(msgspec.Raw).decode
_decode_line = msgspec.json.Decoder(_Line).decode
_decode_body = msgspec.json.Decoder(_Body).decode
_decode_text = msgspec.json.Decoder(str).decode
_decode_items = msgspec.json.Decoder(list[msgspec.Raw]).decode


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """What a file is measured by."""

    endpoint: str
    max_lines: int
    max_embedding_inputs: int
    has_model: Callable[[str], bool] | None
    """Whether a model is served; `None`: not known, so any."""


class Checked(msgspec.Struct, frozen=True, kw_only=True):
    """What the validation of a file found."""

    faults: list[Fault]
    """In the order in which they are told; empty: the file is good."""
    total: int
    """Records."""
    model: str | None
    """The one model that its lines ask for."""


class Validator:
    """Looks at the records of one file, in order."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._required = REQUIRED.get(rules.endpoint, {})
        self._faults = list[Fault]()
        self._seen = set[bytes]()
        self._models = set[str]()
        self._inputs = 0
        self._total = 0

    @property
    def is_over(self) -> bool:
        """Whether the file has more lines than are allowed, so that the rest need not be read."""
        return self._total > self._rules.max_lines

    def look_at(self, records: Iterable[Record]) -> None:
        """Note what is wrong with some records; takes about 10 µs for each."""
        for record in records:
            self._total += 1
            if self.is_over:
                return
            for code, param, message in self._faults_of(record):
                self._faults.append(Fault(code=code, message=message, param=param, line=record.line))

    def result(self) -> Checked:
        """Return what was found; the faults of the file come before those of its lines."""
        faults = self._faults
        if not self._total:
            faults = [Fault(code="empty_file", message="The input file is empty: it has no line with a request.")]
        elif self.is_over:
            text = f"The input file has more than {self._rules.max_lines} lines."
            faults = [Fault(code="too_many_tasks", message=text), *faults]
        elif self._inputs > self._rules.max_embedding_inputs:
            limit = self._rules.max_embedding_inputs
            text = f"The lines of the input file have {self._inputs} inputs; {limit} are allowed."
            faults = [Fault(code="too_many_tasks", message=text), *faults]
        model = next(iter(self._models)) if len(self._models) == 1 else None
        return Checked(faults=faults, total=self._total, model=model)

    def _faults_of(self, record: Record) -> Iterator[tuple[str, str | None, str]]:
        """Yield code, param and message of every independent fault of a line."""
        if record.data is None:
            yield INVALID, None, f"The line is longer than {MAX_RECORD_BYTES} bytes."
            return
        if (broken := why_not_json(record.data)) is not None:
            yield INVALID_JSON, None, f"This line is not parseable as valid JSON: {broken}."
            return
        try:
            line = _decode_line(record.data)
        except msgspec.ValidationError:  # by now it is JSON
            yield INVALID, None, "This line is not a JSON object."
            return
        yield from self._custom_id_faults(line.custom_id)
        yield from self._method_faults(line.method)
        yield from self._url_faults(line.url)
        yield from self._body_faults(line.body)

    def _custom_id_faults(self, raw: _Optional) -> Iterator[tuple[str, str | None, str]]:
        if raw is _UNSET:
            yield MISSING, "custom_id", "Missing required parameter: 'custom_id'."
            return
        text = _text(raw)
        if text is None:
            yield INVALID, "custom_id", "Invalid type for 'custom_id': expected a string."
        elif not text:
            yield INVALID, "custom_id", "Invalid 'custom_id': it must not be empty."
        else:
            digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
            if digest in self._seen:
                shown = text[:_SHOWN_CHARS]
                yield "duplicate_custom_id", "custom_id", f"The custom_id {shown!r} is used by an earlier line."
            self._seen.add(digest)

    def _method_faults(self, raw: _Optional) -> Iterator[tuple[str, str | None, str]]:
        if raw is _UNSET:
            yield MISSING, "method", "Missing required parameter: 'method'."
        elif _text(raw) != "POST":
            yield INVALID, "method", "Invalid 'method': it must be 'POST'."

    def _url_faults(self, raw: _Optional) -> Iterator[tuple[str, str | None, str]]:
        if raw is _UNSET:
            yield MISSING, "url", "Missing required parameter: 'url'."
            return
        text = _text(raw)
        if text is None:
            yield INVALID, "url", "Invalid type for 'url': expected a string."
        elif text != self._rules.endpoint:
            shown, endpoint = text[:_SHOWN_CHARS], self._rules.endpoint
            yield "invalid_url", "url", f"The url {shown!r} does not match the batch's endpoint {endpoint!r}."

    def _body_faults(self, raw: _Optional) -> Iterator[tuple[str, str | None, str]]:
        if raw is _UNSET:
            yield MISSING, "body", "Missing required parameter: 'body'."
            return
        data = bytes(raw)
        if not data.startswith(b"{"):
            yield INVALID, "body", "Invalid type for 'body': expected an object."
            return
        body = _decode_body(data)
        for name, (wanted, fits) in self._required.items():
            value = _given(getattr(body, name))
            if value is None:
                yield INVALID, f"body.{name}", f"Missing required parameter: '{name}'."
            elif not fits(value):
                yield INVALID, f"body.{name}", f"Invalid type for '{name}': expected {wanted}."
            elif name == "input" and self._rules.endpoint == EMBEDDINGS:
                self._inputs += _count_inputs(value)
        yield from self._model_faults(body)
        stream = _given(body.stream)
        if stream not in {None, b"false"}:
            yield "streaming_unsupported", "body.stream", "Streaming is not supported in batches."

    def _model_faults(self, body: _Body) -> Iterator[tuple[str, str | None, str]]:
        value = _given(body.model)
        model = None if value is None else _text(body.model)
        if value is not None and model is None and "model" not in self._required:
            yield INVALID, "body.model", "Invalid type for 'model': expected a string."
        if model is None:
            return
        if self._rules.has_model is not None and not self._rules.has_model(model):
            shown = model[:_SHOWN_CHARS]
            yield "model_not_found", "body.model", f"The model {shown!r} is not supported here, or does not exist."
        elif len(self._models) < 2:  # noqa: PLR2004 - one, or several
            self._models.add(model)


def _given(raw: _Optional) -> bytes | None:
    """Return a value; `None` where it is absent or null."""
    value = b"null" if raw is _UNSET else bytes(raw)
    return None if value == b"null" else value


def _text(raw: _Optional) -> str | None:
    """Return a string; `None` where it is none."""
    data = bytes(raw)  # type: ignore[arg-type]  # mypy does not narrow a sentinel
    return _decode_text(data) if data.startswith(b'"') else None


def _count_inputs(value: bytes) -> int:
    """Return how many inputs of embeddings a value is: a list of numbers is one, of tokens."""
    if not value.startswith(b"["):
        return 1
    items = _decode_items(value)
    return len(items) if items and bytes(items[0]).startswith((b'"', b"[")) else 1


def why_not_json(data: bytes) -> str | None:
    """Return why a line is not JSON that every later reader takes; `None` when it is."""
    try:
        if not data.isascii():
            data.decode("utf-8")
        _decode_any(data)
        if _LONG_NUMBER.search(data) or _SURROGATE.search(data):
            json.dumps(json.loads(data), ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        return f"byte {error.start + 1} is not UTF-8"
    except UnicodeEncodeError:
        return "it has half of a surrogate pair"
    except RecursionError:
        return "it is nested too deeply"
    except ValueError as error:  # msgspec's as well
        is_limit = "integer string conversion" in str(error)
        return "an integer has too many digits" if is_limit else str(error).removeprefix("JSON is malformed: ")
    return None


async def validate(objects: Objects, key: str, rules: Rules) -> Checked:
    """
    Validate a file.

    Args:
        objects: Where it is.
        key: Of its object.
        rules: What it is measured by.

    Raises:
        PayloadError: It cannot be read.

    Cancellation: the thread finishes the part that it looks at.
    """
    validator, cutter = Validator(rules), RecordCutter()
    async with aclosing(objects.read(key)) as parts:
        async for part in parts:
            for at in range(0, len(part), _PARSED_BYTES):
                await asyncio.to_thread(validator.look_at, cutter.feed(part[at : at + _PARSED_BYTES]))
            if validator.is_over:
                break
        else:
            validator.look_at(cutter.finish())
    return validator.result()
