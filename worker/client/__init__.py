"""
The producer's and the consumer's side: lines in, one answer a line out.

Knows the wire and nothing of brokers: publishing and receiving are handed in (`ports`).  A run is put together as

    reader, resumed = open_run(input_path, output_path)
    with build_display(sys.stderr) as display:
        run = Drive(reader, resumed.writer, publish, answers, window=N, answered=resumed.answered, on_progress=display)
        summary = await run.run()
    print_summary(summary, sys.stderr)

and the worker that answers must have `COPY_ATTRIBUTES` in its setting `reply.copy_attributes`.
"""

from worker.client.answered import AnsweredLines
from worker.client.errors import ClientError, InputError, OutputError
from worker.client.io.files import LineReader, LineWriter, open_input, open_output
from worker.client.io.lines import COPY_ATTRIBUTES
from worker.client.local import Drive, DriveTuning, drive
from worker.client.ports import AnswerHandler, Answers, LineSink, LineSource, Publish
from worker.client.progress import Display, build_display
from worker.client.resume import Resumed, open_run, resume_output
from worker.client.summary import print_summary, summary_json
from worker.client.tally import Progress, Summary

__all__ = [
    "COPY_ATTRIBUTES",
    "AnswerHandler",
    "AnsweredLines",
    "Answers",
    "ClientError",
    "Display",
    "Drive",
    "DriveTuning",
    "InputError",
    "LineReader",
    "LineSink",
    "LineSource",
    "LineWriter",
    "OutputError",
    "Progress",
    "Publish",
    "Resumed",
    "Summary",
    "build_display",
    "drive",
    "open_input",
    "open_output",
    "open_run",
    "print_summary",
    "resume_output",
    "summary_json",
]
