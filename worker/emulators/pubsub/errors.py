"""
The errors of the embedded server, in the words of the real service.

::

    PubSubError                    has the name of its gRPC status; `rpc.abort` answers with that status
    ├── NotFoundError              permanent: no such topic or subscription
    ├── AlreadyExistsError         permanent: the name is taken
    ├── InvalidArgumentError       permanent: the request itself is wrong
    │   └── AckIdError             permanent: an acknowledgement came too late (exactly-once delivery)
    ├── OutOfRangeError            permanent: a number of the dead-letter policy is out of its range
    ├── FailedPreconditionError    permanent: the state does not allow it (detached, mixed ordering keys)
    ├── UnimplementedError         permanent: only the real service has this feature
    ├── UnavailableError           retryable: the server is stopping
    └── InjectedError              a fault that a test set through `faults`

The engine imports no gRPC, so a status is a name here (https://grpc.github.io/grpc/core/md_doc_statuscodes.html).
Texts are those of Cloud Pub/Sub where they are known, because clients compare them and users search for them.
"""

from collections.abc import Callable, Mapping


class PubSubError(Exception):
    """
    Base class of the errors a client may get.

    Attributes:
        status: Name of the gRPC status, for example `NOT_FOUND`.
    """

    status: str = "UNKNOWN"


class NotFoundError(PubSubError):
    """The resource does not exist; permanent until it is created."""

    status = "NOT_FOUND"

    @classmethod
    def of(cls, path: str) -> "NotFoundError":
        """Return the error for a resource, worded as the service does, with its short name."""
        return cls(f"Resource not found (resource={path.rsplit('/', 1)[-1]}).")


class AlreadyExistsError(PubSubError):
    """The name is taken; permanent until the resource is deleted."""

    status = "ALREADY_EXISTS"

    @classmethod
    def of(cls, path: str) -> "AlreadyExistsError":
        """Return the error for a resource, worded as the service does, with its short name."""
        return cls(f"Resource already exists in the project (resource={path.rsplit('/', 1)[-1]}).")


class InvalidArgumentError(PubSubError):
    """The request is wrong in every state of the server; permanent."""

    status = "INVALID_ARGUMENT"


class AckIdError(InvalidArgumentError):
    """
    The leases of some ack ids of an exactly-once subscription have ended; the other ids were applied.

    Attributes:
        failures: Ack id to reason; the metadata of the `ErrorInfo` in the status details.

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
    """Only the real service has this feature; permanent."""

    status = "UNIMPLEMENTED"

    @classmethod
    def of(cls, feature: str) -> "UnimplementedError":
        """Return the error for a feature."""
        return cls(f"The embedded Pub/Sub server does not implement {feature}.")


class UnavailableError(PubSubError):
    """The server is stopping; retryable, and clients reconnect by themselves."""

    status = "UNAVAILABLE"


class InjectedError(PubSubError):
    """A fault set by a test; retryable or permanent according to its status."""

    def __init__(self, status: str, message: str) -> None:
        self.status = status
        super().__init__(message)


def too_small(field: str, given: object, minimum: object) -> str:
    """Return the text of the service for a value below its minimum."""
    return f"The value for {field} is too small. You passed {given} in the request, but the minimum value is {minimum}."


def too_large(field: str, given: object, maximum: object) -> str:
    """
    Return the text of the service for a value above its maximum.

    Source: https://github.com/googleapis/google-cloud-python/issues/7108
    """
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
