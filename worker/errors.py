"""
The exception tree; whose fault it is decides what is done about it.

::

    WorkerError
    ├── SettingsError              the operator's: every fault in one message; exit code 2
    ├── MessageError               the requester's: answered with a 400, never retried
    ├── BackendError               the model server's or the network's: judged by `policy`; carries phase and fault
    ├── PayloadError               object storage's: a body that cannot be read is judged by `policy`
    ├── MetricSourceError          the engine's or Prometheus': the metric gate goes on with its last reading
    ├── AdmissionError             ours: this delivery may not start now
    │   ├── AdmissionTimeoutError  its budget of waiting is over
    │   ├── AdmissionMovedError    it may start elsewhere
    │   └── AdmissionClosedError   the worker is draining
    └── BrokerError                Pub/Sub's
        ├── BrokerResourceError    permanent: subscription or topic gone, permission refused; exit code 1
        └── PublishError           the answer is not on the topic
            ├── PublishRetryableError    may work in a moment: try the publish again, not the inference
            ├── PublishRefusedError      permanent for this topic: gone or forbidden; pauses the intake
            └── MessageRejectedError     the broker calls this message invalid, or a topic's schema forbids it
                └── MessageTooLargeError permanent for this message: over the broker's size limit by our own count

An `except` names the branch it can do something about.  `asyncio.CancelledError` is not in the tree: it is the only
exception that crosses from the processor to the broker adapter.
"""

from collections.abc import Iterable


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean ...?`, to end a message about a mistyped word; empty when no known word is near."""
    from difflib import get_close_matches  # noqa: PLC0415 - nothing else needs it

    near = get_close_matches(word, sorted(known), n=1, cutoff=0.7)
    return f"; did you mean {near[0]}?" if near else ""


def did_you_mean_file(path: str) -> str:
    """Return the same about the name of a missing file, from the files beside it."""
    from pathlib import Path  # noqa: PLC0415 - as above

    file = Path(path)
    try:
        return did_you_mean(file.name, [each.name for each in file.parent.iterdir()])
    except OSError:
        return ""


def how_to_get(extra: str, *, is_in_image: bool = True) -> str:
    """
    Return how an operator gets an extra that is missing, to end a message about it.

    It names no distribution to install from an index: this one is on none, and the first to take its name could put
    anything there.
    """
    checkout = f"in a checkout: .venv/bin/pip install --constraint requirements-dev.lock --editable '.[{extra}]'"
    image = "the image has it unless it was built with requirements-core.lock; "
    return f"the extra `{extra}` is not installed; {image if is_in_image else ''}{checkout}"


class WorkerError(Exception):
    """Root of everything this program raises deliberately."""

    @property
    def one_line(self) -> str:
        """The text for a log or a probe, where a line is a record."""
        return str(self)


class SettingsError(WorkerError):
    """
    The settings cannot be used; permanent until the operator changes them.

    Attributes:
        faults: One sentence for each fault, in the order of the settings.
    """

    def __init__(self, faults: list[str]) -> None:
        self.faults = faults
        super().__init__("unusable settings:\n" + "\n".join(f"  - {fault}" for fault in faults))

    @property
    def one_line(self) -> str:
        """Every fault on one line."""
        return "unusable settings: " + "; ".join(self.faults)


class MessageError(WorkerError):
    """
    The request message is not one; permanent.

    Attributes:
        reason: What is wrong, for the requester; names no internals.
        param: The top-level key at fault, or `None`.
        metadata: The message's metadata as raw JSON where it could be read, else `{}`.
    """

    def __init__(self, reason: str, *, param: str | None = None, metadata: bytes = b"{}") -> None:
        self.reason = reason
        self.param = param
        self.metadata = metadata
        super().__init__(reason)


class BackendError(WorkerError):
    """
    The attempt ended without a complete HTTP response; `policy` decides whether that is retryable.

    Attributes:
        fault: One of `policy.model.Fault`, by value.
        detail: The library's own words, for logs and the error envelope.
    """

    def __init__(self, fault: str, detail: str = "") -> None:
        self.fault = fault
        self.detail = detail
        super().__init__(f"{fault}: {detail}" if detail else fault)


class PayloadError(WorkerError):
    """
    A body could not be read from object storage or written to it.

    `policy` decides whether a read is retryable; a write is tried again as long as the lease can be kept.

    Attributes:
        fault: One of `policy.model.Fault` whose name begins with `payload_`, by value.
        detail: What is wrong, for logs and the error envelope.
    """

    def __init__(self, fault: str, detail: str = "") -> None:
        self.fault = fault
        self.detail = detail
        super().__init__(f"{fault}: {detail}" if detail else fault)


class MetricSourceError(WorkerError):
    """
    The numbers of a metric gate could not be read; retryable.

    Attributes:
        reason: `unreachable`, `refused` (another status than 2xx) or `unusable` (no such number in the answer).
        detail: What is wrong, for the log; without credentials.
    """

    def __init__(self, reason: str, detail: str) -> None:
        self.reason = reason
        self.detail = detail
        super().__init__(f"{reason}: {detail}")


class AdmissionError(WorkerError):
    """The delivery may not start now."""


class AdmissionTimeoutError(AdmissionError):
    """The budget of waiting is over; retryable by redelivery."""


class AdmissionMovedError(AdmissionError):
    """What it waited for has stopped, and something else works: it is to be admitted anew."""


class AdmissionClosedError(AdmissionError):
    """The worker is draining; retryable by redelivery."""


class BrokerError(WorkerError):
    """Something is wrong between us and Pub/Sub."""


class BrokerResourceError(BrokerError):
    """A subscription or topic is gone or refused to us; permanent: the process ends with exit code 1."""


class PublishError(BrokerError):
    """The broker did not confirm the message; it may have it all the same."""


class PublishRetryableError(PublishError):
    """Unavailable, timed out, over quota: publish again."""


class PublishRefusedError(PublishError):
    """Topic gone or permission refused: nothing can be published until an operator acts."""


class MessageRejectedError(PublishError):
    """The broker calls the message invalid: it may be the message, or a schema of the topic that no message fits."""


class MessageTooLargeError(MessageRejectedError):
    """Over the broker's limit by our own count, nothing was sent; permanent for the same bytes."""
