"""The large run on paper: the page shows what the command prints, and the arithmetic holds."""

import dataclasses
import re
from pathlib import Path

import pytest

from benchmarks.billion import TIB, Run, estimate, main, page

PAGE = (Path(__file__).parents[2] / "docs" / "how-to" / "a-billion-lines.md").read_text("utf-8")


def test_the_page_shows_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    """The block behind the command is its output, to the letter."""
    assert main([]) == 0
    printed = capsys.readouterr().out
    (shown,) = re.findall(r"^```text\n(requests .*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert shown == printed == page(Run())


def test_the_sentences_name_the_figures_of_the_table() -> None:
    """What the text says beside the table follows from it."""
    it, sampled = estimate(Run()), estimate(Run(log_ratio=0.01))
    within_an_hour = it.request_mb_s * Run().days * 24
    part = estimate(Run(requests=10_000_000))
    for figure in (
        f"{it.server_hours:,.0f} hours of a GPU",
        f"{it.pods} pods are needed",
        f"takes {it.logs_usd:.0f} USD to {sampled.logs_usd:.0f}",
        f"{it.request_mb_s:.1f} MB/s is far below",
        f"{within_an_hour:.0f} MB/s, is not",
        f"a ledger of {part.ledger_gb * 1000:.0f} MB",
        f"{part.collect_gb * 1000:.0f} MB of memory",
    ):
        assert figure in " ".join(PAGE.split()), figure
    assert 0.2 < part.submit_hours < 0.3, "a quarter of an hour"


def test_a_message_is_billed_once_in_and_once_out() -> None:
    """A TiB of requests: 40 USD to publish, 40 to deliver, 80 in place of the first by an import topic."""
    it = estimate(Run(requests=2**20, request_bytes=2**20 - 40))
    assert it.publish_usd == it.deliver_usd == 2**20 * 2**20 / TIB * 40 == 40
    assert it.import_usd == 80


@pytest.mark.parametrize(
    ("change", "field", "factor"),
    [
        ({"days": 14.0}, "rate", 0.5),
        ({"days": 14.0}, "publish_usd", 1),
        ({"seconds": 10.0}, "at_once", 2),
        ({"server_requests": 256}, "servers", 0.5),
        ({"log_ratio": 0.0}, "logs_usd", 0),
        ({"requests": 2_000_000_000}, "ledger_gb", 2),
    ],
)
def test_figures_follow_their_causes(change: dict[str, float], field: str, factor: float) -> None:
    """Twice the time halves the rate and costs the same, and so on."""
    before, after = estimate(Run()), estimate(dataclasses.replace(Run(), **change))
    assert getattr(after, field) == pytest.approx(getattr(before, field) * factor, rel=0.02)


@pytest.mark.parametrize("arguments", [["--days", "0"], ["--log-ratio", "2"], ["--requests", "-1"], ["--seconds", "x"]])
def test_impossible_numbers_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """With a sentence and exit code 2."""
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert "error:" in capsys.readouterr().err
