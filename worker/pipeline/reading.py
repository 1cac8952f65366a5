"""What is taken in: a message's bytes as a request, if this worker's operator allows it."""

from fnmatch import fnmatchcase

from worker.errors import MessageError
from worker.settings.schema import RequestSettings
from worker.wire.message import ReceivedMessage, RequestMessage, decode_request


class RequestReader:
    """
    Reads requests.

    Args:
        rules: Paths and headers that may be asked for.
    """

    def __init__(self, rules: RequestSettings) -> None:
        self._rules = rules
        self._usual_paths = frozenset(rules.allowed_paths)

    def read(self, message: ReceivedMessage) -> RequestMessage:
        """
        Return the request of a message; its body is there.

        Raises:
            MessageError: It cannot be read, or asks for what is not allowed; permanent.
        """
        request = decode_request(message.data)
        path = request.path.partition("?")[0]
        if path not in self._usual_paths and not any(
            fnmatchcase(path, pattern) for pattern in self._rules.allowed_paths
        ):
            raise MessageError(f"path {path} is not allowed", param="path", metadata=request.metadata)
        for name in request.headers:
            if name not in self._rules.allowed_headers:
                raise MessageError(f"header {name!r} is not allowed", param="headers", metadata=request.metadata)
        if request.body is None:
            raise MessageError("body_uri is not enabled", param="body_uri", metadata=request.metadata)
        return request
