"""
The errors of a run over a file; all of them are below `WorkerError`.

::

    ClientError
    ├── InputError              the input cannot be read; the lines before the fault are answered
    ├── OutputError             the output cannot be written; its answers stay
    ├── LedgerError             the ledger of a run cannot be used
    └── DamagedStreamError      damaged compressed bytes; becomes one of the two above

Each message is one sentence for the terminal and begins with the name of the file.
"""

from worker.errors import WorkerError


class ClientError(WorkerError):
    """A run cannot continue; permanent until the files or the command change."""


class InputError(ClientError):
    """The input is missing, unreadable or damaged; permanent."""


class OutputError(ClientError):
    """The output cannot be opened, continued or written; permanent, though a full disk may be emptied."""


class LedgerError(ClientError):
    """The ledger is missing, foreign, damaged or of another input, or cannot be written; permanent."""


class DamagedStreamError(ClientError):
    """
    A compressed stream holds bytes that cannot be decompressed; permanent.

    Attributes:
        offset: Start of the damaged member or frame, in bytes of the file.
    """

    def __init__(self, offset: int, detail: str) -> None:
        self.offset = offset
        super().__init__(f"is damaged in the part that begins at byte {offset} ({detail})")


def first_failure(failures: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the first failure of a task group, out of nested groups too."""
    first = failures.exceptions[0]
    return first_failure(first) if isinstance(first, BaseExceptionGroup) else first


def describe_os_error(error: OSError) -> str:
    """Return a phrase about the file that an operating system's error is about, without a full stop."""
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
