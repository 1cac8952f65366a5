"""
Loading of settings: file, environment and flags become one `Settings`, or one message with every fault.

The only place that reads `os.environ`.  Everything that was given is merged as plain data first and validated once, so
that a fault is reported under the name of its key, whatever it came from.
"""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args

import yaml
from pydantic import BaseModel, ValidationError

from worker.errors import SettingsError, did_you_mean, did_you_mean_file
from worker.settings.conflicts import find_conflicts
from worker.settings.schema import NO_BACKEND, Settings

PREFIX = "WORKER_"
CONFIG_VARIABLE = "WORKER_CONFIG"
EMULATOR_VARIABLE = "PUBSUB_EMULATOR_HOST"
SECRET_KEYS = ("api_key", "proxy", "redis_url", "database_url", "webhook_signing_key")
"""Last parts of keys whose values never stand in a message and are never read as YAML."""
SECRET_MAPPINGS = ("headers", "gs_options", "s3_options", "az_options")
"""Last parts of keys whose values are secrets by name."""
_SERVICE_LINK = re.compile(
    r"^WORKER(?:_[A-Z0-9]+)*?_(?:SERVICE_HOST|SERVICE_PORT(?:_[A-Z0-9]+)*|PORT_\d+_(?:TCP|UDP|SCTP)(?:_[A-Z]+)?|(PORT))$"
)
"""Variables Kubernetes sets for a Service named `worker` or `worker-…`; they are not ours
(https://kubernetes.io/docs/concepts/services-networking/service/#environment-variables)."""
_SERVICE_ADDRESS = re.compile(r"^(?:tcp|udp|sctp)://")
"""What the variable `…_PORT` of a service link holds; with any other value the variable is a mistyped setting."""
_UNION_TAGS = ("literal[", "constrained-")
"""How pydantic names the branches of a union in the location of a fault."""
_SHOWN_CHARS = 80
_REQUIRED = ": is required"
"""End of the faults that are not reported when the file could not be read: the value may stand in it."""


class OpenAIVariables(NamedTuple):
    """What OpenAI's own clients read from the environment."""

    base_url: str | None
    api_key: str | None


def openai_variables(environ: Mapping[str, str] | None = None) -> OpenAIVariables:
    """
    Return the address and the key that OpenAI's clients would use; an empty one counts as none.

    Source: https://github.com/openai/openai-python/blob/main/src/openai/_client.py.
    """
    environ = os.environ if environ is None else environ
    return OpenAIVariables(environ.get("OPENAI_BASE_URL") or None, environ.get("OPENAI_API_KEY") or None)


def config_file() -> str | None:
    """Return the YAML file that the environment names, if any."""
    return os.environ.get(CONFIG_VARIABLE)


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
    is_read = not faults
    origins = _merge_environment(data, environ, faults)
    for key, value in (flags or {}).items():
        _put(data, key.split("."), _value(value, key, key.rpartition(".")[2], faults), faults, key)
        origins.pop(key, None)
    settings, wrong = _validate(data, origins)
    faults += wrong
    if settings is not None:
        conflicts = [fault for fault in find_conflicts(settings) if not _is_known(fault, faults)]
        faults += [fault for fault in conflicts if is_read or _REQUIRED not in fault]
    if faults or settings is None:
        raise SettingsError(faults)
    return settings


def load_without_backend(config: str | None = None, *, flags: Mapping[str, Any] | None = None) -> Settings:
    """
    Return the settings for a command that calls no backend: it may be missing, nothing else may.

    Raises:
        SettingsError: As `load_settings`.
    """
    try:
        return load_settings(config, flags=flags)
    except SettingsError as error:
        (fault, *others) = error.faults
        if others or not fault.startswith(f"backend.base_url{_REQUIRED}"):
            raise
    return load_settings(config, flags={**(flags or {}), "backend.base_url": NO_BACKEND})


def _is_known(conflict: str, faults: list[str]) -> bool:
    """Whether a fault of the same key is already named: its value was dropped, so the conflict is its consequence."""
    key = conflict.partition(":")[0]
    heads = {"backend", "routes"} if key in {"backend.base_url", "routes"} else {key, f"{key.partition('.')[0]}:"}
    return any(fault.startswith(tuple(heads)) for fault in faults)


def _read_file(path: str | None, faults: list[str]) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        data = yaml.load(Path(path).read_text("utf-8"), Loader=_StrictLoader)  # noqa: S506 - a SafeLoader below
    except OSError as error:
        near = did_you_mean_file(path) if isinstance(error, FileNotFoundError) else ""
        faults.append(f"{path}: cannot be read ({error.strerror}){near}")
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that is none, bytes not UTF-8
        faults.append(f"{path}: is not YAML: {_yaml_fault(error)}")
    else:
        if data is None:
            return {}
        if isinstance(data, dict):
            return data
        faults.append(f"{path}: must hold a mapping of sections")
    return {}


