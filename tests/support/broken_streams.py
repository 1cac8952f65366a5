"""Scripted answers of a backend whose streams break."""

import json
from typing import Any

from tests.support.fakes import Answer
from worker.policy.model import Fault, Phase
from worker.ports import ResumePoint

RESUME_POINT = ResumePoint(text="Hel", tokens=3)
SSE = {"content-type": "text/event-stream"}


def partial(text: str = "Hel") -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": None}
    return json.dumps({"choices": [choice]}).encode()


def broken(
    fault: Fault | None = Fault.STREAM_BROKEN,
    *,
    text: str = "Hel",
    resume_point: ResumePoint | None = None,
    **more: Any,
) -> Answer:
    """A stream that broke after some text."""
    result = {"partial": partial(text), "content_events": 1, "resume_point": resume_point, **more.pop("result", {})}
    return Answer(**{"body": b"", "phase": Phase.STREAM, "headers": SSE, "fault": fault, "result": result, **more})


def error_event(body: dict[str, Any], *, text: str = "Hel") -> Answer:
    """A stream that ended with an error event, after some text or as its first event."""
    result = {"in_stream": True}
    result |= {} if text else {"partial": None, "content_events": 0}
    return broken(None, text=text, body=json.dumps(body).encode(), result=result)


def content(body: dict[str, Any]) -> str:
    return str(body["partial"]["choices"][0]["message"]["content"])
