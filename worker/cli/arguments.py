"""Arguments that several commands share, and what they mean."""

import argparse
from typing import TYPE_CHECKING

from worker.errors import SettingsError

if TYPE_CHECKING:
    from worker.settings.schema import Settings


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where the settings come from."""
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings (also WORKER_CONFIG)")
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="one setting, e.g. http.port=0; may be repeated"
    )


def settings_from(namespace: argparse.Namespace, *, needs_backend: bool = True) -> "Settings":
    """
    Return the settings that the options of `add_settings` name.

    Raises:
        SettingsError: Unusable; names every fault.
    """
    flags: dict[str, str] = {}
    for item in namespace.set:
        key, equals, value = item.partition("=")
        if not equals:
            raise SettingsError([f"--set {item}: expected KEY=VALUE"])
        flags[key] = value
    from worker.settings.load import load_settings, load_without_backend  # noqa: PLC0415 - `--help` needs none

    load = load_settings if needs_backend else load_without_backend
    return load(namespace.config, flags=flags)


def at_least_one(text: str) -> int:
    """
    Return a whole number from 1.

    Raises:
        argparse.ArgumentTypeError: It is none.
    """
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 (got {text!r})")
    return int(text)


def share(text: str) -> float:
    """
    Return a number above 0 and up to 1.

    Raises:
        argparse.ArgumentTypeError: It is none.
    """
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be a number above 0 and up to 1 (got {text!r})")
    return value
