"""
Statistics of a finished run from the answers it wrote: `inference-worker report`.

    lines -> `sample` (one line) -> `statistics` (counts, constant memory) -> `results` (frozen values)
          -> `text`, JSON, or `page` (HTML with `plots`, drawn by `svg`)

Everything but `read_report` is pure.
"""

from worker.client.report.page import render_page
from worker.client.report.results import MIN_TAIL, Price, RunReport
from worker.client.report.statistics import read_report
from worker.client.report.text import render_text

__all__ = ["MIN_TAIL", "Price", "RunReport", "read_report", "render_page", "render_text"]
