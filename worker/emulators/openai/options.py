"""
Every setting of the simulated server: the readers of single values, one frozen value, one table of how each is read.

The command line, `POST /sim/control` and tests all use `with_changes`, so a setting has one name, one grammar and one
error text.  A reader turns a value as a person writes it (command line text or JSON) into a checked Python value and
raises ValueError with what it accepts; its caller adds the name of the setting.  `docs/simbackend.md` must name every
option; a test compares them.
"""

import argparse
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, cast

from worker.emulators.openai.dialects import DIALECTS
from worker.emulators.openai.engine_model import ENGINES
from worker.emulators.openai.timing import (
    CapacityPlan,
    Latency,
    RetryAfter,
    parse_capacity,
    parse_latency,
    parse_rate,
    parse_retry_after,
)
from worker.errors import did_you_mean

Reader = Callable[[Any], Any]


def integer(low: int, high: int | None = None) -> Reader:
    """Read an integer from `low` to `high`; None is no upper bound."""

    def read(value: object) -> int:
        number = value
        if isinstance(value, str):
            try:
                number = int(value)
            except ValueError:
                number = None
        too_high = high is not None and isinstance(number, int) and number > high
        if isinstance(number, bool) or not isinstance(number, int) or number < low or too_high:
            allowed = f"from {low} to {high}" if high is not None else f"of at least {low}"
            raise ValueError(f"must be an integer {allowed}, not {value!r}")
        return number

    return read


def share(value: object) -> float:
    """Read a number from 0 to 1."""
    try:
        number = float(cast("Any", value))
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not 0 <= number <= 1:
        raise ValueError(f"must be a number from 0 to 1, not {value!r}")
    return number


def choice(*allowed: object) -> Reader:
    """Read one of some values; a text that looks like one of them counts."""

    def read(value: object) -> Any:
        for one in allowed:
            same = value == one and not isinstance(value, bool)
            if same or (isinstance(value, str) and value == str(one)):
                return one
        known = [str(one) for one in allowed]
        raise ValueError(f"must be one of {', '.join(known)}, not {value!r}{did_you_mean(str(value), known)}")

    return read


def names(value: object) -> tuple[str, ...]:
    """Read a list of names, or a text with commas between them."""
    listed = value.split(",") if isinstance(value, str) else value
    if not isinstance(listed, list | tuple) or not all(isinstance(name, str) and name.strip() for name in listed):
        raise ValueError(f"must be a list of names (or a text with commas between them), not {value!r}")
    return tuple(name.strip() for name in listed)


def secret(value: object) -> str:
    """Read a key: printable ASCII; its value never stands in the error."""
    if not isinstance(value, str) or not value.strip() or not value.isascii() or not value.isprintable():
        raise ValueError("must be a text of printable ASCII characters")
    return value


def flag(value: object) -> bool:
    """Read true or false."""
    if not isinstance(value, bool):
        raise ValueError(f"must be true or false, not {value!r}")  # noqa: TRY004 - a reader promises ValueError
    return value


def text(value: object) -> str:
    """Read any text."""
    if not isinstance(value, str):
        raise ValueError(f"must be a text, not {value!r}")  # noqa: TRY004 - a reader promises ValueError
    return value


def texts(value: object) -> dict[str, str]:
    """Read an object whose values are texts."""
    if not isinstance(value, dict) or not all(isinstance(inner, str) for inner in value.values()):
        raise ValueError(f"must be an object of texts, not {value!r}")
    return dict(value)


def headers(value: object) -> dict[str, str]:
    """Read HTTP headers: an object of texts without line breaks."""
    read = texts(value)
    if any(not name or any(mark in name + inner for mark in "\r\n\0") for name, inner in read.items()):
        raise ValueError("header names and values must not contain line breaks")
    return read


def optional(read: Reader) -> Reader:
    """Read with `read`, or null and `none` as None."""
    return lambda value: None if value is None or value == "none" else read(value)


def some_names(value: object) -> tuple[str, ...]:
    """Read a list of at least one name."""
    listed = names(value)
    if not listed:
        raise ValueError("must have at least one name")
    return listed


