"""What a command loads: its own subject, and nothing of what only other commands need."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SETTINGS = """
pubsub: {project_id: p, request_subscription: requests, response_topic: responses, emulator_host: "127.0.0.1:1"}
backend: {base_url: "http://127.0.0.1:1"}
http: {port: 0, host: 127.0.0.1}
"""
PROGRAM = """
import atexit, json, os, sys
def tell():
    print("LOADED " + json.dumps(sorted(sys.modules)), flush=True)
leave = os._exit
def exit_telling(code):
    tell()
    leave(code)
os._exit = exit_telling
atexit.register(tell)
sys.argv = ["inference-worker", *sys.argv[1:]]
from worker.__main__ import main
main()
"""
NETWORK = {"aiohttp", "httpx", "grpc", "google.cloud", "google.api_core"}
OTHERS = {"worker.emulators", "worker.client", "worker.batches"}


def loaded_by(*arguments: str, until: str | None = None) -> set[str]:
    """Run the program and return the modules that it had loaded at its end, or once it has told `until`."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    with process:
        assert process.stdout is not None
        for line in process.stdout:
            if until is not None and until in line:
                process.terminate()
            if line.startswith("LOADED "):
                return set(json.loads(line.removeprefix("LOADED ")))
    raise AssertionError("it told nothing")


def of(modules: set[str], packages: set[str]) -> set[str]:
    """The modules that belong to one of the packages."""
    return {name for name in modules if any(name == each or name.startswith(each + ".") for each in packages)}


def test_importing_the_package_imports_nothing_of_it() -> None:
    """A hook that names `worker.policy.model` pays for that alone."""
    program = "import sys, worker; print([name for name in sys.modules if name.startswith('worker.')])"
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "[]"


def test_help_is_quick() -> None:
    """No network library, no emulator, no event loop, not even the settings."""
    avoided = NETWORK | OTHERS | {"pydantic", "worker.settings", "shtab", "difflib", "asyncio"}
    assert of(loaded_by("--help"), avoided) == set()
    assert of(loaded_by("run", "--help"), avoided) == set()


@pytest.mark.slow
@pytest.mark.parametrize("command", ["run", "config check", "policy explain --status 500", "config show --config"])
def test_a_command_of_production_loads_no_emulator_and_no_client(command: str, tmp_path: Path) -> None:
    """Neither the worker in a container nor a check of its settings."""
    file = tmp_path / "worker.yaml"
    file.write_text(SETTINGS)
    if command == "run":
        modules = loaded_by("run", "--config", str(file), until="broker_unreachable")
        assert "worker.service" in modules
    else:
        modules = loaded_by(*command.split(), *([] if "policy" in command else [str(file)]))
        assert of(modules, NETWORK) == set()
    unneeded = {"worker.payloads", "obstore", "worker.backends.sagemaker", "botocore", "boto3", "shtab", "difflib"}
    unneeded |= {"worker.policy.rules.model", "re2"}  # for rules, which this file has none of
    assert of(modules, OTHERS | unneeded) == set()


@pytest.mark.slow
def test_what_else_is_installed_takes_no_part_in_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plugin of pydantic may change what a model accepts."""
    (tmp_path / "plugin_of_another.py").write_text("plugin = None")
    metadata = tmp_path / "plugin_of_another-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin-of-another\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[pydantic]\nx = plugin_of_another:plugin\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    file = tmp_path / "worker.yaml"
    file.write_text(SETTINGS)
    modules = loaded_by("config", "check", str(file))
    assert "pydantic" in modules
    assert "plugin_of_another" not in modules


@pytest.mark.slow
def test_a_library_is_missing_for_what_is_imported_within() -> None:
    """And found again afterwards; one that is loaded already stays."""
    program = """
import sys
from worker.cli.run import without
with without("rich"):
    import structlog.dev
assert structlog.dev.rich is None
import rich, rich.console
with without("rich"):
    import rich.table
assert sys.modules["rich"] is rich
"""
    subprocess.run([sys.executable, "-c", program], check=True)
