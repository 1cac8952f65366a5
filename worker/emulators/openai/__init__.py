"""
A simulated OpenAI-compatible server for rehearsals, tests and benchmarks.

It answers like a model server without a model: deterministic by seed and request, with latency, limits and faults that
can be changed while it runs.  `docs/simbackend.md` is its manual.
"""

from worker.emulators.openai.control import ControlError
from worker.emulators.openai.options import SimOptions, add_arguments, options_from
from worker.emulators.openai.server import SimBackend, announce, serve
from worker.emulators.openai.stats import Stats
from worker.emulators.openai.thread import SimBackendThread
from worker.emulators.openai.timing import Latency, parse_latency

__all__ = [
    "ControlError",
    "Latency",
    "SimBackend",
    "SimBackendThread",
    "SimOptions",
    "Stats",
    "add_arguments",
    "announce",
    "options_from",
    "parse_latency",
    "serve",
]