def seconds(value: object) -> float:
    """Read a number of seconds, which may be negative."""
    try:
        number = float(cast("Any", value))
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number):
        raise ValueError(f"must be a number of seconds, not {value!r}")
    return number


def aws_key(value: object) -> str:
    """Read credentials of AWS; their values never stand in the error."""
    text = secret(value)
    parts = text.split(":")
    if len(parts) not in {2, 3} or not all(parts):
        raise ValueError("must be ID:SECRET or ID:SECRET:TOKEN")
    return text


EXAMPLE_KEY = "AKIAIOSFODNN7EXAMPLE:wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"
"""AWS's own example (https://docs.aws.amazon.com/IAM/latest/UserGuide/security-creds.html)."""


@dataclass(frozen=True, slots=True)
class SimOptions:
    """
    How the simulated server behaves when nothing is broken.

    The defaults make the fastest honest server: no latency, no limits.  The command line's own default for `latency` is
    50 ms, so that a rehearsal looks like one, unless it names an engine.
    """

    seed: int = 0
    """Any integer; the same seed and the same request give the same answer, streamed and not."""
    latency: Latency = field(default_factory=Latency)
    """Time from request to answer, before generation time (`tokens_per_s`) is added."""
    ttft: Latency | None = None
    """Time to the first event of a stream; None uses `latency`."""
    tokens_per_s: float | None = None
    """Generation speed; adds answer tokens / tokens_per_s to every answer. None generates at once."""
    answer_tokens: int = 24
    """Mean length of an answer in tokens; lengths lie between half of it and one and a half."""
    reasoning_tokens: int = 0
    """Tokens of reasoning before each chat answer; 0 is none unless the request has `reasoning_effort`."""
    max_concurrency: int | None = None
    """Requests in service at once; None is unlimited."""
    overload: Literal["reject", "queue"] = "reject"
    """What happens above `max_concurrency`: an error at once, or waiting in a first-come queue."""
    overload_status: Literal[429, 503] = 429
    """Status of a rejection for `max_concurrency`, `max_queue` or the capacity's limit."""
    max_queue: int | None = None
    """Requests that may wait when `overload` is `queue`; None is unlimited."""
    rate: float | None = None
    """Requests per second let through (429 above it), with bursts of one second's worth; None is unlimited."""
    retry_after: RetryAfter | None = None
    """Hint sent with 429 and 503 answers of the limits; None sends none, as vLLM and SGLang do."""
    error_rate: float = 0.0
    """Share of requests answered 500; drawn anew for each repeat of a body, so that a retry can succeed."""
    capacity: CapacityPlan | None = None
    """Hidden capacity: latency grows above a knee, which may change over time; None is unlimited."""
    engine: str | None = None
    """Key of `ENGINES`: its model says when each token comes, instead of latency and speeds; None is no model."""
    api_key: str | None = field(default=None, repr=False)
    """Required as `Authorization: Bearer KEY` (or Azure's `api-key: KEY`); None requires no key. Never shown."""
    models: tuple[str, ...] = ()
    """Model names that exist (404 for others); empty accepts every name."""
    sagemaker: bool = False
    """Serve Amazon SageMaker's `/endpoints/NAME/invocations` and `.../invocations-response-stream` as well."""
    aws_key: str = field(default=EXAMPLE_KEY, repr=False)
    """`ID:SECRET` or `ID:SECRET:TOKEN` with which those must be signed.  Never shown, unless it is the example."""
    endpoints: tuple[str, ...] = ()
    """Names of SageMaker endpoints that exist; empty accepts every name."""
    variants: tuple[str, ...] = ("AllTraffic",)
    """Names of their production variants."""
    clock_skew_s: float = 0.0
    """Seconds by which the clock that signatures are compared with differs from this machine's."""
    prompt_tokens_per_s: float | None = None
    """Speed at which prompts are computed; adds what is not cached / prompt_tokens_per_s to every answer, before its
    first token. None computes at once."""
    prefix_cache: int | None = None
    """Tokens of prompts that are kept: what a prompt begins with is not computed again. None keeps nothing."""
    context_window: int = 131_072
    """Tokens of prompt plus `max_tokens` that fit; more is a 400 with the dialect's context-length error."""
    dialect: str = "openai"
    """Whose error bodies and stream shapes to use; a key of `DIALECTS`."""
    zero_cost: bool = False
    """Answer inference paths with prepared bytes, unread: no validation, no identities; for benchmarks."""
    control_port: int | None = None
    """Port of the second listener, which serves `/sim/` even while the first refuses; None is port + 1, 0 is any."""

    @classmethod
    def of(cls, **settings: Any) -> "SimOptions":
        """
        Return options from settings as people write them: `SimOptions.of(latency="50ms", retry_after="2s")`.

        Raises:
            ValueError: unknown names or bad values; every fault is in the one message.
        """
        return with_changes(cls(), settings)


