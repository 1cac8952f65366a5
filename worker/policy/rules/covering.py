"""
Whether one rule leaves another nothing to do: of two that fit an event the first wins.

Decided from the rules alone, and only where it is certain: what a regular expression or two wildcards have in common is
not looked into, so a rule that is called unreachable is.
"""

from fnmatch import fnmatchcase

from worker.policy.rules.model import Match, Range, Rule

_GLOBS = ("backend", "path", "model")
_SETS = ("phase", "status", "type", "code", "param", "exception", "error_class")
_RANGES = ("delivery_attempt", "attempts")
_REGEXES = ("message_regex", "body_regex")


def covers(earlier: Rule, later: Rule) -> bool:
    """Say whether the earlier rule fits every event that the later one fits."""
    if later.sees_success and not earlier.sees_success:
        return False
    one, other = earlier.match, later.match
    return (
        all(_covers_globs(name, one, other) for name in _GLOBS)
        and all(getattr(one, name) is None or _holds(getattr(one, name), getattr(other, name)) for name in _SETS)
        and all(_covers_range(getattr(one, name), getattr(other, name)) for name in _RANGES)
        and all(getattr(one, name) in {None, getattr(other, name)} for name in _REGEXES)
    )


def _holds(
    some: "tuple[object, ...] | frozenset[object]", others: "tuple[object, ...] | frozenset[object] | None"
) -> bool:
    return others is not None and set(others) <= set(some)


def _covers_globs(name: str, one: Match, other: Match) -> bool:
    globs, names = getattr(one, name), getattr(other, name)
    if globs is None or (name != "model" and "*" in globs):  # every request has a backend and a path
        return True
    return names is not None and all(_covers_glob(globs, each) for each in names)


def _covers_glob(globs: tuple[str, ...], name: str) -> bool:
    is_plain = not set(name) & set("*?[")
    return name in globs or "*" in globs or (is_plain and any(fnmatchcase(name, glob) for glob in globs))


def _covers_range(one: Range | None, other: Range | None) -> bool:
    if one is None:
        return True
    if other is None:
        return False
    return (one.min or 1) <= (other.min or 1) and (one.max is None or (other.max is not None and other.max <= one.max))
