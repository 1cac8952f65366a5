"""Reads an output file into a report, line by line."""

from worker.client.errors import InputError
from worker.client.io.files import open_input
from worker.client.io.lines import MAX_LINE_BYTES
from worker.client.report.results import MIN_TAIL, RunReport
from worker.client.report.sample import NoAnswerError, read_sample
from worker.client.report.statistics import Statistics


def read_report(path: str, *, min_tail: int = MIN_TAIL) -> tuple[RunReport, InputError | None]:
    """
    Return the report about an output file and what kept it from being read to its end.

    A file that is still written, or was left behind by a kill, may be torn: what stands before the damage is counted.

    Args:
        path: A file (`.gz` and `.zst` are read as such), a named pipe, or `-` for standard input.
        min_tail: Values that must lie beyond a percentile for it not to be marked as weak.

    Raises:
        InputError: The file cannot be opened; permanent.
    """
    statistics = Statistics()
    failure: InputError | None = None
    reader = open_input(path)
    try:
        while lines := reader.read_lines():
            for line in lines:
                if not line.data:
                    statistics.add_unreadable(line.number, f"it is longer than {MAX_LINE_BYTES:,} bytes")
                    continue
                try:
                    statistics.add(read_sample(line.data))
                except NoAnswerError as error:
                    statistics.add_unreadable(line.number, str(error))
    except InputError as error:
        failure = error
    finally:
        reader.close()
    return statistics.report("standard input" if path == "-" else path, min_tail), failure