FIXED = frozenset({"zero_cost", "control_port", "sagemaker"})
"""Settings that a running server does not change."""
INSTEAD_OF_ENGINE = ("latency", "ttft", "tokens_per_s", "prompt_tokens_per_s", "capacity", "zero_cost")
"""Settings that say how long an answer takes, as an engine does."""


SETTINGS: Mapping[str, Reader] = {
    "seed": integer(-(2**63)),
    "latency": parse_latency,
    "ttft": optional(parse_latency),
    "tokens_per_s": optional(parse_rate),
    "answer_tokens": integer(1, 100_000),
    "reasoning_tokens": integer(0, 100_000),
    "max_concurrency": optional(integer(1)),
    "overload": choice("reject", "queue"),
    "overload_status": choice(429, 503),
    "max_queue": optional(integer(0)),
    "rate": optional(parse_rate),
    "retry_after": parse_retry_after,
    "error_rate": share,
    "capacity": parse_capacity,
    "engine": optional(choice(*ENGINES)),
    "api_key": optional(secret),
    "models": names,
    "sagemaker": flag,
    "aws_key": aws_key,
    "endpoints": names,
    "variants": some_names,
    "clock_skew_s": seconds,
    "prompt_tokens_per_s": optional(parse_rate),
    "prefix_cache": optional(integer(16)),
    "context_window": integer(1),
    "dialect": choice(*DIALECTS),
    "zero_cost": flag,
    "control_port": optional(integer(0, 65_535)),
}
"""How each setting is read from text or JSON; each raises ValueError with what is allowed."""


def with_changes(options: SimOptions, changes: Mapping[str, Any], *, running: bool = False) -> SimOptions:
    """
    Return the options with some settings changed.

    Args:
        options: What stays where `changes` says nothing.
        changes: Setting names and values, as text or JSON.
        running: Refuse what a running server cannot change.

    Raises:
        ValueError: unknown names or bad values; every fault is in the one message.
    """
    known = {name: read for name, read in SETTINGS.items() if not (running and name in FIXED)}
    faults = []
    if unknown := sorted(changes.keys() - known.keys()):
        faults.append(f"unknown settings: {', '.join(unknown)}; there are {', '.join(known)}")
    read_values: dict[str, Any] = {}
    for name in changes.keys() & known.keys():
        try:
            read_values[name] = known[name](changes[name])
        except ValueError as error:
            faults.append(f"{name}: {error}")
    if faults:
        raise ValueError("; ".join(sorted(faults)))
    changed = replace(options, **read_values)
    if changed.engine is not None:
        plain = SimOptions()
        if others := [name for name in INSTEAD_OF_ENGINE if getattr(changed, name) != getattr(plain, name)]:
            raise ValueError(f"engine: its model says how long an answer takes; it goes without {', '.join(others)}")
    return changed


