"""`inference-worker config check` and `config show`: what the settings mean."""

import argparse

from worker.cli.arguments import add_settings, settings_from


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's two actions."""
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    check = actions.add_parser("check", help="validate a file, its rules, and key files that are there; exit 2")
    check.add_argument("config", metavar="FILE")
    check.set_defaults(action=_check, set=[])
    show = actions.add_parser("show", help="print the settings in force, secrets masked")
    add_settings(show)
    show.set_defaults(action=_show)


def run(namespace: argparse.Namespace) -> int:
    """Run the action."""
    code: int = namespace.action(namespace)
    return code


def _check(namespace: argparse.Namespace) -> int:
    from worker.backends.http.credentials import check_key_files  # noqa: PLC0415 - `show` needs no key
    from worker.policy.engine import load_policy  # noqa: PLC0415 - nor rules

    settings = settings_from(namespace)
    load_policy(settings.policy.rules)
    check_key_files(settings)
    print(f"{namespace.config}: good")
    return 0


def _show(namespace: argparse.Namespace) -> int:
    import yaml  # noqa: PLC0415 - `check` prints none

    print(yaml.safe_dump(settings_from(namespace).model_dump(mode="json"), sort_keys=False), end="")
    return 0
