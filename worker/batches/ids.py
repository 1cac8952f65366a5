"""
Ids of batches, files and events: a prefix, 12 hexadecimal digits of Unix milliseconds, 20 random ones.

They sort by creation, so that an id is a position in a list also when its object is gone (reference: pagination), and
cannot be guessed.  Within one process each id is greater than the one before it, also in the same millisecond.
"""

import re
import secrets
import threading
import time

BATCH = "batch_"
FILE = "file-"
EVENT = "evt_"
LINE = "batch_req_"

_RANDOM_BITS = 80
_ID = re.compile(r"[a-z_-]+[0-9a-f]{32}")


class IdMaker:
    """Makes ids; may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = 0

    def make(self, prefix: str) -> str:
        """Return a new id with this prefix."""
        value = time.time_ns() // 1_000_000 << _RANDOM_BITS | secrets.randbits(_RANDOM_BITS)
        with self._lock:
            if value >> _RANDOM_BITS <= self._last >> _RANDOM_BITS:  # the clock stood still, or went back
                value = self._last + 1 + secrets.randbits(_RANDOM_BITS // 2)
            self._last = value
        return f"{prefix}{value:032x}"


make_id = IdMaker().make
"""Return a new id with this prefix."""


def is_id(text: str, prefix: str) -> bool:
    """Whether a text has the form of an id with this prefix; there need not be such an object."""
    return text.startswith(prefix) and _ID.fullmatch(text) is not None and len(text) == len(prefix) + 32


def line_id(batch_id: str, record: int) -> str:
    """Return the id of a result line: the same whenever the line is written again."""
    return f"{LINE}{batch_id.removeprefix(BATCH)}{record:08x}"
