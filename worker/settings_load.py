"""
Loading of settings: file, environment and flags become one `Settings`, or one message with every fault.

The only place that reads `os.environ`.  Everything that was given is merged as plain data first and validated once, so
that a fault is reported under the name of its key, whatever it came from.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from worker.errors import SettingsError
from worker.settings import Settings, find_conflicts

PREFIX = "WORKER_"
CONFIG_VARIABLE = "WORKER_CONFIG"
EMULATOR_VARIABLE = "PUBSUB_EMULATOR_HOST"
_SERVICE_LINK = re.compile(r"^WORKER_(SERVICE_HOST|SERVICE_PORT(_.+)?|PORT(_\d+_(TCP|UDP|SCTP)(_.+)?)?)$")
"""Variables Kubernetes sets for a Service named `worker`; they are not ours
(https://kubernetes.io/docs/concepts/services-networking/service/#environment-variables)."""


def load_settings(
    config: str | None = None,
    *,
    flags: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
) -> Settings:
    """
    Return the settings in force.

    Args:
        config: Path of the YAML file; `None` takes `WORKER_CONFIG`, and without that there is no file.
        flags: Values by dotted key, for example `{"http.port": 0}`; they win over everything.
        environ: Stands for `os.environ`.

    Raises:
        SettingsError: Permanent; names every fault.
    """
    environ = os.environ if environ is None else environ
    faults: list[str] = []
    data = _read_file(config or environ.get(CONFIG_VARIABLE), faults)
    origins = _merge_environment(data, environ, faults)
    for key, value in (flags or {}).items():
        _put(data, key.split("."), value, faults, key)
    settings, wrong = _validate(data, origins)
    faults += wrong
    if settings is not None:
        faults += [fault for fault in find_conflicts(settings) if not _is_known(fault, faults)]
    if faults or settings is None:
        raise SettingsError(faults)
    return settings


def _is_known(conflict: str, faults: list[str]) -> bool:
    """Whether a fault of the same key is already named: its value was dropped, so the conflict is its consequence."""
    key = conflict.partition(":")[0]
    heads = {"backend", "routes"} if key in {"backend.base_url", "routes"} else {key}
    return any(fault.startswith(tuple(heads)) for fault in faults)


def _read_file(path: str | None, faults: list[str]) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        data = yaml.load(Path(path).read_text("utf-8"), Loader=_StrictLoader)  # noqa: S506 - a SafeLoader below
    except OSError as error:
        faults.append(f"{path}: cannot be read ({error.strerror})")
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        faults.append(f"{path}: is not YAML: {' '.join(str(error).split())}")
    else:
        if data is None:
            return {}
        if isinstance(data, dict):
            return data
        faults.append(f"{path}: must hold a mapping of sections")
    return {}


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key written twice, which YAML would silently resolve to the later one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = str(key_node.value)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _merge_environment(data: dict[str, Any], environ: Mapping[str, str], faults: list[str]) -> dict[str, str]:
    origins: dict[str, str] = {}
    if environ.get(EMULATOR_VARIABLE):
        section = data.setdefault("pubsub", {})
        if isinstance(section, dict):
            section.setdefault("emulator_host", environ[EMULATOR_VARIABLE])
    for name in sorted(environ):
        if not name.startswith(PREFIX) or name == CONFIG_VARIABLE or _SERVICE_LINK.match(name):
            continue
        keys = name.removeprefix(PREFIX).lower().split("__")
        origins[".".join(keys)] = name
        _put(data, keys, _value(environ[name], name, faults), faults, name)
    return origins


def _value(text: str, name: str, faults: list[str]) -> Any:
    """Return the value of a variable: YAML flow syntax for lists and mappings, text (coerced later) for the rest."""
    if not text.lstrip().startswith(("[", "{")):
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        faults.append(f"{name}: is not YAML: {' '.join(str(error).split())}")
        return text


def _put(data: dict[str, Any], keys: list[str], value: Any, faults: list[str], name: str) -> None:
    for key in keys[:-1]:
        inner = data.setdefault(key, {})
        if inner is None:
            inner = data[key] = {}
        if not isinstance(inner, dict):
            faults.append(f"{name}: {key} is not a section")
            return
        data = inner
    data[keys[-1]] = value


def _validate(data: dict[str, Any], origins: Mapping[str, str]) -> tuple[Settings | None, list[str]]:
    """Validate; on faults drop the faulty keys and go on, so that conflicts among the rest are found as well."""
    faults: list[str] = []
    for _ in range(20):
        try:
            return Settings.model_validate(data), faults
        except ValidationError as error:
            for item in error.errors():
                if (sentence := _sentence(item, origins)) not in faults:
                    faults.append(sentence)
                _drop(data, item["loc"])
    return None, faults


def _sentence(item: Any, origins: Mapping[str, str]) -> str:
    key = ".".join(str(part) for part in item["loc"] if not str(part).startswith(("literal[", "constrained-")))
    where = f"{key} (from {origins[key]})" if key in origins else key
    if item["type"] == "extra_forbidden":
        return f"{where}: unknown key"
    text = item["msg"].removeprefix("Value error, ")
    text = text[:1].lower() + text[1:]
    is_hidden = isinstance(item["input"], dict | list) or any(word in key for word in ("api_key", "redis_url"))
    return f"{where}: {text}" if is_hidden else f"{where}: {text} (got {item['input']!r})"


def _drop(data: Any, location: tuple[Any, ...]) -> None:
    """Remove the faulty key, or the whole list it stands in: a list with a hole would only raise new faults."""
    parent, last = None, None
    for key in location:
        if not isinstance(data, dict) or key not in data:
            break
        parent, last, data = data, key, data[key]
    if parent is not None:
        del parent[last]
