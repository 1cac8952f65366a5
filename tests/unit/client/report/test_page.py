"""The page: whole, self-contained, safe, and readable without seeing it."""

import re
from html.parser import HTMLParser
from xml.etree import ElementTree as ET

import pytest

from tests.unit.client.report.answers import a_line, a_run
from tests.unit.client.report.test_statistics import report_of
from worker.client.report import Price, render_page

VOID = {"meta", "br", "link", "img", "input"}


class Reader(HTMLParser):
    """Checks that every element is closed in order, and keeps what there is."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.ids, self.words = [], [], [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_needs_nothing_else():
    """No script, no link, no address: it opens from a file without a network, and is forbidden to try."""
    page = render_page(report_of(a_run()))
    tags = Reader(page).tags
    assert not {"script", "link", "img", "iframe", "object", "base"} & {tag for tag, _ in tags}
    assert not re.search(r"https?:|url\(|@import|src=|href=", page)
    policy = next(attrs["content"] for tag, attrs in tags if attrs.get("http-equiv"))
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_every_part_of_a_run_is_drawn_and_tabled():
    """Answers and tokens over time, four distributions, ranges by model, errors; each drawing is XML with a name."""
    page = render_page(report_of(a_run()))
    reader = Reader(page)
    drawings = [ET.fromstring(text) for text in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]
    keys = [drawing.get("aria-labelledby").split()[0] for drawing in drawings]
    both = [f"plot-{name}{size}-t" for name in ("answers", "times", "attempts", "tokens") for size in ("", "-small")]
    assert keys == [
        *both, "plot-ttft-s-t", "plot-ttlt-s-t", "plot-tpot-s-t", "plot-queue-s-t",
        "plot-output-tokens-t", "plot-output-tokens-per-s-t", "plot-finish-reasons-t", "plot-finish-reasons-small-t",
        "plot-models-ttft-s-t", "plot-models-ttlt-s-t", "plot-models-tpot-s-t", "plot-errors-t", "plot-errors-small-t",
    ]  # fmt: skip
    assert len(reader.ids) == len(set(reader.ids))
    for drawing in drawings:
        described = {part.get("id"): part.text for part in drawing if part.get("id")}
        assert all(described[key] for key in drawing.get("aria-labelledby").split())
        assert not re.search(r'"-?(nan|inf)', ET.tostring(drawing, "unicode"))
    assert sum(tag == "caption" for tag, _ in reader.tags) == 4
    assert "1 line is not an answer" in page


def test_times_have_their_units_and_headers_are_words():
    """Nothing is told in thousandths of a second, and no column is an abbreviation."""
    page = render_page(report_of([a_line(number, tpot_s=0.000_35, ttlt_s=0.2, queue_s=200.0) for number in range(200)]))
    for text in ("350 µs", "200 ms", "3.33 min"):
        assert text in page
    headers = re.findall(r"<th[^>]*>([^<]*)</th>", page)
    assert {"Measure", "Median", "90th percentile", "Output tokens a second", "Share of errors"} <= set(headers)
    assert not {"p50", "p90", "ttft", "tpot"} & set(headers)
    assert page.count("logarithmic") >= 6


def test_rows_on_a_phone_name_their_values():
    """Each value has the heading of its column beside it, since the row of headings is not shown there."""
    tags = Reader(render_page(report_of(a_run()))).tags
    cells = [attrs for tag, attrs in tags if tag == "td"]
    assert cells
    assert all(attrs["data-label"] for attrs in cells)


def test_a_long_table_is_folded():
    """Its rows are there, behind a line that says how many."""
    page = render_page(report_of(a_run()))
    folded = re.search(r"<details><summary>([^<]*)</summary>(.*?)</details>", page, re.DOTALL)
    rows = folded[2].count("<tr>") - 1 - folded[2].count('<tbody class="group">')
    assert f"({rows} rows)" in folded[1]
    assert rows == 18


def test_costs_are_shown_where_there_is_a_price():
    """Of each model and of all; without one nothing is said about them."""
    assert "Cost" not in render_page(report_of(a_run()))
    page = render_page(report_of(a_run(), prices={"": Price(input=1.0, output=10.0, cached=1.0)}))
    assert "<dt>Cost</dt><dd>0.0798</dd>" in page  # 3,800 input and 7,600 output tokens
    assert ">Cost</th>" in page


def test_bars_add_up_to_the_answers():
    """What is drawn is what was counted."""
    page = render_page(report_of(a_run()))
    drawing = re.search(r'<svg[^>]*"plot-answers-t.*?</svg>', page, re.DOTALL)[0]
    good = [int(number) for number in re.findall(r"<rect class=\"good\"[^<]*><title>[^:]*: (\d+) good", drawing)]
    assert sum(good) == 380
    drawing = re.search(r'<svg[^>]*"plot-attempts-t.*?</svg>', page, re.DOTALL)[0]
    attempts = [int(number) for number in re.findall(r": (\d+) for \d+ answers</title>", drawing)]
    assert sum(attempts) == 400


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", '" onload="x', "a & b", "\u202egpj"])
def test_names_from_outside_are_text(name):
    """A model, an error code or a file name cannot become markup."""
    report = report_of([a_line(1, model=name), a_line(2, 400, model="b", error_class=name)])
    page = render_page(report)
    tags = Reader(page).tags
    assert "script" not in {tag for tag, _ in tags}
    assert not any("onload" in attrs for _, attrs in tags)
    assert name.replace("\u202e", "\ufffd") in "".join(Reader(page).words)


@pytest.mark.parametrize(
    "lines",
    [
        [],
        [a_line(1, stats=False)],
        [a_line(1)],
        [a_line(1, 500, error_class="x", ttft_s=None, tpot_s=None)],
        [a_line(1, ttft_s=0.0, ttlt_s=0.0, tpot_s=0.0, queue_s=0.0)],
        [a_line(1, held_s=0.0), a_line(2, held_s=9.0), a_line(3, held_s=9.0)],
        [a_line(1, ttlt_s=1e-9), a_line(2, ttlt_s=1e9, model="b")],
        [a_line(1, tokens={"output": 0})],
        [a_line(1, request_time="1971-01-01T00:00:00Z"), a_line(2, request_time="9999-12-31T23:59:59Z")],
    ],
    ids=["nothing", "no stats", "one", "one error", "zeros", "some zeros", "extremes", "no tokens", "centuries"],
)
def test_a_page_is_made_of_any_lines(lines):
    """No division by zero, no empty axis, no number that is none."""
    page = render_page(report_of(lines))
    Reader(page)
    for drawing in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ET.fromstring(drawing)
    assert not re.search(r"\bnan\b|\binf\b", page)


def test_variants_have_a_section_where_there_are_any():
    """With the same tables as models, and no name of which breaks the page."""
    lines = [a_line(number, variant="blue" if number % 3 else "<b>") for number in range(30)]
    page = render_page(report_of(lines))
    assert "By variant" in Reader(page).words
    assert "&lt;b&gt;" in page
    assert "By variant" not in render_page(report_of(a_run()))
