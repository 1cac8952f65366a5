"""
Which model server `inference-worker local` asks.

That of the command line, of the settings, of OpenAI's variables, or else a simulated one, in this order.
"""

import argparse
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worker.cli.children import Child
from worker.emulators.openai.options import SimOptions, with_changes
from worker.errors import SettingsError
from worker.policy.engine import load_policy
from worker.settings.load import load_settings, load_without_backend, openai_variables
from worker.settings.schema import NO_BACKEND, BackendSettings, Settings

PROJECT, REQUESTS, RESPONSES = "local", "requests", "responses"
ANYWHERE = "127.0.0.1:1"
"""Stands for an address that is not known yet, when the settings are checked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The model server of a run, and the settings that name it."""

    settings: Settings
    is_simulated: bool
    flags: Mapping[str, Any]
    """Settings that go to the worker on its command line."""
    environ: Mapping[str, str]
    """Settings with secrets, which go to the worker in its environment: command lines can be read by all users."""
    remark: str = ""
    """Where the address or the key came from, if not from the command line."""


def find_target(options: argparse.Namespace) -> Target:
    """
    Return the server that options, settings and OpenAI's variables name.

    Raises:
        SettingsError: Unusable; names every fault.
    """
    flags = _worker_settings(options)
    if options.backend_url:
        flags |= {"backend.base_url": options.backend_url, "backend.base_urls": "[]"}
    if options.api_key_file:
        flags["backend.api_key_file"] = str(Path(options.api_key_file).absolute())
    settings, openai = load_without_backend(options.config, flags=flags), openai_variables()
    has_backend = settings.backend is not None and settings.backend.base_url != NO_BACKEND
    is_configured = has_backend or bool(settings.routes)
    if options.simulated or not (is_configured or openai.base_url):
        return _simulated(options, flags)
    if faults := [f"--{name}: is of the simulated server; --simulated asks for that one" for name in _given(options)]:
        raise SettingsError(faults)
    remark = ""
    if not is_configured:
        flags["backend.base_url"], remark = openai.base_url, "OPENAI_BASE_URL"
    elif not has_backend:  # routes alone
        flags = {key: value for key, value in flags.items() if not key.startswith("backend.")}
    settings = load_settings(options.config, flags=flags)
    environ: dict[str, str] = {}
    if settings.backend is not None:
        environ = _headers(options, settings.backend)
        has_key = settings.backend.api_key is not None or settings.backend.api_key_file is not None
        if openai.api_key and not has_key and not settings.backend.is_sagemaker:
            environ["WORKER_BACKEND__API_KEY"] = openai.api_key
            remark += ", OPENAI_API_KEY" if remark else "OPENAI_API_KEY"
    settings = load_settings(options.config, flags=flags, environ={**os.environ, **environ})
    load_policy(settings.policy.rules)
    return Target(settings=settings, is_simulated=False, flags=flags, environ=environ, remark=remark)


def _given(options: argparse.Namespace) -> dict[str, str]:
    """Return the settings of the simulated server that the command line has."""
    return {name: value for name in ("latency", "engine") if (value := getattr(options, name))}


def simulated_backend(options: argparse.Namespace) -> Child:
    """Return the simulated server as a process to be started, on any free port."""
    arguments = [part for name, value in _given(options).items() for part in (f"--{name}", value)]
    return Child("the simulated backend", "simbackend", "--port", "0", *arguments)


def _simulated(options: argparse.Namespace, flags: dict[str, Any]) -> Target:
    try:
        with_changes(SimOptions(), _given(options))
    except ValueError as error:
        raise SettingsError([f"--{error}"]) from None
    flags |= {
        "backend.base_url": f"http://{ANYWHERE}",
        "backend.base_urls": "[]",
        "backend.fallback": "",
        "routes": "[]",
    }
    settings = load_settings(options.config, flags=flags)
    if settings.backend is not None and settings.backend.is_sagemaker:
        raise SettingsError(
            ["--simulated: is no endpoint of SageMaker; `simbackend --sagemaker` is (docs/sagemaker.md)"]
        )
    load_policy(settings.policy.rules)
    return Target(settings=settings, is_simulated=True, flags=flags, environ={})


def _headers(options: argparse.Namespace, backend: BackendSettings) -> dict[str, str]:
    """Return the variable that adds the headers of the command line to those of the settings, if there are any."""
    headers = {name.lower(): value.get_secret_value() for name, value in backend.headers.items()}
    headers |= {name.lower(): value for name, value in options.header}
    return {"WORKER_BACKEND__HEADERS": json.dumps(headers)} if headers else {}


def _worker_settings(options: argparse.Namespace) -> dict[str, Any]:
    concurrency = options.concurrency
    return {
        "pubsub.project_id": PROJECT,
        "pubsub.emulator_host": ANYWHERE,
        "pubsub.request_subscription": REQUESTS,
        "pubsub.response_topic": RESPONSES,
        "pubsub.max_in_flight": concurrency * 3,
        "backend.window.max": concurrency,
        "backend.window.initial": min(concurrency, 16),
        "reply.include_stats": True,  # for `inference-worker report`
        "http.host": "127.0.0.1",
        "http.port": 0,
        "log.format": "json",
    }
