"""
A request as an invocation of a SageMaker endpoint: what stands in its headers, and whether it can be sent.  Pure.

SageMaker hands the container a body and no path, so that the container tells the APIs apart by what stands in the body:
a request whose path and body do not agree would be answered as another one.  What the service would refuse is refused
here, before anything is sent.
"""

import hashlib
from collections.abc import Mapping

from worker.errors import BackendError
from worker.policy.model import Fault
from worker.ports import BackendRequest
from worker.settings.schema import SageMakerSettings
from worker.wire.body import NOT_GIVEN, RequestBody
from worker.wire.endpoints import CHAT, COMPLETIONS, EMBEDDINGS, RESPONSES, Endpoint
from worker.wire.placeholders import Template, Values
from worker.wire.sagemaker import FIELDS, MAX_REQUEST_BYTES, SETTABLE, STREAM_ACCEPT

JSON, EVENTS = "application/json", "text/event-stream"
_TELLING = (("messages", CHAT), ("prompt", COMPLETIONS), ("input", EMBEDDINGS))
"""Keys of a body by which containers choose an API, in the order in which they look.

Source: https://github.com/vllm-project/vllm/tree/main/vllm/entrypoints/serve/sagemaker; TGI chooses between
`messages` and `inputs`, https://github.com/huggingface/text-generation-inference/blob/main/router/src/sagemaker.rs."""
_TEMPLATES = tuple(name for name in FIELDS if name not in {"content_type", "accept"})


class Invocations:
    """
    Makes invocations by the settings of a route.

    Args:
        settings: Of the route.
    """

    def __init__(self, settings: SageMakerSettings) -> None:
        self._settings = settings
        self._templates = {name: Template(text) for name in _TEMPLATES if (text := getattr(settings, name))}
        total, shares = sum(settings.variants.values()), list[tuple[str, float]]()
        for name, weight in settings.variants.items():
            shares.append((name, weight / total + (shares[-1][1] if shares else 0.0)))
        self._shares = tuple(shares)

    def is_streamable(self, headers: Mapping[str, str]) -> bool:
        """Whether SageMaker streams the answer to a request with these headers of its message."""
        return not any(
            name in self._templates or field.header in headers
            for name, field in FIELDS.items()
            if not field.is_streamable
        )

    def headers(
        self, request: BackendRequest, model: str, *, is_stream_asked: bool, is_streamed: bool
    ) -> dict[str, str]:
        """
        Return the headers of an invocation; names in lower case.

        Args:
            request: The attempt's.
            model: Of its body; empty without one.
            is_stream_asked: The body asks the container for a stream.
            is_streamed: The operation is `InvokeEndpointWithResponseStream`.

        Raises:
            BackendError: A field cannot be sent as it is, or may not be set by a message.
        """
        fields = {name: template.render(self._values(request, model)) for name, template in self._templates.items()}
        if self._shares:
            fields["target_variant"] = self._variant_of(request.message_id)
        for header, value in request.headers.items():
            name = SETTABLE.get(header)
            if name is None:
                continue  # a header of another route, or of the attempt: none of them reaches a container
            if name not in self._settings.message_fields:
                raise _unusable(f"A message may not set {header} for this backend.")
            fields[name] = value
        sent = {
            FIELDS["content_type"].header: self._settings.content_type,
            STREAM_ACCEPT if is_streamed else FIELDS["accept"].header: self._settings.accept
            or (EVENTS if is_stream_asked else JSON),
        }
        for name, value in fields.items():
            if not value:
                continue
            field = FIELDS[name]
            fault = field.fault(value)
            if fault is not None:
                raise _unusable(f"SageMaker's field {name} {fault}.")
            sent[field.header] = value
        return sent

    def check_body(self, endpoint: Endpoint, body: RequestBody, size: int) -> None:
        """
        Return when a body can be sent and will be understood as the path says.

        Args:
            endpoint: Of the path.
            body: As the requester wrote it.
            size: As it is sent, bytes.

        Raises:
            BackendError: It cannot be sent.
        """
        if size > MAX_REQUEST_BYTES:
            detail = f"The body has {size} bytes; SageMaker takes {MAX_REQUEST_BYTES}."
            raise BackendError(Fault.REQUEST_TOO_LARGE, detail)
        if self._settings.answers != "openai":
            return
        if endpoint is RESPONSES:
            raise _unusable("Containers on SageMaker have no Responses API: they would take the input for embeddings.")
        asked = next((each for key, each in _TELLING if body.raw(key) not in NOT_GIVEN), None)
        expected = next((key for key, each in _TELLING if each is endpoint), None)
        if expected is not None and asked is not endpoint:
            found = "none of the keys that tell APIs apart" if asked is None else f"the body of {asked.name}"
            raise _unusable(
                f"SageMaker does not pass on the path: for {endpoint.name} the container must find `{expected}`, and "
                f"finds {found}."
            )

    def _values(self, request: BackendRequest, model: str) -> Values:
        return Values(
            message_id=request.message_id,
            attempt_id=request.headers.get("x-request-id", ""),
            traceparent=request.headers.get("traceparent", ""),
            model=model,
            metadata=request.metadata,
        )

    def _variant_of(self, message_id: str) -> str:
        """Return the variant of a message: the same whenever it is asked for."""
        at = int.from_bytes(hashlib.sha256(message_id.encode()).digest()[:8], "big") / 2**64
        return next((name for name, share in self._shares if at < share), self._shares[-1][0])


def _unusable(detail: str) -> BackendError:
    return BackendError(Fault.REQUEST_UNUSABLE, detail)
