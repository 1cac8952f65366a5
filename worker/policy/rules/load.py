"""
Reads operators' rules: from YAML or from the settings, in order, naming every fault with its line.

A rule that cannot mean anything, or that could never be reached, stops the start: an operator who wrote it counts on
it.  The shape of a rule is in `rule_model`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from worker.errors import SettingsError
from worker.policy.rules.covering import covers
from worker.policy.rules.model import Match, Rule
from worker.policy.rules.yaml_lines import Lines, Path, YamlFault, read_yaml


class RulesError(SettingsError):
    """The rules cannot be used; permanent until the operator changes them.  Names every fault."""


def load_rules(text: str, source: str = "rules") -> tuple[Rule, ...]:
    """
    Read rules from YAML: a list of them, or one under `rules`, or the worker's whole file with `policy.rules`.

    Args:
        text: At most 1 MiB.
        source: Name of the file, for the faults.

    Raises:
        RulesError: Permanent; every fault as `source:line: rules[i].key: what is wrong`.
    """
    document, lines, faults = read_yaml(text)
    rules, keys = _find_list(document)
    if keys == () and isinstance(document, dict):
        faults.append(YamlFault(1, "holds neither a list of rules nor `rules`"))
    elif not isinstance(rules, list) and not faults:
        faults.append(YamlFault(lines.get(keys, 1), "rules must be a list"))
    if faults:
        raise RulesError([f"{source}:{fault.line}: {fault.text}" for fault in faults])
    return parse_rules(rules, lines=_within(lines, keys), source=source)


def rule_lines(text: str) -> Lines:
    """
    Return where the rules of a file stand, for `parse_rules`; empty when there are none or the file cannot be read.

    Args:
        text: As for `load_rules`.
    """
    document, lines, _ = read_yaml(text)
    rules, keys = _find_list(document)
    return _within(lines, keys) if isinstance(rules, list) else {}


def _find_list(document: Any) -> tuple[Any, Path]:
    """Return what stands under `policy.rules`, `rules`, or at the top, and the keys that led there."""
    keys: Path = ()
    for key in ("policy", "rules"):
        if isinstance(document, dict) and key in document:
            document, keys = document[key], (*keys, key)
    return document, keys


def _within(lines: Lines, keys: Path) -> Lines:
    return {path[len(keys) :]: line for path, line in lines.items() if path[: len(keys)] == keys}


def parse_rules(
    items: Sequence[Mapping[str, Any]], *, lines: Lines | None = None, source: str = "policy"
) -> tuple[Rule, ...]:
    """
    Check rules that were parsed already.

    Args:
        items: As in the file, in order.
        lines: Line by path within the list, such as `(0, "match", "status")`; `None`: faults name no lines.
        source: Name of the file, for the faults.

    Raises:
        RulesError: Permanent; names every fault of every rule.
    """
    rules: list[Rule] = []
    faults: list[str] = []
    names: set[object] = set()
    for index, item in enumerate(items):
        given = {"name": f"rules[{index}]", **item} if isinstance(item, Mapping) else item
        name = str(given["name"]) if isinstance(given, Mapping) and isinstance(given["name"], str | int) else None
        if name in names:  # also of a rule that is faulty itself, so that one start names everything
            text = f"{name!r} is the name of an earlier rule too"
            faults.append(_fault(index, ("name",), text, lines, source))
        names |= {name} - {None}
        try:
            rule = Rule.model_validate(given)
        except ValidationError as error:
            faults += [_sentence(index, detail, lines, source) for detail in error.errors(include_url=False)]
            continue
        shadow = next((earlier for earlier in rules if covers(earlier, rule)), None)
        if shadow is not None:
            text = f"is never reached: {shadow.name!r} before it matches whatever it does"
            faults.append(_fault(index, ("match",), text, lines, source))
        rules.append(rule)
    if faults:
        raise RulesError(faults)
    return tuple(rules)


def _sentence(index: int, detail: Any, lines: Lines | None, source: str) -> str:
    text = "unknown key" if detail["type"] == "extra_forbidden" else detail["msg"].removeprefix("Value error, ")
    return _fault(index, detail["loc"], text[:1].lower() + text[1:], lines, source)


def _fault(index: int, location: tuple[Any, ...], text: str, lines: Lines | None, source: str) -> str:
    path = (index, *location)
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    where = source
    if lines is not None:
        known = next((path[:end] for end in range(len(path), 0, -1) if path[:end] in lines), None)
        where = f"{source}:{lines[known] if known else 1}"
    return f"{where}: rules[{index}]{name}: {text}"


__all__ = ["Match", "Rule", "RulesError", "load_rules", "parse_rules", "rule_lines"]
