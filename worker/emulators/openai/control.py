"""
What the server is told to do wrong, for whom, and for how long.

Pure: `parse_control` checks a control document completely before anything changes, `Controls` picks the behaviour for
a request; the clock is an argument.  The first active behaviour in the list whose filters match a request decides; a
request that none matches is served as usual.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from worker.emulators.openai.faults import MATCH_READERS, MODES, Behaviour, Facts, Match, Mode, Stage
from worker.emulators.openai.options import Reader, SimOptions, integer, optional, share, text, with_changes
from worker.emulators.openai.timing import parse_duration


class ControlError(ValueError):
    """A control document that is not understood; the text names every fault. Nothing was changed."""


_LIMIT_READERS: Mapping[str, Reader] = {
    "name": text,
    "count": optional(integer(1)),
    "skip": integer(0),
    "probability": share,
    "for_s": optional(parse_duration),
    "after_s": parse_duration,
}


def _read(given: Mapping[str, Any], readers: Mapping[str, Reader], where: str, faults: list[str]) -> dict[str, Any]:
    """Return the values that can be read; add a fault for every other key."""
    values = {}
    if unknown := sorted(given.keys() - readers.keys()):
        faults.append(f"{where}: unknown keys: {', '.join(unknown)}; there are {', '.join(readers)}")
    for key in given:
        if key in readers:
            try:
                values[key] = readers[key](given[key])
            except ValueError as error:
                faults.append(f"{where}.{key}: {error}")
    return values


def parse_behaviour(raw: object, where: str, faults: list[str], now_s: float) -> Behaviour | None:
    """
    Return the behaviour a JSON object describes; add what is wrong with it to `faults` and return None otherwise.

    Args:
        raw: `{"mode": ..., parameters of the mode, "match": {...}, "name", "count", "skip", "probability", "for_s",
            "after_s"}`.
        where: Its place in the document, for the texts.
        faults: Where faults are added.
        now_s: Clock reading that its times count from.
    """
    if not isinstance(raw, Mapping):
        faults.append(f"{where}: must be an object with a mode, not {raw!r}")
        return None
    mode = MODES.get(raw["mode"]) if isinstance(raw.get("mode"), str) else None
    if mode is None:
        faults.append(f"{where}.mode: must be one of {', '.join(MODES)}, not {raw.get('mode')!r}")
        return None
    before = len(faults)
    given = {key: value for key, value in raw.items() if key not in {"mode", "match"}}
    allowed = dict(_LIMIT_READERS)
    if mode.stage is Stage.LISTENER:
        allowed = {key: allowed[key] for key in ("name", "for_s", "after_s")}
    param_readers = {key: param.read for key, param in mode.params.items()}
    values = _read(given, {**param_readers, **allowed}, where, faults)
    match = _read_match(raw, mode, where, faults)
    if len(faults) > before:
        return None
    params = {key: values.pop(key, param.default) for key, param in mode.params.items()}
    values.setdefault("name", mode.name)
    return Behaviour(mode, params, match=Match(**match), since_s=now_s, **values)


@dataclass(frozen=True, slots=True)
class Change:
    """A control document, understood: the list of behaviours and the options as they are to be."""

    behaviours: list[Behaviour]
    options: SimOptions
    new_capacity: bool
    """Whether the capacity was set, so that its steps begin again."""


def _read_match(raw: Mapping[str, Any], mode: Mode, where: str, faults: list[str]) -> dict[str, Any]:
    """Return the filters of a behaviour; a mode of the listener has none."""
    if "match" not in raw:
        return {}
    if mode.stage is Stage.LISTENER:
        faults.append(f"{where}.match: {mode.name} concerns every connection and takes no filters")
    elif isinstance(raw["match"], Mapping):
        return _read(raw["match"], MATCH_READERS, f"{where}.match", faults)
    else:
        faults.append(f"{where}.match: must be an object of filters")
    return {}


_DOCUMENT = ("behaviours", "add", "remove", "settings")


def parse_control(document: object, behaviours: list[Behaviour], options: SimOptions, now_s: float) -> Change:
    """
    Return what a control document changes.

    Args:
        document: One behaviour (it replaces all others), or any of `behaviours` (replaces all), `remove` (names), `add`
            (one or a list, put behind the others); and with either `settings` (run-time options).
        behaviours: Those in force.
        options: Those in force.
        now_s: Clock reading.

    Raises:
        ControlError: anything is not understood; every fault is named, nothing is changed.
    """
    if not isinstance(document, Mapping):
        raise ControlError("a control document is a JSON object")
    faults: list[str] = []
    rest = {key: value for key, value in document.items() if key != "settings"}
    kept = list(behaviours)
    if "mode" in rest:
        kept = _one(rest, now_s, faults)
    else:
        if unknown := sorted(rest.keys() - set(_DOCUMENT)):
            names = ", ".join(_DOCUMENT)
            faults.append(f"unknown keys: {', '.join(unknown)}; there are mode (with its parameters), {names}")
        kept = _edited(rest, kept, now_s, faults)
    settings = document.get("settings", {})
    if not isinstance(settings, Mapping):
        faults.append("settings: must be an object")
    else:
        try:
            options = with_changes(options, settings, running=True)
        except ValueError as error:
            faults.append(f"settings: {error}")
    if faults:
        raise ControlError("; ".join(faults))
    return Change(kept, options, "capacity" in settings)


def _one(raw: Mapping[str, Any], now_s: float, faults: list[str]) -> list[Behaviour]:
    """Return the one behaviour of the short form; a plain `ok` is no behaviour at all."""
    behaviour = parse_behaviour(raw, "control", faults, now_s)
    if behaviour is None or (behaviour.mode.stage is Stage.OK and len(raw) == 1):
        return []
    return [behaviour]


def _edited(document: Mapping[str, Any], kept: list[Behaviour], now_s: float, faults: list[str]) -> list[Behaviour]:
    """Return the list after `behaviours`, `remove` and `add`, in this order."""

    def read(raw: object, where: str) -> list[Behaviour]:
        if not isinstance(raw, list):
            faults.append(f"{where}: must be a list of behaviours")
            return []
        found = (parse_behaviour(one, f"{where}[{place}]", faults, now_s) for place, one in enumerate(raw))
        return [behaviour for behaviour in found if behaviour is not None]

    if "behaviours" in document:
        kept = read(document["behaviours"], "behaviours")
    if "remove" in document:
        removed = document["remove"]
        names = [removed] if isinstance(removed, str) else removed
        present = {behaviour.name for behaviour in kept}
        if not isinstance(names, list) or not all(isinstance(name, str) and name in present for name in names):
            faults.append(f"remove: must be names of behaviours in force ({', '.join(sorted(present)) or 'none'})")
        else:
            kept = [behaviour for behaviour in kept if behaviour.name not in names]
    if "add" in document:
        added = document["add"]
        kept = kept + read(added if isinstance(added, list) else [added], "add")
    return kept


class Controls:
    """Holds the behaviours and the options in force."""

    def __init__(self, options: SimOptions, clock: Callable[[], float]) -> None:
        """Start with no behaviours; `clock` gives monotonic seconds."""
        self._clock = clock
        self._initial = options
        self.options = options
        self.behaviours: list[Behaviour] = []
        self.capacity_since_s = clock()
        """Clock reading from which the steps of the capacity count."""

    def apply(self, document: object) -> None:
        """Take a control document in, wholly or not at all; raises ControlError."""
        change = parse_control(document, self.behaviours, self.options, self._clock())
        if change.new_capacity:
            self.capacity_since_s = self._clock()
        self.behaviours, self.options = change.behaviours, change.options

    def reset(self, *, behaviours: bool = True, settings: bool = True) -> None:
        """Forget the behaviours, and go back to the options of the start."""
        if behaviours:
            self.behaviours = []
        if settings:
            self.options = self._initial
            self.capacity_since_s = self._clock()

    def choose(self, facts: Facts) -> Behaviour | None:
        """Return the behaviour for a request, None when it is to be served as usual; counts the hit."""
        now_s = self._clock()
        for behaviour in self.behaviours:
            if behaviour.mode.stage is not Stage.LISTENER and behaviour.takes(facts, now_s, self.options.seed):
                return behaviour
        return None

    def refusal(self) -> tuple[Behaviour | None, float | None]:
        """Return the `refuse` in force, if any, and in how many seconds that answer will be another one."""
        now_s = self._clock()
        active = None
        changes = []
        for behaviour in self.behaviours:
            if behaviour.mode.stage is Stage.LISTENER:
                begins_s = behaviour.since_s + behaviour.after_s
                ends_s = None if behaviour.for_s is None else begins_s + behaviour.for_s
                changes += [moment - now_s for moment in (begins_s, ends_s) if moment is not None and moment > now_s]
                if behaviour.state(now_s) == "active":
                    active = behaviour
        return active, min(changes, default=None)
