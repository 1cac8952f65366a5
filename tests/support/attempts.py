"""One attempt against any backend, and what the policy makes of its end."""

import json
from dataclasses import dataclass
from typing import Any

from tests.support.policy import classify
from worker.errors import BackendError
from worker.policy.answers import asks_about_nothing
from worker.policy.model import Decision, ErrorEvent, Fault
from worker.policy.reply import error_reply, partial_of
from worker.ports import AttemptResult, Backend, BackendRequest
from worker.wire.body import RequestBody

CHAT = "/v1/chat/completions"
HELLO: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}


@dataclass(frozen=True)
class Ended:
    """An attempt that has ended."""

    result: AttemptResult
    error: BackendError | None
    event: ErrorEvent
    decision: Decision

    @property
    def error_class(self) -> str:
        """Name of the class; empty for a good answer."""
        return self.decision.error_class or ""

    @property
    def body(self) -> Any:
        """The answer."""
        assert self.error_class == "", (self.decision, self.error)
        return json.loads(self.result.body)

    @property
    def reply(self) -> tuple[int, Any]:
        """Status and body of the reply, if it comes to one."""
        if self.decision.error_class is None:
            return self.decision.reply_status, self.body
        partial = partial_of(self.decision, self.event, self.result.partial)
        status, body = error_reply(self.decision, self.event, attempts=1, partial=partial)
        return status, json.loads(body)


async def attempt(backend: Backend, path: str = CHAT, body: dict[str, Any] | bytes = HELLO, **request: Any) -> Ended:
    """Make one attempt and judge it."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    view, result, error = RequestBody(data), AttemptResult(), None
    try:
        await backend.invoke(BackendRequest(path=path, body=view, **request), result)
    except BackendError as failure:
        error = failure
    event = ErrorEvent(
        backend=backend.name,
        path=path,
        phase=result.phase,
        status=result.status,
        headers=result.headers,
        body=result.body,
        fault=None if error is None else Fault(error.fault),
        detail="" if error is None else error.detail,
        in_stream=result.in_stream,
        has_partial=result.content_events > 0,
        input_is_empty=asks_about_nothing(path, view),
    )
    return Ended(result, error, event, classify(event))
