"""The report's page in a real browser: nothing is cut off, nothing collides, nothing is too small, nothing is refused."""

import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest

from tests.support.browser import Page, browser
from tests.unit.client.report.answers import a_line
from tests.unit.client.report.test_statistics import report_of
from worker.client.report import Price, render_page

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

MODELS = ("llama-3.1-70b-instruct", "qwen2.5-coder-32b-instruct-awq-with-a-long-name", "e")
WINDOWS = {
    "a desk": {"width": 1100},
    "a desk at night": {"width": 1100, "is_dark": True},
    "a narrow window": {"width": 720},
    "a phone": {"width": 390, "height": 844, "is_phone": True},
    "a small phone": {"width": 340, "height": 640, "is_phone": True},
}
_TEXTS = """
[...document.querySelectorAll('svg')].filter(svg => svg.getBoundingClientRect().width > 0).map(svg =>
  [...svg.querySelectorAll('text')].map(text => {
    const box = text.getBoundingClientRect();
    return {text: text.textContent, left: box.left, right: box.right, top: box.top, bottom: box.bottom,
            size: parseFloat(getComputedStyle(text).fontSize) * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width};
  }))
"""
_BOXES = """
[...document.querySelectorAll('svg, table, dl, summary, h1, h2, figcaption')].map(item => {
  const box = item.getBoundingClientRect();
  return [item.tagName, box.left, box.right];
}).filter(box => box[2] > box[1])
"""


def lines(spread: str) -> list[bytes]:
    """Return the answers of a run whose times are short or long, with errors, retries and an outage."""
    dice, found = random.Random(11), []
    factor = {"milliseconds": 0.001, "seconds": 1.0, "hours": 2000.0}[spread]
    for number in range(1, 1500):
        at = number * 0.1 + (30 if number > 700 else 0)
        when = f"2026-11-20T20:{int(at // 60):02}:{at % 60:06.3f}Z"
        ttft = dice.lognormvariate(-1.5, 0.5) * factor
        model = dice.choice(MODELS)
        if number % 13 == 0:
            error_class = dice.choice(["context_length", "rate_limited", "a_class_of_errors_with_a_long_name"])
            nothing = {"tokens": {}, "ttft_s": None, "tpot_s": None, "request_time": when}
            found.append(a_line(number, 400, model=model, error_class=error_class, ttlt_s=ttft, **nothing))
            continue
        tokens = {"input": 123_456, "output": dice.randrange(1, 3000), "input_cached": 7, "output_reasoning": None}
        more = {"held_s": 31.0 * factor if 690 < number < 720 else 0.0, "queue_s": dice.lognormvariate(2, 2) * factor}
        reason = dice.choice(["stop", "stop", "length", "tool_calls"])
        found.append(
            a_line(
                number,
                model=model,
                ttft_s=ttft,
                ttlt_s=ttft * 8,
                tpot_s=ttft / 40,
                tokens=tokens,
                request_time=when,
                attempts=dice.choice([1, 1, 1, 2]),
                finish_reason=reason,
                **more,
            )
        )
    return found


def a_page(folder: Path, spread: str) -> Path:
    """Write the page of a run."""
    report = report_of(lines(spread), prices={"": Price(input=0.15, output=0.6, cached=0.1)})
    path = folder / "report.html"
    path.write_text(render_page(report), "utf-8")
    return path


SEEN = [*(("seconds", name) for name in WINDOWS), *(("milliseconds", name) for name in ("a desk", "a phone"))]
SEEN += [("hours", name) for name in ("a desk", "a phone")]


@pytest.mark.parametrize(("spread", "name"), SEEN, ids=[f"{spread}, {name}" for spread, name in SEEN])
async def test_everything_is_seen_whole(spread: str, name: str, tmp_path: Path) -> None:
    """Plots, tables and headings are inside the window, labels are apart and can be read, and a picture shows it."""
    page, window = a_page(tmp_path, spread), WINDOWS[name]
    async with browser() as shown:
        await shown.open(page, **window)
        await shown.evaluate("document.querySelector('details').open = true")
        width = window["width"]
        assert await shown.evaluate("document.documentElement.scrollWidth") <= width
        outside = [box for box in await shown.evaluate(_BOXES) if box[1] < -0.5 or box[2] > width + 0.5]
        assert outside == []
        drawings = await shown.evaluate(_TEXTS)
        assert len(drawings) >= 14
        assert [pair for texts in drawings for pair in _collisions(texts)] == []
        assert min(text["size"] for texts in drawings for text in texts) >= 8.5, "pixels of a letter"
        await _looks_like_a_page(shown, width, tmp_path)
        assert shown.complaints == []


async def _looks_like_a_page(shown: Page, width: int, folder: Path) -> None:
    """Take a picture: as wide as the window and as long as the page, and far from empty."""
    picture = await shown.screenshot()
    (folder / "report.png").write_bytes(picture)
    assert picture.startswith(b"\x89PNG")
    pixels_wide, pixels_high = struct.unpack(">II", picture[16:24])
    scale = await shown.evaluate("devicePixelRatio")
    assert pixels_wide == width * scale
    assert pixels_high >= 3000 * scale
    assert len(picture) > 100_000


def _collisions(texts: list[dict[str, Any]]) -> list[str]:
    """Return the labels that lie over each other; letters have some air above and below, so that two pixels are none."""
    found = []
    for at, one in enumerate(texts):
        for other in texts[at + 1 :]:
            across = min(one["right"], other["right"]) - max(one["left"], other["left"])
            down = min(one["bottom"], other["bottom"]) - max(one["top"], other["top"])
            if across > 1 and down > 4:
                found.append(f"{one['text']} / {other['text']}")
    return found


async def test_a_phone_gets_lists_instead_of_wide_tables(tmp_path: Path) -> None:
    """The row of headings is gone, each value has its own; the long table is closed until it is asked for."""
    page = a_page(tmp_path, "seconds")
    async with browser() as shown:
        await shown.open(page, width=390, height=844, is_phone=True)
        assert await shown.evaluate("getComputedStyle(document.querySelector('thead')).display") == "none"
        label = "getComputedStyle(document.querySelector('td'), '::before').content"
        assert json.loads(await shown.evaluate(label)) == "Answers"
        assert await shown.evaluate("document.querySelector('details').open") is False
        await shown.open(page, width=1100)
        assert await shown.evaluate("getComputedStyle(document.querySelector('thead')).display") == "table-header-group"
