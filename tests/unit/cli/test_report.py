"""`inference-worker report` as it is typed."""

import io
import json
import os
import sys
from pathlib import Path

import pytest

from tests.unit.client.report.answers import a_run
from worker.cli.main import run_command


@pytest.fixture
def answers(tmp_path: Path) -> Path:
    """An output file with 400 answers."""
    path = tmp_path / "out.jsonl"
    path.write_bytes(b"\n".join(a_run()[:-1]) + b"\n")
    return path


def test_tables_are_the_default(answers: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On standard output, exit 0."""
    assert run_command(["report", str(answers)]) == 0
    assert capsys.readouterr().out.startswith(f"{answers}: 400 answers, 20 of them errors")


def test_json_is_one_object(answers: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The machine form, with the threshold that was asked for."""
    assert run_command(["report", str(answers), "--json", "--min-tail", "4"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["total"]["answers"], report["min_tail"]) == (400, 4)


@pytest.mark.parametrize(
    ("options", "cost"),
    [
        (["--price", "1,10"], 0.0798),
        (["--price", "1,0.5,10"], 0.0798),
        (["--price", "large=1,10", "--price", "small=0,0"], None),
        ([], None),
    ],
)
def test_a_price_gives_a_cost(
    answers: Path, capsys: pytest.CaptureFixture[str], options: list[str], cost: float | None
) -> None:
    """Of a million input and output tokens, for all models or for some."""
    assert run_command(["report", str(answers), "--json", *options]) == 0
    report = json.loads(capsys.readouterr().out)
    if cost is not None or not options:
        assert report["total"]["cost"] == (pytest.approx(cost) if cost is not None else None)
    else:
        assert report["models"]["small"]["cost"] == 0
        assert report["total"]["cost"] == report["models"]["large"]["cost"] > 0


@pytest.mark.parametrize("text", ["", "1", "1,2,3,4", "a,b", "-1,2", "nan,1", "m=1"])
def test_a_price_that_is_none_is_refused(answers: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    """With what it should be like."""
    with pytest.raises(SystemExit, match="2"):
        run_command(["report", str(answers), f"--price={text}"])
    assert "is not like 0.15,0.60" in capsys.readouterr().err


def test_html_goes_to_a_file_or_to_standard_output(answers: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file is named on standard error; nothing else is said."""
    page = answers.with_suffix(".html")
    assert run_command(["report", str(answers), "--html", str(page)]) == 0
    assert capsys.readouterr() == ("", f"worker: wrote {page}\n")
    assert run_command(["report", str(answers), "--html", "-"]) == 0
    assert capsys.readouterr().out == page.read_text()


def test_standard_input_is_read(
    answers: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`-` stands for it."""
    descriptor = os.open(answers, os.O_RDONLY)
    with os.fdopen(descriptor, "rb") as stream:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(stream))
        assert run_command(["report", "-"]) == 0
    assert capsys.readouterr().out.startswith("standard input: 400 answers")


def test_damage_is_told_and_costs_the_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The report is about what stands before it; exit 1."""
    path = tmp_path / "out.jsonl.gz"
    path.write_bytes(b"this is no gzip")
    assert run_command(["report", str(path)]) == 1
    captured = capsys.readouterr()
    assert captured.out == f"{path}: no answers\n"
    assert captured.err.startswith(f"inference-worker: {path}: is damaged")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["none.jsonl"], "none.jsonl: does not exist"),
        (["out.jsonl", "--html", "nowhere/page.html"], "nowhere/page.html: "),
    ],
)
def test_mistakes_are_told_in_a_line(
    arguments: list[str],
    text: str,
    answers: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Exit 1 and no traceback."""
    monkeypatch.chdir(answers.parent)
    assert run_command(["report", *arguments]) == 1
    assert text in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--min-tail", "0"], ["--min-tail", "x"], ["--json", "--html", "f"], []])
def test_arguments_that_make_no_sense_exit_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Told by the parser before anything is read."""
    with pytest.raises(SystemExit) as ended:
        run_command(["report", *(["f", *arguments] if arguments else [])])
    assert ended.value.code == 2
    assert "usage:" in capsys.readouterr().err
