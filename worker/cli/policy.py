"""
`inference-worker policy explain`: what the worker would do about an answer, and which rule says so.

Works without any backend or broker; with `--config` the operator's rules and hooks take part.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from worker.errors import SettingsError


def add_policy(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser("policy", help="what the worker does about errors")
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    explain = actions.add_parser("explain", help="print the decision about an answer and the rule that made it")
    explain.add_argument("--config", metavar="FILE", help="settings with rules of your own")
    explain.add_argument("--status", type=int, help="HTTP status; leave out with --fault")
    explain.add_argument("--body", default="", help="response body, or @FILE, or @- for standard input")
    explain.add_argument("--header", action="append", default=[], metavar="NAME:VALUE", help="may be repeated")
    explain.add_argument("--fault", help="what broke without a response, e.g. connect, connection_lost, total_timeout")
    explain.add_argument("--phase", default="parse", help="how far the attempt came (parse)")
    explain.add_argument("--path", default="/v1/chat/completions")
    explain.add_argument("--model")
    explain.add_argument("--backend", default="default", help="name of the route")
    explain.add_argument("--in-stream", action="store_true", help="the error came inside a stream")
    explain.add_argument("--delivery-attempt", type=int, help="the broker's count, from 1")
    explain.add_argument("--max-delivery-attempts", type=int, help="of the dead-letter policy")
    explain.add_argument("--attempts", type=int, default=1, help="tries in this process, from 1")
    explain.set_defaults(command=_explain)


def _explain(namespace: argparse.Namespace) -> int:
    from worker.pipeline.policies import build_policy  # noqa: PLC0415
    from worker.policy.budgets import Budget  # noqa: PLC0415
    from worker.policy.explain import explain  # noqa: PLC0415
    from worker.policy.model import ErrorEvent  # noqa: PLC0415
    from worker.settings.load import load_settings  # noqa: PLC0415
    from worker.settings.schema import Settings  # noqa: PLC0415

    if (namespace.status is None) == (namespace.fault is None):
        raise SettingsError(["policy explain: give --status or --fault, one of them"])
    settings = load_settings(namespace.config) if namespace.config else Settings()
    event = ErrorEvent(
        backend=namespace.backend,
        path=namespace.path,
        model=namespace.model,
        phase=_member("--phase", namespace.phase),
        status=namespace.status,
        headers=_headers(namespace.header),
        body=_body(namespace.body),
        fault=_member("--fault", namespace.fault) if namespace.fault else None,
        in_stream=namespace.in_stream,
        delivery_attempt=namespace.delivery_attempt,
        attempts=namespace.attempts,
    )
    lease = settings.pubsub.max_lease_duration_s
    budget = Budget(
        max_delivery_attempts=namespace.max_delivery_attempts,
        delivery_attempt=namespace.delivery_attempt,
        max_message_age_s=settings.pubsub.max_message_age_s,
        lease_left_s=lease,
        hold_max_s=settings.policy.hold_max_s or lease,
        attempts=namespace.attempts,
        reply_on_last_attempt=settings.policy.reply_on_last_attempt,
    )
    sys.stdout.write(explain(build_policy(settings, namespace.config), event, budget).render())
    return 0


def _member(option: str, value: str) -> Any:
    from worker.policy.model import Fault, Phase  # noqa: PLC0415

    kind: type[Fault | Phase] = Fault if option == "--fault" else Phase
    try:
        return kind(value)
    except ValueError:
        known = ", ".join(kind)
        raise SettingsError([f"{option} {value}: must be one of {known}"]) from None


def _headers(items: list[str]) -> dict[str, str]:
    headers = {}
    for item in items:
        name, colon, value = item.partition(":")
        if not colon:
            raise SettingsError([f"--header {item}: expected NAME:VALUE"])
        headers[name.strip().lower()] = value.strip()
    return headers


def _body(text: str) -> bytes:
    if not text.startswith("@"):
        return text.encode()
    if text == "@-":
        return sys.stdin.buffer.read()
    try:
        return Path(text[1:]).read_bytes()
    except OSError as error:
        raise SettingsError([f"--body {text}: {error.strerror}"]) from None