def _yaml_fault(error: Exception) -> str:
    """Return what is wrong and where, without the line itself: it may hold a key."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
    mark = error.problem_mark or error.context_mark
    place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark is not None else ""
    return f"{error.problem or error.context}{place}"


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key written twice, which YAML would silently resolve to the later one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():  # `!!map text` is none
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
        origins["pubsub.emulator_host"] = EMULATOR_VARIABLE
        _put(data, ["pubsub", "emulator_host"], environ[EMULATOR_VARIABLE], faults, EMULATOR_VARIABLE)
    for name in sorted(environ):
        if not name.startswith(PREFIX) or name == CONFIG_VARIABLE or _is_service_link(name, environ[name]):
            continue
        keys = name.removeprefix(PREFIX).lower().split("__")
        origins[".".join(keys)] = name
        _put(data, keys, _value(environ[name], name, keys[-1], faults), faults, name)
    return origins


def _is_service_link(name: str, value: str) -> bool:
    match = _SERVICE_LINK.match(name)
    return match is not None and (match[1] is None or _SERVICE_ADDRESS.match(value) is not None)


def _value(text: Any, name: str, key: str, faults: list[str]) -> Any:
    """Return the value of a variable: YAML flow syntax for lists and mappings, text (coerced later) for the rest."""
    if key in SECRET_KEYS or not isinstance(text, str) or not text.lstrip().startswith(("[", "{")):
        return text
    try:
        return yaml.load(text, Loader=_StrictLoader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        faults.append(f"{name}: is not YAML: {_yaml_fault(error)}")
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
            wrong: dict[tuple[Any, ...], list[Any]] = {}  # a union has one fault for each branch
            for item in error.errors():
                location = tuple(part for part in item["loc"] if not str(part).startswith(_UNION_TAGS))
                wrong.setdefault(location, []).append(item)
            for location, items in wrong.items():
                if (sentence := _sentence(location, items, origins)) not in faults:
                    faults.append(sentence)
                _drop(data, location)
    return None, faults


def _sentence(location: tuple[Any, ...], items: list[Any], origins: Mapping[str, str]) -> str:
    key, item = ".".join(str(part) for part in location), items[0]
    variable = origins.get(key)
    if variable is None and isinstance(item["input"], dict):  # a variable went deeper than the settings do
        variable = next((name for known, name in origins.items() if known.startswith(f"{key}.")), None)
    where = f"{key} (from {variable})" if variable is not None else key
    if item["type"] == "extra_forbidden":
        hint = "; sections and keys are joined by two underscores" if variable and "__" not in variable else ""
        return f"{where}: unknown key{hint}{_suggestion(location)}"
    if item["type"] in {"model_type", "dict_type"}:
        return f"{where}: must be a section of keys{_shown(key, item['input'])}"
    texts = [each["msg"].removeprefix("Value error, ") for each in items]
    text = ", or ".join(text[:1].lower() + text[1:] for text in texts)
    return f"{where}: {text}{_shown(key, item['input'])}"


def _suggestion(location: tuple[Any, ...]) -> str:
    """Return the key that was meant: of the same section, or for an unknown section any key by its whole path."""
    *sections, name = location
    section: type[BaseModel] | None = Settings
    for each in sections:
        if section is not None and each in section.model_fields:  # else the place of an item in a list
            section = _section_of(section.model_fields[each].annotation)
    if section is None:
        return ""
    return did_you_mean(str(name), section.model_fields if sections else _all_keys(Settings))


def _all_keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        inner = _section_of(field.annotation)
        if inner is not None:
            yield from _all_keys(inner, f"{prefix}{name}.")


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """Return the section that a field holds, alone, in a list, or where it is given."""
    arms = (annotation, *get_args(annotation))
    return next((arm for arm in arms if isinstance(arm, type) and issubclass(arm, BaseModel)), None)


def _shown(key: str, value: Any) -> str:
    """Return the value at fault for the message; nothing where it is long to read or may be a secret."""
    is_hidden = isinstance(value, dict | list) or any(word in key for word in (*SECRET_KEYS, *SECRET_MAPPINGS))
    text = repr(value)
    return "" if is_hidden or "@" in text or "?" in text or len(text) > _SHOWN_CHARS else f" (got {text})"


def _drop(data: Any, location: tuple[Any, ...]) -> None:
    """Remove the faulty key, or the whole list it stands in: a list with a hole would only raise new faults."""
    parent, last = None, None
    for key in location:
        if not isinstance(data, dict):
            break
        if key not in data:  # another fault of the same key has removed it
            return
        parent, last, data = data, key, data[key]
    if parent is not None:
        del parent[last]
