"""
Reads YAML so that faults can name lines: the document, where each of its keys stands, and keys written twice.

Pure text handling on top of PyYAML's node tree; knows nothing of rules.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

MAX_TEXT_CHARS = 1 << 20
"""A ConfigMap holds at most 1 MiB (https://kubernetes.io/docs/concepts/configuration/configmap/)."""

Path = tuple[str | int, ...]
Lines = Mapping[Path, int]
"""Line, from 1, by path: keys and list positions from the root of the document."""


@dataclass(frozen=True, slots=True)
class YamlFault:
    """What is wrong with the text itself, and where."""

    line: int
    text: str


def read_yaml(text: str) -> tuple[Any, dict[Path, int], list[YamlFault]]:
    """
    Return the document, its lines, and its faults; with faults the document may be `None`.

    Aliases are allowed; what they repeat is neither walked nor built twice, so that a short text cannot become a
    large one.
    """
    if len(text) > MAX_TEXT_CHARS:
        return None, {}, [YamlFault(1, f"longer than {MAX_TEXT_CHARS} characters")]
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        lines: dict[Path, int] = {}
        faults: list[YamlFault] = []
        if node is not None:
            _walk(node, (), lines, faults, set())
        return (None if faults else yaml.safe_load(text)), lines, faults
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or "cannot be read"
        return None, {}, [YamlFault(1 if mark is None else mark.line + 1, f"is not YAML: {problem}")]
    except (RecursionError, ValueError) as error:  # ValueError: a date that is none, an integer of 5,000 digits
        return None, {}, [YamlFault(1, f"is not YAML: {type(error).__name__}")]


def _walk(node: yaml.Node, path: Path, lines: dict[Path, int], faults: list[YamlFault], seen: set[int]) -> None:
    lines.setdefault(path, node.start_mark.line + 1)
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _walk(item, (*path, index), lines, faults, seen)
    elif isinstance(node, yaml.MappingNode):
        keys: set[str] = set()
        for key_node, value in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if key in keys:
                faults.append(YamlFault(line, f"the key {key!r} stands twice"))
            keys.add(key)
            lines[*path, key] = line
            _walk(value, (*path, key), lines, faults, seen)
