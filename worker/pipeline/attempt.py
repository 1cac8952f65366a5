"""
One attempt against one backend: it is sent, and what happened is said.  Nothing here decides anything.

Waiting for the gate, judging the end, counting budgets and settling are the processor's.
"""

import time
from collections.abc import Callable
from hashlib import sha1

from worker.delivery import Delivery
from worker.errors import BackendError
from worker.flow.gate import Permit
from worker.pipeline.routes import Target
from worker.policy.answers import asks_about_nothing
from worker.policy.model import ErrorEvent, Fault
from worker.ports import BackendRequest
from worker.telemetry.record import Recorder
from worker.wire.message import RequestMessage


class Attempts:
    """
    Sends attempts.

    Args:
        recorder: Is told of exceptions in the worker's own code; its trace context goes out with each request.
        send_idempotency_key: Whether `Idempotency-Key` carries the message id.
        wall_clock: Unix seconds.
    """

    def __init__(
        self,
        recorder: Recorder,
        *,
        send_idempotency_key: bool = False,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._recorder = recorder
        self._send_idempotency_key = send_idempotency_key
        self._wall_clock = wall_clock

    async def send(self, delivery: Delivery, request: RequestMessage, target: Target, permit: Permit) -> ErrorEvent:
        """
        Send the request and return how the attempt ended; an exception of the backend's code is `Fault.INTERNAL`.

        The answer grows in `delivery.result`, so that it survives an exception.

        Cancellation: the connection is closed; what came is in `delivery.result`.
        """
        assert delivery.result is not None
        fault, detail = None, ""
        try:
            await target.backend.invoke(self._backend_request(delivery, request, target, permit), delivery.result)
        except BackendError as error:
            fault, detail = Fault(error.fault), error.detail
        except Exception as error:  # noqa: BLE001 - a fault of the worker must end in a settlement
            self._recorder.internal_error(delivery)
            fault, detail = Fault.INTERNAL, repr(error)
        return event_of(delivery, request, fault, detail)

    def _backend_request(
        self, delivery: Delivery, request: RequestMessage, target: Target, permit: Permit
    ) -> BackendRequest:
        message = delivery.message
        headers = dict(request.headers)
        if target.foreign_headers:
            headers = {name: value for name, value in headers.items() if name not in target.foreign_headers}
        request_id = attempt_id(message.message_id, message.delivery_attempt or 1, delivery.attempts)
        headers["x-request-id"] = request_id
        if delivery.result is not None:
            delivery.result.request_id = request_id
        if target.time_left_header is not None and request.deadline is not None:
            left_s = max(0.0, request.deadline - self._wall_clock())
            headers[target.time_left_header] = str(int(left_s * 1000))
        if self._send_idempotency_key:
            headers["idempotency-key"] = message.message_id
        self._recorder.add_trace_context(delivery, headers)
        assert request.body is not None
        return BackendRequest(
            path=request.path,
            body=request.body if target.rename is None else target.rename.apply(request.body),
            message_id=message.message_id,
            headers=headers,
            metadata=request.metadata,
            timeout_s=None if request.deadline is None else max(0.0, request.deadline - self._wall_clock()),
            resume_point=delivery.resume_point,
            on_connected=permit.connected if permit.is_probe else None,
            on_first_token=permit.first_byte,
        )


_NAMESPACE_OID = bytes.fromhex("6ba7b8129dad11d180b400c04fd430c8")


def attempt_id(message_id: str, delivery_attempt: int, attempt: int) -> str:
    """
    Return the id under which an attempt is known to the backend: a UUID, since some servers refuse any other.

    The same for the same attempt, so that a log line can be found from a message (starlette-context answers 400 to an
    `x-request-id` that is no UUID: https://starlette-context.readthedocs.io/en/latest/plugins.html).  It is what
    `uuid.uuid5` returns for the namespace of object ids (RFC 9562, 5.5), in a third of the time.
    """
    name = f"{message_id}-{delivery_attempt}-{attempt}".encode()
    digest = sha1(_NAMESPACE_OID + name, usedforsecurity=False).hexdigest()
    variant = "89ab"[int(digest[16], 16) & 3]
    return f"{digest[:8]}-{digest[8:12]}-5{digest[13:16]}-{variant}{digest[17:20]}-{digest[20:32]}"


def event_of(delivery: Delivery, request: RequestMessage, fault: Fault | None = None, detail: str = "") -> ErrorEvent:
    """Return how the latest attempt ended, from what it left in `delivery.result`."""
    result = delivery.result
    assert result is not None
    return ErrorEvent(
        backend=delivery.backend or "",
        path=request.path,
        model=request.model,
        phase=result.phase,
        status=result.status,
        headers=result.headers,
        body=result.body,
        fault=fault,
        detail=detail,
        in_stream=result.in_stream,
        has_partial=result.content_events > 0,
        input_is_empty=request.body is not None and asks_about_nothing(request.path, request.body),
        delivery_attempt=delivery.message.delivery_attempt,
        attempts=delivery.attempts,
    )
