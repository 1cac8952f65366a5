"""The commands and the program of docs/batches.md, as they are pasted: on one machine, and in front of a worker."""

import json
import re
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import openai
import pytest

from tests.support.emulator import free_port
from tests.support.pasted import ROOT, Shell, blocks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(shutil.which("make") is None, reason="no make"),
]

PAGE = ROOT / "docs" / "batches.md"
(PROGRAM,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
PORTS = ("8085", "8000", "8001", "8080", "8081", "8100")
READY = {
    "inference-worker batches local": "base_url: ",
    "inference-worker localpubsub": "embedded Pub/Sub on",
    "inference-worker simbackend": "control and statistics",
    "inference-worker run": "worker_started",
    "inference-worker batches serve": "batch_coordinator_elected",
}
"""What a command that stays open prints when it is ready."""


class Page:
    """
    The page, with other ports: those that it names may be taken on the machine of a test.

    Args:
        folder: Of the shell.
    """

    def __init__(self, folder: Path) -> None:
        self.shell = Shell(folder)
        self.shell.run("make install")
        self._ports = {port: str(free_port()) for port in PORTS}
        (self.shell.folder / "examples").unlink()
        (self.shell.folder / "examples").mkdir()
        settings = (ROOT / "examples" / "batches.yaml").read_text("utf-8")
        self.shell.write("examples/batches.yaml", self.here(settings))

    def here(self, text: str) -> str:
        return re.sub(rf"\b({'|'.join(PORTS)})\b", lambda found: self._ports[found[0]], text)

    def _command(self, text: str) -> str:
        """Return a command with the ports that it takes where it names none."""
        options = {
            "inference-worker batches local": "--port 8100",
            "inference-worker localpubsub": "--port 8085",
            "inference-worker simbackend": "--port 8000 --control-port 8001",
        }
        return self.here(f"{text} {options.get(text, '')}".strip())

    def paste(self, servers: ExitStack, *, until: str, after: str = "") -> str:
        """Paste the commands behind one that begins with `after`, up to one that begins so; return what that printed."""
        has_begun = not after
        for command in blocks(PAGE):
            if not has_begun:
                has_begun = command.startswith(after)
                continue
            ready = next((READY[each] for each in READY if command.startswith(each)), None)
            printed = ""
            if ready is not None:
                servers.enter_context(self.shell.serving(self._command(command), ready))
            else:
                printed = self.shell.run(self._command(command))
            if command.startswith(until):
                return printed
        raise AssertionError(f"the page has no command {until}")

    def program(self, key: str = "none") -> tuple[str, list[dict[str, object]]]:
        """Run the page's program; return its first line, and the lines of the files."""
        text = self.here(PROGRAM).replace('api_key="none"', f'api_key="{key}"')
        done = subprocess.run(
            [sys.executable, "-c", text], cwd=self.shell.folder, env=self.shell.environ, capture_output=True, text=True,
            check=False, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        first, *lines = done.stdout.splitlines()
        return first, [json.loads(line) for line in lines]

    def client(self, key: str) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.here("http://127.0.0.1:8100/v1"), api_key=key, max_retries=0)


def test_the_page_works_as_pasted_on_one_machine(tmp_path: Path) -> None:
    """A request that the server refuses is retried by the call that the page shows."""
    page = Page(tmp_path)
    with ExitStack() as servers:
        page.paste(servers, until='echo \'{"custom_id": "b"')
        first, lines = page.program()
        assert first == "completed None"
        assert [line["custom_id"] for line in lines] == ["a", "b"]
        assert all(line["error"] is None for line in lines)
        requests = (page.shell.folder / "requests.jsonl").read_text("utf-8")
        page.shell.write("requests.jsonl", requests.replace('"model"', '"max_tokens": -1, "model"', 1))
        first, lines = page.program()
        assert first == "completed None"
        assert [line["custom_id"] for line in lines] == ["b", "a"], "the error file comes last"
        with page.client("none") as client:
            batch = client.batches.list().data[0]
            assert 'client.post(f"/batches/{batch.id}/retry", cast_to=type(batch))' in PAGE.read_text("utf-8")
            again = client.post(f"/batches/{batch.id}/retry", cast_to=type(batch))
            assert (again.status, again.object) == ("validating", "batch")
        page.shell.write("requests.jsonl", requests.replace("POST", "GET"))
        first, lines = page.program()
        assert first.startswith("failed")
        assert "'method'" in first
        assert lines == []


def test_the_page_works_as_pasted_in_front_of_a_worker(tmp_path: Path) -> None:
    """With the key that the page makes; the other commands about keys work as well."""
    page = Page(tmp_path)
    with ExitStack() as servers:
        page.paste(servers, after='echo \'{"custom_id": "b"', until="inference-worker batches serve")
        for command in blocks(PAGE):
            if command.startswith("echo "):
                page.shell.run(command)
        (add,) = (each for each in blocks(PAGE) if each.startswith("inference-worker batches keys add"))
        key = page.shell.run(add).split()[0]
        first, lines = page.program(key)
        assert first == "completed None"
        assert [line["custom_id"] for line in lines] == ["a", "b"]
        with page.client("none") as client, pytest.raises(openai.AuthenticationError):
            client.batches.list()
        keys = re.findall(r"^\$ (inference-worker batches keys .*)$", PAGE.read_text("utf-8"), re.MULTILINE)
        assert [command.split()[3] for command in keys] == ["add", "list", "revoke"]
        for command in keys[1:]:
            page.shell.run(command.replace("worker.yaml", "examples/batches.yaml"))
        assert "revoked" in page.shell.run("inference-worker batches keys list --config examples/batches.yaml")