def as_json(options: SimOptions) -> dict[str, Any]:
    """Return the settings as `with_changes` reads them; the API key is masked."""
    shown: dict[str, Any] = {}
    for item in fields(options):
        value = getattr(options, item.name)
        if isinstance(value, Latency | RetryAfter):
            value = str(value)
        elif isinstance(value, CapacityPlan):
            value = value.as_json()
        elif isinstance(value, tuple):
            value = list(value)
        shown[item.name] = value
    if options.api_key is not None:
        shown["api_key"] = "********"
    if options.aws_key != EXAMPLE_KEY:
        shown["aws_key"] = options.aws_key.partition(":")[0] + ":********"
    return shown


_ARGUMENTS: tuple[tuple[str, str, str], ...] = (
    ("latency", "TIME", "50ms, uniform:LOW,HIGH or lognormal:MEDIAN,SIGMA until an answer (default: 50ms)"),
    ("ttft", "TIME", "the same, until the first event of a stream (default: as --latency)"),
    ("tokens-per-s", "N", "generation speed (default: at once)"),
    ("answer-tokens", "N", "mean length of an answer (default: 24)"),
    ("reasoning-tokens", "N", "tokens of reasoning before each chat answer (default: 0)"),
    ("max-concurrency", "N", "requests in service at once (default: unlimited)"),
    ("overload", "reject|queue", "what happens above --max-concurrency (default: reject)"),
    ("overload-status", "429|503", "status of a rejection (default: 429)"),
    ("max-queue", "N", "requests that may wait with --overload queue (default: unlimited)"),
    ("rate", "N/s", "requests let through, also N/min or N/h; 429 above (default: unlimited)"),
    ("retry-after", "HINT", "none, auto, 2s, date:30s or ms:1500ms with each rejection (default: none)"),
    ("error-rate", "F", "share of requests answered 500, 0 to 1 (default: 0)"),
    ("capacity", "PLAN", "hidden capacity SECONDS:KNEE/LIMIT,...: for example 0:16/32,30:4/8 (default: unlimited)"),
    ("engine", "NAME", f"{'|'.join(ENGINES)}: the time of each token from a model of that engine (default: none)"),
    ("api-key", "KEY", "require Authorization: Bearer KEY (default: none)"),
    ("models", "A,B", "model names that exist (default: every name is accepted)"),
    ("aws-key", "ID:SECRET", "with which requests to SageMaker must be signed (default: AWS's example)"),
    ("endpoints", "A,B", "SageMaker endpoints that exist (default: every name is accepted)"),
    ("variants", "A,B", "production variants of them (default: AllTraffic)"),
    ("clock-skew-s", "S", "by how much SageMaker's clock differs from this one (default: 0)"),
    ("prompt-tokens-per-s", "N", "speed at which prompts are computed (default: at once)"),
    ("prefix-cache", "N", "tokens of prompts that are kept and not computed again (default: none)"),
    ("context-window", "N", "tokens of prompt and answer that fit (default: 131072)"),
    ("dialect", "NAME", f"{'|'.join(DIALECTS)}: error bodies and stream shapes (default: openai)"),
    ("seed", "S", "same seed and request, same answer (default: 0)"),
    ("control-port", "N", "port where /sim/ stays reachable while the server refuses (default: --port + 1)"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add every option of the simulated server, with `--host` and `--port`, to a parser."""
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on, 0 is any (default: 8000)")
    for name, shape, meaning in _ARGUMENTS:
        parser.add_argument(f"--{name}", metavar=shape, default=None, help=meaning)
    parser.add_argument(
        "--sagemaker", action="store_true", help="serve the operations of Amazon SageMaker's runtime as well"
    )
    parser.add_argument(
        "--zero-cost", action="store_true", help="prepared answers, requests unread: for benchmarks of the caller"
    )


def options_from(namespace: argparse.Namespace) -> SimOptions:
    """
    Return the options that parsed arguments describe; latency is 50 ms unless they say otherwise or name an engine.

    Raises:
        ValueError: bad values; every fault is in the one message.
    """
    given = {name: value for name in SETTINGS if (value := getattr(namespace, name, None)) is not None}
    if not given.get("zero_cost") and given.get("engine", "none") == "none":
        given.setdefault("latency", "50ms")
    return with_changes(SimOptions(), given)
