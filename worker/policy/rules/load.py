"""
Reads operators' rules out of the settings, in order, naming every fault.

A rule that cannot mean anything stops the start: an operator who wrote it counts on it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from worker.errors import SettingsError
from worker.policy.rules.model import Rule


class RulesError(SettingsError):
    """The rules cannot be used; permanent until the operator changes them.  Names every fault."""


def parse_rules(items: Sequence[Mapping[str, Any]]) -> tuple[Rule, ...]:
    """
    Return the rules of `policy.rules`, checked.

    Raises:
        RulesError: Permanent; names every fault of every rule, as `policy.rules[i].key: what is wrong`.
    """
    rules: list[Rule] = []
    faults: list[str] = []
    names: set[object] = set()
    for index, item in enumerate(items):
        given = {"name": f"rules[{index}]", **item} if isinstance(item, Mapping) else item
        name = str(given["name"]) if isinstance(given, Mapping) and isinstance(given["name"], str | int) else None
        if name in names:  # also of a rule that is faulty itself, so that one start names everything
            faults.append(_fault(index, ("name",), f"{name!r} is the name of an earlier rule too"))
        names |= {name} - {None}
        try:
            rules.append(Rule.model_validate(given))
        except ValidationError as error:
            faults += [_sentence(index, detail) for detail in error.errors(include_url=False)]
    if faults:
        raise RulesError(faults)
    return tuple(rules)


def _sentence(index: int, detail: Any) -> str:
    text = "unknown key" if detail["type"] == "extra_forbidden" else detail["msg"].removeprefix("Value error, ")
    return _fault(index, detail["loc"], text[:1].lower() + text[1:])


def _fault(index: int, location: tuple[Any, ...], text: str) -> str:
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return f"policy.rules[{index}]{name}: {text}"
