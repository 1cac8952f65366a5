"""Every command of docs/tutorial.md in its order, as it is pasted, and what the page says that then happens."""

import json
import re
import shutil
import sys
import urllib.request
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.emulator import free_port
from tests.support.pasted import ROOT, Shell, blocks
from tests.support.waiting import until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

PAGE = ROOT / "docs" / "tutorial.md"
READY = {"localpubsub": "embedded Pub/Sub on", "simbackend": "control and statistics", "run": "worker_started"}
"""What a command that stays open prints when it is ready."""


@pytest.mark.skipif(not all(map(shutil.which, ("make", "curl"))), reason="no make or no curl")
def test_the_tutorial_works_as_pasted(tmp_path: Path) -> None:
    """Nothing is lost while the model server refuses connections, and the page tells what is seen; only ports differ."""
    shell = Shell(tmp_path)
    ports = {port: str(free_port()) for port in ("8085", "8000", "8001", "8080")}
    (shell.folder / "examples").unlink()
    (shell.folder / "examples").mkdir()

    def here(text: str) -> str:
        return re.sub(r"\b(8085|8000|8001|8080)\b", lambda found: ports[found[0]], text)

    shell.write("examples/tutorial.yaml", here((ROOT / "examples" / "tutorial.yaml").read_text("utf-8")))
    at = {
        "localpubsub": f"--port {ports['8085']}",
        "simbackend": f"--port {ports['8000']} --control-port {ports['8001']}",
    }
    printed: dict[str, str] = {}
    with ExitStack() as servers:
        for command in blocks(PAGE):
            name = (command.split()[1:] or [""])[0]
            if command.startswith("inference-worker ") and name in READY:
                servers.enter_context(shell.serving(f"{command} {at.get(name, '')}".strip(), READY[name]))
                continue
            if "--once" in command:
                until(lambda: _breaker(ports["8080"]) == "open", 30, "the breaker opens")
            if command.startswith("rm "):
                _check_files(shell)
            printed[command] = shell.run(
                here(command), code=1 if "--once" in command else 0
            )  # 1: the run is not complete
    for command in ("inference-worker watch", "curl -s 127.0.0.1:8080/readyz", "inference-worker collect"):
        assert any(each.startswith(command) for each in printed), command
    watched = next(text for command, text in printed.items() if command.startswith("inference-worker watch"))
    assert re.search(r"^in flight +2,000$", watched, re.MULTILINE)
    assert re.search(r"^failed +0$", watched, re.MULTILINE)
    probes = printed["curl -s 127.0.0.1:8080/readyz"]
    assert '"breaker":"open"' in probes
    assert '"error_class":"connect"' in probes
    collected = next(text for command, text in printed.items() if command.startswith("inference-worker collect"))
    (said,) = blocks(PAGE, "text")
    assert said in collected
    log = next(shell.folder.glob("inference-worker-run*.log")).read_text("utf-8")
    assert "breaker_opened" in log
    assert "attempt_held" in log
    assert "breaker_closed" in log
    assert "delivery_nacked" not in log, "an attempt was used up"
    assert list(shell.folder.glob("*.jsonl*")) == [], "the page cleans up"


def _breaker(port: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=10) as response:
        state: str = json.load(response)["backends"]["default"]["breaker"]
        return state


def _check_files(shell: Shell) -> None:
    """Check what the page's commands wrote, before it is removed."""
    (one,) = shell.rows("one-answers.jsonl")
    assert (one["status_code"], one["metadata"]) == (200, {"row": 17})
    answers = shell.rows("answers.jsonl")
    assert {row["status_code"] for row in answers} == {200}
    assert sorted(row["metadata"]["row"] for row in answers) == list(range(1, 2001))  # type: ignore[index]
    assert "<svg" in (shell.folder / "report.html").read_text("utf-8")
    assert sys.prefix in str((shell.bin / "inference-worker").resolve().parent.parent)
