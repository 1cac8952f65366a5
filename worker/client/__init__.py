"""
A file as a run: input lines become requests, answers become output lines.

This package knows the wire and no broker: the caller passes the functions that publish and receive (`ports`).

    reader, resumed = open_input(input_path), resume_output(output_path)
    run = BatchRun(reader, resumed.writer, publish, answers, window=N, answered=resumed.answered)
    summary = await run.run()
    print_summary(summary, sys.stderr)
"""

from worker.client.errors import ClientError
from worker.client.local import BatchRun
from worker.client.ports import AnswerHandler
from worker.client.progress import Display, build_display
from worker.client.summary import InputCount, Summary, print_summary

__all__ = [
    "AnswerHandler",
    "BatchRun",
    "ClientError",
    "Display",
    "InputCount",
    "Summary",
    "build_display",
    "print_summary",
]
