"""
Custom resource definitions as strict JSON schemas, and KEDA's list of trigger keys: what an API server would refuse.

A definition's openAPIV3Schema tolerates unknown fields unless it says otherwise; an API server prunes them silently,
which is how a misspelt field gets lost.  So every object with listed properties is closed here.  Not seen: CEL rules,
formats, defaults, values inside a trigger's metadata.

Source: https://kubernetes.io/docs/tasks/extend-kubernetes/custom-resources/custom-resource-definitions/
"""

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

SCHEMAS = Path(__file__).parent / "schemas"
_OPEN = {"additionalProperties", "x-kubernetes-preserve-unknown-fields"}


def close(schema: Any) -> Any:
    """Return a copy of an openAPIV3Schema node as JSON schema that refuses unknown fields."""
    if isinstance(schema, list):
        return [close(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: close(value) for key, value in schema.items() if key not in {"nullable", "format"}}
    if isinstance(schema.get("properties"), dict) and not _OPEN & schema.keys():
        closed["additionalProperties"] = False
    if schema.get("x-kubernetes-int-or-string") is True:
        closed["type"] = ["integer", "string"]
    if schema.get("nullable") is True and isinstance(schema.get("type"), str):
        closed["type"] = [schema["type"], "null"]
    return closed


@functools.cache
def known_kinds() -> dict[tuple[str, str], Any]:
    """Return `{(apiVersion, kind): schema}` of every definition in the data."""
    kinds = {}
    for path in sorted(SCHEMAS.rglob("*.yaml")):
        for definition in filter(None, yaml.safe_load_all(path.read_text())):
            group, kind = definition["spec"]["group"], definition["spec"]["names"]["kind"]
            for version in definition["spec"]["versions"]:
                schema = close(version["schema"]["openAPIV3Schema"])
                schema["properties"]["metadata"] = {"type": "object"}  # the definition leaves it to the API server
                kinds[f"{group}/{version['name']}", kind] = schema
    return kinds


@functools.cache
def known_triggers() -> dict[str, dict[str, dict[str, Any]]]:
    """Return `{trigger type: {metadata key: what KEDA says of it}}`."""
    listed = json.loads((SCHEMAS / "keda" / "scalers-schema.json").read_text())["scalers"]
    return {scaler["type"]: {key["name"]: key for key in scaler["parameters"] or ()} for scaler in listed}


def custom_faults(document: dict[str, Any]) -> list[str]:
    """Return what is wrong with a custom resource of a known kind, one sentence each."""
    import jsonschema

    schema = known_kinds()[document["apiVersion"], document["kind"]]
    faults = [
        f"{'/'.join(map(str, error.path)) or '.'}: {error.message}"
        for error in jsonschema.Draft7Validator(schema).iter_errors(document)
    ]
    for number, trigger in enumerate(document["spec"].get("triggers", ())):
        faults += [f"spec/triggers/{number}: {fault}" for fault in trigger_faults(trigger)]
    return faults


def trigger_faults(trigger: dict[str, Any]) -> Iterator[str]:
    """Yield what is wrong with the keys of one KEDA trigger."""
    known = known_triggers().get(trigger["type"])
    if known is None:
        yield f"KEDA has no trigger {trigger['type']}"
        return
    for notice in {key["deprecatedAnnounce"] for key in known.values() if key.get("deprecatedAnnounce")}:
        yield f"{trigger['type']}: {notice}"
    given = trigger.get("metadata", {})
    for name in given:
        if name not in known:
            yield f"unknown key {name}"
        elif known[name].get("deprecated"):
            yield f"deprecated key {name}"
    for name, key in known.items():
        if not key.get("optional") and "default" not in key and name not in given:
            yield f"missing key {name}"
