"""
Regular expressions of operators: searched in linear time, whatever the pattern and whatever the text.

A pattern of Python's own engine can take exponential time on text that a stranger chose (an error body echoes a
prompt), and a search cannot be interrupted.  So these patterns are RE2's: finite automata, no look-around, no
back-references.  What RE2 cannot hold is refused when the rules are loaded, and so is a pattern whose automaton would
be slow by its sheer size.

Rejected: Python's `re` behind a check for nested repetition (misses `(a|ab)*c`), behind a timing probe (proves
nothing about another text) or in a subprocess (milliseconds a call).

Source: https://github.com/google/re2/wiki/WhyRE2
"""

from functools import lru_cache
from typing import Protocol

MAX_TEXT_BYTES = 8 * 1024
"""A search sees the beginning of a text only: what identifies an error stands there."""

MAX_PATTERN_CHARS = 1000

MAX_PROGRAM = 2000
"""Instructions of the compiled automaton.  An automaton of 7,200 took 125 ms on 8 KiB, so this bounds a search to
about 30 ms; `^Request blocked by WAF` has 26, each `.` in UTF-8 about eight."""

_MAX_MEMORY_BYTES = 1 << 20


class Pattern(Protocol):
    """The one thing asked of a compiled pattern."""

    def search(self, text: str) -> object | None:
        """Return anything but `None` when the pattern occurs in the text."""


class RegexError(ValueError):
    """The pattern cannot be used; permanent."""


@lru_cache(maxsize=1024)
def compile_regex(pattern: str) -> Pattern:
    """
    Return a pattern that can be searched for in linear time.

    Args:
        pattern: In RE2's syntax (https://github.com/google/re2/wiki/Syntax); `(?i)` and `(?s)` as usual.

    Raises:
        RegexError: Invalid, not expressible in RE2 (look-around, back-references), or too large; permanent.
    """
    import re2  # type: ignore[import-untyped]  # noqa: PLC0415 - most workers have no such pattern

    if len(pattern) > MAX_PATTERN_CHARS:
        msg = f"longer than {MAX_PATTERN_CHARS} characters"
        raise RegexError(msg)
    options = re2.Options()
    options.log_errors = False
    options.max_mem = _MAX_MEMORY_BYTES
    try:
        compiled: Pattern = re2.compile(pattern, options=options)
        size = int(compiled.programsize)  # type: ignore[attr-defined]
    except UnicodeEncodeError as error:
        msg = "holds a lone surrogate"
        raise RegexError(msg) from error
    except re2.error as error:
        reason = error.args[0] if error.args else b""
        raise RegexError(reason.decode("utf-8", "replace") if isinstance(reason, bytes) else str(reason)) from error
    if size > MAX_PROGRAM:
        msg = f"too large: {size} instructions, at most {MAX_PROGRAM}; use a smaller repetition"
        raise RegexError(msg)
    return compiled


def occurs(pattern: str, text: str | bytes) -> bool:
    """
    Say whether a pattern occurs within the first `MAX_TEXT_BYTES` of a text.

    Args:
        pattern: Known to compile.
        text: Anything; what is not UTF-8 is searched as U+FFFD.
    """
    data = text[:MAX_TEXT_BYTES] if isinstance(text, bytes) else text[:MAX_TEXT_BYTES].encode("utf-8", "replace")
    return compile_regex(pattern).search(data[:MAX_TEXT_BYTES].decode("utf-8", "replace")) is not None
