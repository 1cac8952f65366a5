"""Every command of README.md, as it is pasted: by a shell, in a checkout, after `make run` and `make install`."""

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.pasted import Shell
from tests.support.waiting import until
from worker.emulators.openai import SimBackendThread, SimOptions
from worker.emulators.pubsub import LocalPubSubThread

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")
STARTS = ("make ", "inference-worker ", "python ", "pip ", "kubectl ", ".venv/")
NEEDS_MINUTES = {
    "make test",
    "make check",
    "make docs-site",
    "make test-fast",
    "make chaos",
    "make bench",
    "python -m benchmarks mixed",
}
"""Here they only say what they would do (`make --dry-run`) or print their help; CI runs them."""


def commands() -> Iterator[str]:
    """Yield every command of the page in its order: lines of blocks, and code within sentences."""
    for block, span in re.findall(r"^```\w*\n(.*?)^```|`([^`\n]+)`", README, re.MULTILINE | re.DOTALL):
        for line in (block or span).splitlines():
            command = re.sub(r"\s{2,}# .*", "", line.removeprefix("$ ")).strip()
            if command.startswith(STARTS):
                yield command


def paste_batches(shell: Shell, todo: list[str], done: list[str]) -> None:
    """Serve batches, run the page's program with the official client, and stop as a user does."""
    command = "inference-worker batches local"
    assert command in todo
    done.append(command)
    (program,) = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    # Every line of it; only the port may be taken on the machine of a test.
    process = subprocess.Popen(
        ["sh", "-c", f"exec {command} --port 0"], cwd=shell.folder, env=shell.environ, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        base_url = process.stdout.readline().removeprefix("base_url: ").strip()
        assert base_url.startswith("http://127.0.0.1:")
        printed = subprocess.run(
            [sys.executable, "-c", program.replace("http://127.0.0.1:8100/v1", base_url)],
            cwd=shell.folder, env=shell.environ, capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
        assert printed.returncode == 0, printed.stderr
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.communicate()
    answers = [json.loads(line) for line in printed.stdout.splitlines() if line]
    asked = [json.loads(line) for line in (ROOT / "examples" / "batch.jsonl").read_bytes().splitlines()]
    assert [answer["custom_id"] for answer in answers] == [line["custom_id"] for line in asked]
    assert {answer["response"]["status_code"] for answer in answers} == {200}


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_every_command_of_the_readme_works_as_pasted(tmp_path: Path) -> None:
    """In the order in which a new user pastes them; what the page names is prepared, as it says."""
    todo = list(dict.fromkeys(commands()))
    shell, done = Shell(tmp_path), list[str]()

    def paste(command: str, instead: str | None = None) -> str:
        assert command in todo, f"README no longer has {command!r}"
        done.append(command)
        return shell.run(instead or command)

    assert "30 of the 271 lines are wrong on purpose" in paste("make run")
    assert len(shell.rows("out.jsonl")) == 271
    paste("make install")
    assert (shell.bin / "inference-worker").is_symlink()
    for command in NEEDS_MINUTES:
        is_make = command.startswith("make")
        paste(command, command.replace("make", "make --dry-run", 1) if is_make else f"{command} --help")
    assert "make install" in paste("make help")

    message = json.loads(re.findall(r"^```json\n(.*?)^```", README, re.MULTILINE | re.DOTALL)[0])
    lines = "".join(json.dumps({**message, "metadata": {"row": row}}) + "\n" for row in range(20))
    shell.write("my-requests.jsonl", lines)
    shell.write("requests.jsonl", lines)
    shell.write("worker.yaml", re.findall(r"^```yaml\n(.*?)^```", README, re.MULTILINE | re.DOTALL)[0])
    shell.write("answer.json", '{"error": {"message": "slow down"}}')
    with SimBackendThread(SimOptions.of(control_port=0)) as sim, LocalPubSubThread() as server:
        local = "inference-worker local my-requests.jsonl answers.jsonl --backend-url http://127.0.0.1:8000 --concurrency 128"
        paste(local, local.replace("http://127.0.0.1:8000", sim.base_url))
        assert {row["status_code"] for row in shell.rows("answers.jsonl")} == {200}
        paste("inference-worker report answers.jsonl --html report.html")
        assert "<svg" in (shell.folder / "report.html").read_text("utf-8")
        (shell.folder / "answers.jsonl").unlink()

        # The page's own settings, with the addresses of this machine: `vllm` is a name of the reader's cluster.
        shell.environ |= {
            "PUBSUB_EMULATOR_HOST": server.address,
            "WORKER_PUBSUB__PROJECT_ID": "readme",
            "WORKER_BACKEND__BASE_URL": sim.base_url,
            "WORKER_HTTP__HOST": "127.0.0.1",
            "WORKER_HTTP__PORT": "0",
        }
        assert "to create" in paste("inference-worker setup --config worker.yaml --dry-run")
        shell.run("inference-worker setup --config worker.yaml")
        paste("inference-worker config check worker.yaml")
        command = "inference-worker run --config worker.yaml"
        assert command in todo
        done.append(command)
        log = tmp_path / "worker.log"
        with log.open("wb") as stream:
            process = subprocess.Popen(
                ["sh", "-c", f"exec {command}"], cwd=shell.folder, env=shell.environ, stderr=stream
            )
        try:
            until(lambda: b"worker_started" in log.read_bytes() or process.poll() is not None, 30, "the worker starts")
            paste("inference-worker submit requests.jsonl --config worker.yaml --wait answers.jsonl")
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0, log.read_text()
        finally:
            process.kill()
    assert sorted(row["metadata"]["row"] for row in shell.rows("answers.jsonl")) == list(range(20))  # type: ignore[index]
    paste_batches(shell, todo, done)
    paste("inference-worker batches serve", "inference-worker batches serve --help")  # of a fleet
    assert "complete" in paste("inference-worker completion bash")
    assert "rate_limited" in paste("inference-worker policy explain --status 429 --body @answer.json")
    assert sorted(done) == sorted(todo), "a command of the page is not executed here"
