"""
A simulated OpenAI-compatible server for rehearsals, tests and benchmarks; never for production.

It answers like a model server without a model: deterministic by seed and request, with latency, limits and faults that
can be changed while it runs.  `docs/simbackend.md` is its manual.

Each module uses those named before it.  `timing`, `engine_model` and `options` are the settings, `dialects` the
differences between servers; `fields` and `validation` check a request; `seeded` and `generation` invent what is said,
`sse`, `answers` and `responses` are the bytes of it; `faults` and `control` are what goes wrong, `stats` counts.
Around these modules, `engine`, `transport`, `serving`, `dataplane` and `server` wait, write and listen.
"""

from worker.emulators.openai.options import SimOptions
from worker.emulators.openai.server import SimBackend, SimBackendThread

__all__ = ["SimBackend", "SimBackendThread", "SimOptions"]
