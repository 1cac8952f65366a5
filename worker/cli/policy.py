"""
`inference-worker policy explain`: what the worker would do about an answer, and which rule says so.

Works without any backend or broker; with `--config` the operator's rules and hooks take part.
"""

import argparse
import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

from worker.cli.parser import describe
from worker.errors import SettingsError, did_you_mean

Kind = TypeVar("Kind", bound=StrEnum)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's one action."""
    examples = [
        "inference-worker policy explain --status 429 --body @answer.json",
        "inference-worker policy explain --fault connection_lost --delivery-attempt 3",
        "inference-worker policy explain --status 403 --config worker.yaml",
        "inference-worker policy explain --sagemaker ModelError --original-status 503",
    ]
    describe(parser, "Say what the worker does about errors.", examples=examples)
    actions = parser.add_subparsers(metavar="ACTION", required=True, help="what to do")
    explain = actions.add_parser("explain", help="print the decision about an answer and the rule that made it")
    describe(
        explain,
        "Print what the worker would do about the end of an attempt, and which rule says so. It asks the function that "
        "the worker asks, and needs neither backend nor broker.",
        examples=examples,
    )
    explain.add_argument("--config", metavar="FILE", help="settings with rules of your own")
    explain.add_argument("--status", type=int, help="HTTP status; leave out with --fault")
    explain.add_argument("--body", default="", help="response body, or @FILE, or @- for standard input")
    explain.add_argument("--header", action="append", default=[], metavar="NAME:VALUE", help="may be repeated")
    explain.add_argument("--fault", help="what broke without a response, e.g. connect, connection_lost, total_timeout")
    explain.add_argument("--phase", default="parse", help="how far the attempt came (parse)")
    explain.add_argument("--path", default="/v1/chat/completions", help="of the request (/v1/chat/completions)")
    explain.add_argument("--model", help="of the request")
    explain.add_argument("--backend", default="default", help="name of the route")
    explain.add_argument("--in-stream", action="store_true", help="the error came inside a stream")
    explain.add_argument("--after-text", action="store_true", help="... when some text had come")
    aws = explain.add_argument_group(
        "Amazon SageMaker", "an error by name, in place of --status; --body: its message, or the model's"
    )
    aws.add_argument("--sagemaker", metavar="NAME", help="e.g. ThrottlingException, ModelError, ModelStreamError")
    aws.add_argument("--original-status", type=int, default=500, metavar="N", help="of a ModelError (500)")
    aws.add_argument("--error-code", metavar="CODE", help="of a ModelStreamError (StreamBroken)")
    delivery = explain.add_argument_group("the delivery", "what was spent on it; defaults: its first attempt")
    delivery.add_argument("--delivery-attempt", type=int, metavar="N", help="the broker's count, from 1")
    delivery.add_argument("--max-delivery-attempts", type=int, metavar="N", help="of the dead-letter policy")
    delivery.add_argument("--attempts", type=int, default=1, metavar="N", help="in this process, from 1")
    delivery.add_argument("--outage-attempts", type=int, default=0, metavar="N", help="of them attributed to outages")
    delivery.add_argument("--continuations", type=int, default=0, metavar="N", help="times a stream was resumed")
    delivery.add_argument(
        "--can-resume", action="store_true", help="the stream left text that the next attempt can use"
    )
    delivery.add_argument("--message-age", type=float, default=0.0, metavar="S", help="since it was published")
    delivery.add_argument("--held", type=float, default=0.0, metavar="S", help="time it has been held")
    delivery.add_argument("--lease-left", type=float, metavar="S", help="default: all of pubsub.max_lease_duration_s")
    delivery.add_argument("--deadline-left", type=float, metavar="S", help="until the request's deadline")
    blame = explain.add_argument_group("other messages of the same model", "defaults: none is known of")
    blame.add_argument(
        "--others-served", action="store_true", help="another one was served by an attempt that began after this failed"
    )
    blame.add_argument(
        "--others-failing", type=int, default=0, metavar="N", help="other ones that failed since one was served"
    )
    blame.add_argument("--under-way", type=int, default=0, metavar="N", help="attempts of other ones, not yet ended")
    blame.add_argument(
        "--failures", type=int, metavar="N", help="of this message, over all deliveries, from 1; default: --attempts"
    )
    blame.add_argument(
        "--failing-share", type=float, default=0.0, metavar="X", help="that fail though others are served, 0 to 1"
    )
    around = explain.add_argument_group("around it")
    around.add_argument("--draining", action="store_true", help="the worker is shutting down")
    around.add_argument("--breaker-open", metavar="CLASS", help="the breaker is open, by errors of this class")
    around.add_argument(
        "--forbidden-in-a-row",
        type=int,
        default=0,
        metavar="N",
        help="models or paths of the route that got a 403, this one included, with nothing served for a minute",
    )


