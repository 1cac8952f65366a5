"""
`inference-worker setup`: the infrastructure of a worker, made or brought to what the settings say.

`desired` says what the settings want, `plan` compares that with what was found, `iam` knows who needs which role: all
three are pure.  `run` looks, prints and does.
"""

from worker.brokers.admin.apply import run_setup

__all__ = ["run_setup"]
