"""
What the embedded server refuses, as the real service words it.

::

    PubSubError                    carries the gRPC status name; the shell turns it into a status
    ├── NotFoundError              permanent: no such topic or subscription
    ├── AlreadyExistsError         permanent: the name is taken
    ├── InvalidArgumentError       permanent: the request itself is wrong
    │   └── AckIdError             permanent: an acknowledgement came too late (exactly-once delivery)
    ├── OutOfRangeError            permanent: a number of the dead-letter policy is out of its range
    ├── FailedPreconditionError    permanent: right request, wrong state (detached, mixed ordering keys)
    ├── UnimplementedError         permanent: the real service can, this server does not
    ├── UnavailableError           retryable: the server is going away
    └── InjectedError              whatever a test asked for through `faults`

The engine imports no gRPC, so a status is a name here (https://grpc.github.io/grpc/core/md_doc_statuscodes.html).
Texts follow those seen from Cloud Pub/Sub where one is known, because clients and their users search for them.
"""

from collections.abc import Callable, Mapping


class PubSubError(Exception):
    """
    Root of every refusal; permanent unless a fault test chose another status.

    Attributes:
        status: Name of the gRPC status, for example `NOT_FOUND`.
    """

    status: str = "UNKNOWN"


class NotFoundError(PubSubError):
    """No such resource; permanent until somebody creates it."""

    status = "NOT_FOUND"

    @classmethod
    def of(cls, path: str) -> "NotFoundError":
        """Word it as the service does, with the short name only."""
        return cls(f"Resource not found (resource={path.rsplit('/', 1)[-1]}).")


class AlreadyExistsError(PubSubError):
    """The name is taken; permanent until somebody deletes it."""

    status = "ALREADY_EXISTS"

    @classmethod
    def of(cls, path: str) -> "AlreadyExistsError":
        """Word it as the service does, with the short name only."""
        return cls(f"Resource already exists in the project (resource={path.rsplit('/', 1)[-1]}).")


class InvalidArgumentError(PubSubError):
    """The request is wrong whatever the server's state; permanent."""

    status = "INVALID_ARGUMENT"


class AckIdError(InvalidArgumentError):
    """
    Some ack ids of an exactly-once subscription no longer hold a lease; the others were applied.

    Attributes:
        failures: Ack id to reason, the metadata of the `ErrorInfo` in the status details.

    Source: https://cloud.google.com/pubsub/docs/exactly-once-delivery
    """

    def __init__(self, failures: Mapping[str, str]) -> None:
        self.failures = failures
        super().__init__(
            "Some acknowledgement ids in the request were invalid. This could be because the acknowledgement ids "
            "have expired or the acknowledgement ids were malformed."
        )


class OutOfRangeError(PubSubError):
    """A number is outside its documented range; permanent."""

    status = "OUT_OF_RANGE"


class FailedPreconditionError(PubSubError):
    """The resource is in a state that does not allow this; permanent until the state changes."""

    status = "FAILED_PRECONDITION"


class UnimplementedError(PubSubError):
    """The real service can do it, this server does not; permanent."""

    status = "UNIMPLEMENTED"

    @classmethod
    def of(cls, feature: str) -> "UnimplementedError":
        """Say which feature, and that this is not the real service."""
        return cls(f"The embedded Pub/Sub server does not implement {feature}.")


class UnavailableError(PubSubError):
    """The server is stopping; retryable, clients reconnect on their own."""

    status = "UNAVAILABLE"


class InjectedError(PubSubError):
    """A fault that a test asked for; retryable or permanent as the status says."""

    def __init__(self, status: str, message: str) -> None:
        self.status = status
        super().__init__(message)


def too_small(field: str, given: object, minimum: object) -> str:
    """Word a lower bound as the service does."""
    return f"The value for {field} is too small. You passed {given} in the request, but the minimum value is {minimum}."


def too_large(field: str, given: object, maximum: object) -> str:
    """Word an upper bound as the service does (https://github.com/googleapis/google-cloud-python/issues/7108)."""
    return f"The value for {field} is too large. You passed {given} in the request, but the maximum value is {maximum}."


def check_bounds(
    field: str,
    given: float,
    minimum: float,
    maximum: float,
    error: Callable[[str], PubSubError] = InvalidArgumentError,
) -> None:
    """Raise `error`, worded as the service does, unless the value lies within the bounds; both are inclusive."""
    if given < minimum:
        raise error(too_small(field, given, minimum))
    if given > maximum:
        raise error(too_large(field, given, maximum))
