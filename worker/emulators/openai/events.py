"""Events of a stream before they are bytes."""

from dataclasses import dataclass
from typing import Any


@dataclass(slots=True)
class Event:
    """One event: what it says and how much generation it stands for."""

    payload: dict[str, Any] | None
    """The JSON of the data field; None is the literal `[DONE]`."""
    name: str | None = None
    """The event field; None leaves it out."""
    tokens: int = 0
    """Tokens that were generated for it; paces the stream."""
    terminal: bool = False
    """Whether the Responses API ends with it."""
