"""
What can be wrong on the requester's side; all of it below `WorkerError`.

::

    ClientError
    ├── InputError              the input cannot be read; what was read before is answered
    ├── OutputError             the output cannot be written; what is in it stays
    └── DamagedStreamError      compressed bytes that no decompressor takes; becomes one of the two above

Each message is one sentence for the person at the terminal and begins with the name of the file.
"""

from worker.errors import WorkerError


class ClientError(WorkerError):
    """A run cannot go on; permanent until somebody changes the files or the command."""


class InputError(ClientError):
    """The input is missing, unreadable or damaged; permanent."""


class OutputError(ClientError):
    """The output cannot be opened, continued or written; permanent, though a full disk may be emptied."""


class DamagedStreamError(ClientError):
    """
    A compressed stream holds bytes that do not belong there; permanent.

    Attributes:
        offset: Where the member or frame with the damage begins, in bytes of the file.
    """

    def __init__(self, offset: int, detail: str) -> None:
        self.offset = offset
        super().__init__(f"is damaged in the part that begins at byte {offset} ({detail})")


def describe_os_error(error: OSError) -> str:
    """Return what an operating system's error means to somebody who named a file; no full stop."""
    match error:
        case FileNotFoundError():
            return "does not exist"
        case IsADirectoryError():
            return "is a directory"
        case NotADirectoryError():
            return "lies below something that is not a directory"
        case PermissionError():
            return "may not be opened (permission denied)"
        case BrokenPipeError():
            return "was closed by its reader"
    return error.strerror or str(error)
