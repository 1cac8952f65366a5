"""`inference-worker config check` and `config show`: what the settings mean."""

import argparse

from worker.cli.arguments import add_settings, settings_from
from worker.cli.parser import describe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's two actions."""
    describe(
        parser,
        "Say what the settings mean: whether a file can be used, and which values are in force.",
        examples=["inference-worker config check worker.yaml", "inference-worker config show --config worker.yaml"],
    )
    actions = parser.add_subparsers(metavar="ACTION", required=True, help="what to do")
    check = actions.add_parser("check", help="validate a file, its rules, keys and certificates; exit 2")
    describe(
        check,
        "Validate a settings file, the rules in it, and the keys and certificates that it names where they are there.",
        examples=["inference-worker config check worker.yaml"],
    )
    check.add_argument("config", metavar="FILE", help="YAML file of settings")
    check.set_defaults(action=_check, set=[])
    show = actions.add_parser("show", help="print the settings in force, secrets masked")
    describe(
        show,
        "Print the settings in force: defaults, the file, WORKER_* variables and --set. Secrets are masked.",
        examples=[
            "inference-worker config show --config worker.yaml",
            "inference-worker config show --config worker.yaml --set log.level=debug",
        ],
    )
    add_settings(show)
    show.set_defaults(action=_show)


def run(namespace: argparse.Namespace) -> int:
    """Run the action."""
    code: int = namespace.action(namespace)
    return code


def _check(namespace: argparse.Namespace) -> int:
    from worker.backends.http.credentials import check_key_files  # noqa: PLC0415 - `show` needs no key
    from worker.backends.http.tls import check_tls_files  # noqa: PLC0415 - nor certificates
    from worker.policy.engine import load_policy  # noqa: PLC0415 - nor rules

    settings = settings_from(namespace)
    load_policy(settings.policy.rules)
    check_key_files(settings)
    check_tls_files(settings)
    if settings.payloads.is_used:
        from worker.payloads.stores import build_payloads  # noqa: PLC0415 - most workers need none of it

        build_payloads(settings)
    print(f"{namespace.config}: good")
    return 0


def _show(namespace: argparse.Namespace) -> int:
    import yaml  # noqa: PLC0415 - `check` prints none

    print(yaml.safe_dump(settings_from(namespace).model_dump(mode="json"), sort_keys=False), end="")
    return 0