def run(namespace: argparse.Namespace) -> int:
    """Print the verdict and the way to it."""
    from worker.policy.blame import Blame  # noqa: PLC0415
    from worker.policy.budgets import Budget  # noqa: PLC0415
    from worker.policy.engine import load_policy  # noqa: PLC0415
    from worker.policy.explain import explain  # noqa: PLC0415
    from worker.policy.judge import BackendHealth  # noqa: PLC0415
    from worker.policy.model import ErrorClass, ErrorEvent, Fault, Phase  # noqa: PLC0415
    from worker.settings.load import load_settings  # noqa: PLC0415
    from worker.settings.schema import Settings  # noqa: PLC0415

    if [namespace.status, namespace.fault, namespace.sagemaker].count(None) != 2:  # noqa: PLR2004 - one of three
        raise SettingsError(["policy explain: give --status, --fault or --sagemaker, one of them"])
    failures = namespace.attempts if namespace.failures is None else namespace.failures
    _check_blame(failures, namespace.others_failing, namespace.under_way, namespace.failing_share)
    settings = load_settings(namespace.config) if namespace.config else Settings()
    if namespace.sagemaker is not None:
        _as_sagemaker_sends_it(namespace)
    event = ErrorEvent(
        backend=namespace.backend,
        path=namespace.path,
        model=namespace.model,
        phase=_member("--phase", Phase, namespace.phase),
        status=namespace.status,
        headers=_headers(namespace.header),
        body=_body(namespace.body),
        fault=_member("--fault", Fault, namespace.fault) if namespace.fault else None,
        in_stream=namespace.in_stream,
        has_partial=namespace.after_text,
        delivery_attempt=namespace.delivery_attempt,
        attempts=namespace.attempts,
    )
    lease = settings.pubsub.max_lease_duration_s
    budget = Budget(
        max_delivery_attempts=namespace.max_delivery_attempts,
        delivery_attempt=namespace.delivery_attempt,
        message_age_s=namespace.message_age,
        max_message_age_s=settings.pubsub.max_message_age_s,
        lease_left_s=lease if namespace.lease_left is None else namespace.lease_left,
        deadline_left_s=namespace.deadline_left,
        held_s=namespace.held,
        hold_max_s=settings.policy.hold_max_s or lease,
        attempts=namespace.attempts,
        counted_attempts=namespace.attempts - namespace.outage_attempts,
        continuations=namespace.continuations,
        is_draining=namespace.draining,
        reply_on_last_attempt=settings.policy.reply_on_last_attempt,
    )
    opened_by = _member("--breaker-open", ErrorClass, namespace.breaker_open) if namespace.breaker_open else None
    explanation = explain(
        load_policy(settings.policy.rules, hook_timeout_s=settings.policy.hook_timeout_s),
        event,
        budget,
        BackendHealth(stopped_by=opened_by),
        blame=Blame(
            failures=failures,
            is_contradicted=namespace.others_served,
            is_served_since=namespace.others_served,
            others_failing=namespace.others_failing,
            failing_share=namespace.failing_share,
            undecided=namespace.under_way,
        ),
        can_resume=namespace.can_resume,
        forbidden_in_a_row=namespace.forbidden_in_a_row,
    )
    sys.stdout.write(explanation.render())
    return 0


def _as_sagemaker_sends_it(namespace: argparse.Namespace) -> None:
    """Put an error of SageMaker into the options as the worker would see it: status, header, body."""
    from worker.wire.sagemaker import ERROR_STATUSES, ERROR_TYPE, STREAM_ERROR_CODES, STREAM_ERRORS  # noqa: PLC0415

    name, text = namespace.sagemaker, _body(namespace.body).decode("utf-8", "replace")
    known = (*ERROR_STATUSES, *STREAM_ERRORS)
    if name not in known:
        raise SettingsError([f"--sagemaker {name}: must be one of {', '.join(known)}{did_you_mean(name, known)}"])
    fields: dict[str, object] = {"Message": text or "no message given"}
    namespace.status = ERROR_STATUSES.get(name, 200)
    if name == "ModelError":
        fields |= {"OriginalStatusCode": namespace.original_status, "OriginalMessage": text}
    if name in STREAM_ERRORS:
        namespace.in_stream, namespace.phase = True, "stream"
        code = namespace.error_code or STREAM_ERROR_CODES[-1]
        fields["ErrorCode"] = code if name == STREAM_ERRORS[0] else name
    namespace.header = [*namespace.header, f"{ERROR_TYPE}:{name}"]
    namespace.body = json.dumps(fields)


def _check_blame(failures: int, others_failing: int, under_way: int, failing_share: float) -> None:
    faults = []
    if failures < 1:
        faults.append(f"--failures {failures}: the failure that is asked about is the first at least")
    if others_failing < 0:
        faults.append(f"--others-failing {others_failing}: must not be negative")
    if under_way < 0:
        faults.append(f"--under-way {under_way}: must not be negative")
    if not 0.0 <= failing_share <= 1.0:
        faults.append(f"--failing-share {failing_share:g}: must be between 0 and 1")
    if faults:
        raise SettingsError(faults)


def _member(option: str, kind: type[Kind], value: str) -> Kind:
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
