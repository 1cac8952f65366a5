"""The how-to pages: every settings file and block is one that the program takes, every command of the simulated server works."""

import json
import re
from pathlib import Path

import pytest

from worker.cli.main import run_command
from worker.emulators.openai import SimBackendThread, SimOptions
from worker.policy.engine import load_policy
from worker.settings.load import load_settings

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "how-to"
SERVERS = sorted((ROOT / "examples" / "servers").glob("*.yaml"))
BLOCKS = [
    pytest.param(text, id=f"{page.stem}-{number}")
    for page in sorted(PAGES.glob("*.md"))
    for number, text in enumerate(
        re.findall(r"^ *```yaml\n(.*?)^ *```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    )
]


@pytest.mark.parametrize("path", [*SERVERS, ROOT / "examples" / "tutorial.yaml"], ids=lambda path: path.name)
def test_an_example_can_be_used_as_it_is(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`config check` accepts it, without a variable, and what the file says is what is in force."""
    assert run_command(["config", "check", str(path)]) == 0
    assert capsys.readouterr().out == f"{path}: good\n"
    settings = load_settings(path, environ={})
    assert settings.backend.is_sagemaker or settings.backend.base_url
    assert settings.backend.window.max <= settings.pubsub.max_in_flight


def test_every_server_has_a_file_and_every_file_is_named() -> None:
    """The issue's nine servers, on the page and in the folder's list."""
    named = {path.name for path in SERVERS}
    assert len(named) == 9
    for page in (PAGES / "servers.md", ROOT / "examples" / "servers" / "README.md"):
        assert set(re.findall(r"\[([a-z-]+\.yaml)\]", page.read_text("utf-8"))) == named


@pytest.mark.parametrize("text", BLOCKS)
def test_a_block_of_settings_can_be_used(text: str, tmp_path: Path) -> None:
    """It is a whole file: every how-to can be tried by pasting."""
    path = tmp_path / "worker.yaml"
    path.write_text(
        "\n".join(line.removeprefix("   ") if text.startswith("   ") else line for line in text.splitlines())
    )
    load_policy(load_settings(path, environ={}).policy.rules)


def test_the_pages_have_blocks() -> None:
    """The pattern above finds them, also those inside lists."""
    assert len(BLOCKS) >= 3


def test_every_rehearsal_is_understood() -> None:
    """The simulated server takes each document of the page and then does what the page says it begins at once."""
    page = (PAGES / "rehearse-an-outage.md").read_text("utf-8")
    documents = [json.loads(text) for text in re.findall(r"/sim/control -d '(.*)'$", page, re.MULTILINE)]
    assert len(documents) > 5
    with SimBackendThread(SimOptions.of(control_port=0)) as sim:
        for document in documents:
            state = sim.control(document)
            if "mode" in document:
                expected = [] if document["mode"] == "ok" else [document["mode"]]
                assert [each["mode"] for each in state["behaviours"]] == expected
            else:
                assert state["settings"]["api_key"] == document["settings"]["api_key"] or state["settings"]["api_key"]
