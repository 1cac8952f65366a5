"""
Statistics of a finished run from the answers it wrote: `inference-worker report`.

    lines -> `sample` (what one line tells) -> `statistics` (counts, constant memory) -> `results` (frozen)
          -> `text`, JSON, or `page` (HTML with `plots`, drawn by `svg`)

Everything but `read` is pure.
"""

from worker.client.report.page import render_page
from worker.client.report.read import read_report
from worker.client.report.results import MIN_TAIL, RunReport
from worker.client.report.text import render_text

__all__ = ["MIN_TAIL", "RunReport", "read_report", "render_page", "render_text"]
