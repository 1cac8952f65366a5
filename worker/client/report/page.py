"""
The report as one HTML page with its styles and drawings, without scripts.

The page opens from a file, offline, in light and dark; its Content-Security-Policy forbids it to load anything.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from html import escape
from itertools import groupby
from operator import itemgetter

from worker.client.report.plots import (
    plot_answers,
    plot_attempts,
    plot_counts,
    plot_distribution,
    plot_ranges,
    plot_times,
    plot_tokens,
)
from worker.client.report.results import DURATIONS, PERCENTS, SIZES, TOKEN_KINDS, GroupReport, RunReport, iso_time
from worker.client.report.svg import NARROW, WIDE
from worker.client.report.text import (
    NOTHING,
    WEAK,
    amount,
    cost_rows,
    count,
    duration,
    examples,
    headline,
    legend,
    money,
    remarks,
    share,
)

NAMES = {
    "ttft_s": "Time to first token",
    "ttlt_s": "Time to last token",
    "tpot_s": "Time per output token",
    "queue_s": "Time in the queue",
    "held_s": "Time held",
    "output_tokens": "Length of an answer",
    "output_tokens_per_s": "Speed of an answer",
}
MEANINGS = {
    "ttft_s": "from the start of the last attempt to its first generated text; only of streamed answers",
    "ttlt_s": "from the start of the last attempt to its end",
    "tpot_s": "per output token after the first; only of streamed answers",
    "queue_s": "from the publishing of the message to its first attempt",
    "held_s": "waiting in the worker between attempts, for a backend to recover",
    "output_tokens": "output tokens of one answer",
    "output_tokens_per_s": "output tokens of one answer by its time to last token",
}
TOKEN_NAMES = {
    "input": "Input tokens",
    "output": "Output tokens",
    "input_cached": "Cached input tokens",
    "output_reasoning": "Reasoning tokens",
}
UNITS = {"output_tokens": ", tokens", "output_tokens_per_s": ", tokens a second"}
"""Of measures that are no durations, in a table."""
SPREAD_HEADER = ("Answers", "Without it", "Mean", "Median", "90th percentile", "99th percentile", "Longest")
_STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1b1f24; --dim: #5a6472; --rule: #e3e7ec; --tile: #f5f7f9;
  --good: #2f6fb5; --bad: #d9622b; --tokens: #2a8f7b; --mark: #1b1f24; }
@media (prefers-color-scheme: dark) { :root { --paper: #14181d; --ink: #e6eaef; --dim: #9aa6b4; --rule: #2b323b;
  --tile: #1c2229; --good: #6ba6e8; --bad: #f0915e; --tokens: #5cc4ae; --mark: #f2f5f8; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
main { max-width: 1020px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 44px 0 8px; padding-top: 20px; border-top: 1px solid var(--rule); }
header p { margin: 6px 0 20px; color: var(--dim); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); gap: 12px; margin: 0; }
.tiles div { background: var(--tile); border-radius: 8px; padding: 12px 14px; }
.tiles dt { color: var(--dim); font-size: 13px; }
.tiles dd { margin: 0; color: var(--dim); font-size: 13px; }
.tiles dt + dd { color: var(--ink); font-size: 23px; font-weight: 600; line-height: 1.35;
  font-variant-numeric: tabular-nums; }
figure { margin: 16px 0 0; min-width: 0; }
.small { display: none; }
figcaption { font-weight: 600; font-size: 14px; margin-bottom: 4px; }
figcaption span { font-weight: 400; color: var(--dim); }
.key { margin-left: 14px; white-space: nowrap; font-weight: 400; color: var(--dim); }
.key i { display: inline-block; width: 11px; height: 11px; border-radius: 2px; margin-right: 5px; }
.key i.good, .key i.p50 { background: var(--good); } .key i.p90 { background: var(--tokens); }
.key i.errors, .key i.p99, .key i.further { background: var(--bad); }
.key i.first { background: var(--good); } .key i:where(.p50, .p90, .p99) { border-radius: 50%; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(400px, 100%), 1fr)); gap: 8px 24px;
  align-items: end; } .pair.top { align-items: start; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; fill: var(--dim); }
svg .tag { fill: var(--mark); font-weight: 600; font-size: 11px; paint-order: stroke; stroke: var(--paper);
  stroke-width: 3px; }
svg .grid { stroke: var(--rule); } svg .axis { stroke: var(--dim); }
svg .good { fill: var(--good); } svg .errors { fill: var(--bad); } svg .tokens { fill: var(--tokens); }
svg .trend { stroke: var(--good); stroke-width: 2; stroke-linejoin: round; } svg .trend.p90 { stroke: var(--tokens); }
svg .spot { fill: var(--good); } svg .spot.p90 { fill: var(--tokens); } svg .trend, svg .trend.p90 { fill: none; }
svg .mark { stroke: var(--mark); stroke-width: 1.3; } svg .mark.weak { stroke-dasharray: 3 3; }
svg .range { stroke: var(--good); stroke-width: 2.5; opacity: .55; }
svg .dot { fill: var(--good); stroke: var(--paper); stroke-width: 1.5; }
svg .p90 { fill: var(--tokens); } svg .p99 { fill: var(--bad); }
svg .dot.weak { fill: var(--paper); stroke: var(--good); } svg .p90.weak { stroke: var(--tokens); }
svg .p99.weak { stroke: var(--bad); }
.scroll { overflow-x: auto; margin-top: 18px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding-bottom: 4px; }
th, td { padding: 5px 8px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--rule); }
th { font-weight: 400; } thead th { color: var(--dim); font-size: 13px; white-space: normal; vertical-align: bottom; }
th:first-child { padding-left: 0; } tbody th { vertical-align: top; font-weight: 600; max-width: 230px;
  overflow: hidden; text-overflow: ellipsis; }
.text { text-align: left; } td.text { white-space: normal; overflow-wrap: anywhere; }
tbody.group th { padding-top: 14px; max-width: none; } tbody.group + tbody.group { border-top: 0; }
tbody.group td.head { white-space: nowrap; padding-left: 14px; }
details { margin-top: 18px; } summary { font-weight: 600; font-size: 14px; cursor: pointer; }
details caption { display: none; } details .scroll { margin-top: 6px; }
.notes { color: var(--dim); font-size: 14px; padding-left: 0; list-style: none; }
@media (max-width: 960px) {
  .scroll { overflow-x: visible; } table, tbody, tr, caption { display: block; } thead { display: none; }
  tr { padding: 6px 0; border-bottom: 1px solid var(--rule); }
  tbody th { display: block; max-width: none; white-space: normal; overflow-wrap: anywhere; padding: 4px 0; border: 0;
    text-align: left; }
  td, td.text, tbody.group td.head { display: flex; justify-content: space-between; gap: 16px; padding: 1px 0;
    border: 0; white-space: normal; text-align: right; }
  td::before { content: attr(data-label); color: var(--dim); text-align: left; white-space: nowrap; }
  td.head { font-weight: 600; } td.head::before { content: none; } td.long { display: block; text-align: left; }
  td.long::before { display: block; }
}
@media (max-width: 700px) {
  main { padding: 20px 12px 48px; } .wide { display: none; } .small { display: block; }
  svg text { font-size: 13.5px; } svg .tag { font-size: 12.5px; }
  .key { margin-left: 0; margin-right: 14px; }
}
@media print { main { max-width: none; padding: 0; } figure, table { break-inside: avoid; } }
"""
"""System fonts; the colours, for light and dark, differ in lightness and not in hue alone."""
_MAX_MODELS_SHOWN = 12
"""Rows of a plot by model; the tables have all models."""


def render_page(report: RunReport) -> str:
    """Return the page."""
    title = f"Report of {report.source}"
    sections = [
        _over_time(report),
        _distributions(report),
        _outputs(report),
        _models(report),
        _variants(report),
        _tenants(report),
        _errors(report),
        _notes(report),
    ]
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body><main>",
            f"<header><h1>{escape(title)}</h1><p>{escape(_subtitle(report))}</p>{_tiles(report)}</header>",
            *(section for section in sections if section),
            "</main></body></html>\n",
        ]
    )


def _subtitle(report: RunReport) -> str:
    if report.started is None:
        return f"{headline(report)}."
    start, end = (
        str(iso_time(moment)).replace("T", " ").partition(".")[0] for moment in (report.started, report.ended)
    )
    return f"{headline(report)}. {start} to {end} UTC."


def _tiles(report: RunReport) -> str:
    total = report.total
    half = total.durations["ttlt_s"].percentiles[50]
    pace = total.sizes["output_tokens_per_s"].percentiles[50]
    tiles = [
        ("Answers", count(total.answers), f"{amount(report.answers_per_s)} a second"),
        ("Errors", share(total.error_rate), f"{count(total.errors)} answers"),
        ("Duration", duration(report.duration_s), "first start to last answer"),
        ("Median time", NOTHING if half is None else duration(half.value), "to the last token"),
        ("Output tokens", count(total.tokens["output"].total), f"{amount(total.tokens['output'].per_s)} a second"),
        ("Input tokens", count(total.tokens["input"].total), f"{count(total.tokens['input_cached'].total)} cached"),
        ("Median speed", NOTHING if pace is None else amount(pace.value), "output tokens a second, one answer"),
    ]
    if total.cost is not None:
        each = total.cost / (total.answers - total.errors) if total.answers > total.errors else None
        tiles.append(("Cost", money(total.cost), f"{money(each)} for a good answer"))
    items = "".join(f"<div><dt>{name}</dt><dd>{value}</dd><dd>{more}</dd></div>" for name, value, more in tiles)
    return f'<dl class="tiles">{items}</dl>'


def _over_time(report: RunReport) -> str:
    if not report.bins:
        return ""
    plots: list[tuple[str, Callable[[RunReport, float], str], tuple[str, ...]]] = [
        ("Answers a second, by the time they were complete", plot_answers, ("good", "errors")),
        ("Time to last token of good answers", plot_times, ("p50", "p90")),
        ("Attempts a second that these answers took", plot_attempts, ("first", "further")),
    ]
    if report.total.tokens["output"].total:
        plots.append(("Output tokens a second", plot_tokens, ()))
    return _section("time", "Over time", *(_both(report, caption, plot, names) for caption, plot, names in plots))


def _both(report: RunReport, caption: str, plot: Callable[[RunReport, float], str], names: tuple[str, ...] = ()) -> str:
    """Return a drawing over the whole page, and in its place on a phone one that is made for that."""
    wide = plot(report, WIDE)
    if not wide:
        return ""
    return _figure(caption, _two(wide, plot(report, NARROW)), _key(*names))


def _two(wide: str, small: str) -> str:
    return f'<div class="wide">{wide}</div><div class="small">{small}</div>'


def _key(*names: str) -> str:
    words = {"p50": "median", "p90": "90th percentile", "p99": "99th percentile"}
    return "".join(f' <span class="key"><i class="{name}"></i>{words.get(name, name)}</span>' for name in names)


def _distributions(report: RunReport) -> str:
    plots = "".join(_distribution(report, name) for name in DURATIONS)
    if not plots:
        return ""
    return _section("times", "Times of good answers", _LOGARITHMIC, f'<div class="pair">{plots}</div>')


_LOGARITHMIC = (
    '<p class="notes">The horizontal axes are logarithmic: equal distances are equal ratios. A line stands at the'
    " median (p50) and at the 90th and 99th percentile; it is dashed where few answers lie beyond it.</p>"
)


def _distribution(report: RunReport, name: str) -> str:
    spread = {**report.total.durations, **report.total.sizes}[name]
    bars = report.histograms[name]
    if not bars or not spread.maximum:
        return ""
    caption = f"{NAMES[name]}: <span>{MEANINGS[name]}; logarithmic</span>"
    return _figure(caption, plot_distribution(name, NAMES[name], bars, spread))


def _outputs(report: RunReport) -> str:
    """Return how long good answers are, how fast each came, and why they ended."""
    plots = "".join(_distribution(report, name) for name in SIZES)
    parts = [f'<div class="pair">{plots}</div>'] if plots else []
    reasons = report.total.finish_reasons
    if reasons:
        title = "Why the generation ended"
        drawings = _two(*(plot_counts("finish-reasons", title, reasons, "good", width) for width in (WIDE, NARROW)))
        parts.append(
            _figure(f"{title}: <span>finish reasons of good answers, as the server says them</span>", drawings)
        )
    return _section("output", "What good answers say", *parts) if parts else ""


def _models(report: RunReport) -> str:
    if not report.models:
        return ""
    groups = [*report.models, *([report.total] if len(report.models) > 1 else [])]
    return _section("models", "By model", *_group_tables(report, "Model", groups, _ranges(report)))


def _variants(report: RunReport) -> str:
    if not report.variants:
        return ""
    return _section("variants", "By variant", *_group_tables(report, "Variant", report.variants, ""))


def _group_tables(report: RunReport, noun: str, groups: Sequence[GroupReport], drawing: str) -> list[str]:
    """Return the tables of models or of their variants, with a drawing between them."""
    has_cost = any(group.cost is not None for group in groups)
    header = [noun, "Answers", "Errors", "Share of errors", *(TOKEN_NAMES[kind] for kind in TOKEN_KINDS)]
    header += ["Output tokens a second", *(["Cost"] if has_cost else [])]
    rows = [
        [group.name, count(group.answers), count(group.errors), share(group.error_rate)]
        + [count(group.tokens[kind].total) for kind in TOKEN_KINDS]
        + [amount(group.tokens["output"].per_s), *([money(group.cost)] if has_cost else [])]
        for group in groups
    ]
    parts = [_table("Answers and tokens", header, rows), drawing]
    rows = list(_spread_rows(groups))
    if rows:
        parts.append(
            _folded(f"Times, lengths and speeds of good answers, by {noun.lower()}", ["Measure", *SPREAD_HEADER], rows)
        )
        parts.append(_lines(legend(report, rows)))
    return parts


def _spread_rows(groups: Iterable[GroupReport]) -> Iterator[list[str]]:
    """Yield the row of every measure that a group has values of, not all of them 0."""
    for group in groups:
        for name, spread in {**group.durations, **group.sizes}.items():
            if not spread.maximum:
                continue
            show = amount if name in UNITS else duration
            shown = [
                NOTHING if found is None else show(found.value) + (WEAK if found.is_weak else "")
                for found in (spread.percentiles[percent] for percent in PERCENTS)
            ]
            values = [show(spread.mean), *shown, show(spread.maximum)]
            title = f"{NAMES[name]}{UNITS.get(name, '')}"
            yield [group.name, title, count(spread.count), count(spread.missing), *values]


def _tenants(report: RunReport) -> str:
    if not report.tenants:
        return ""
    header = ["Tenant / model", "Answers", "Errors", "Input", "Output", "Cost"]
    rows = list(cost_rows([*report.tenants, report.total]))
    return _section("tenants", "By tenant", _table("Tokens and cost", header, rows))


def _ranges(report: RunReport) -> str:
    if len(report.models) < 2:  # noqa: PLR2004 - the histograms show the same for one model
        return ""
    plots = ""
    for name in ("ttft_s", "ttlt_s", "tpot_s"):
        drawing = plot_ranges(f"{NAMES[name]} by model", report.models[:_MAX_MODELS_SHOWN], name)
        if drawing:
            plots += _figure(f"{NAMES[name]} <span>(logarithmic)</span>", drawing, _key("p50", "p90", "p99"))
    return f'<div class="pair top">{plots}</div>' if plots else ""


def _errors(report: RunReport) -> str:
    if not report.error_classes:
        return ""
    header = ["Class", "Answers", "Share of all answers", "Statuses", "With a part of an answer"]
    header += ["Mean time to fail", "Median", "90th percentile"]
    rows = list(_error_rows(report))
    counts = {group.name: group.answers for group in report.error_classes}
    drawings = _two(*(plot_counts("errors", "Errors by class", counts, "errors", width) for width in (WIDE, NARROW)))
    shown = [[name, example] for name, example in examples(report)]
    return _section(
        "errors",
        "Errors",
        _figure("Answers by error class", drawings),
        _table("Error classes", header, rows),
        _lines(legend(report, rows)),
        _table("One example of each class", ["Class", "Line of the input, message, address"], shown, texts=2),
    )


def _error_rows(report: RunReport) -> Iterator[list[str]]:
    """Yield the row of every error class: how many, of which statuses, how many with part of an answer, how fast."""
    for group in report.error_classes:
        spread = group.durations["ttlt_s"]
        found = [spread.percentiles[percent] for percent in PERCENTS[:2]]
        took = [NOTHING if item is None else duration(item.value) + (WEAK if item.is_weak else "") for item in found]
        counts = [count(group.answers), share(group.answers / report.total.answers), " ".join(group.statuses)]
        yield [group.name, *counts, count(group.truncated), duration(spread.mean), *took]


def _notes(report: RunReport) -> str:
    statuses = ", ".join(f"{status}: {count(number)}" for status, number in report.total.statuses.items())
    lines = [*remarks(report), *([f"answers by status: {statuses}"] if statuses else [])]
    if report.requests_per_minute is not None:
        lines.append(
            f"attempts started within {duration(report.send_window_s)}, {amount(report.requests_per_minute)} a minute"
        )
    return _section("notes", "Notes", _lines(lines))


def _section(key: str, title: str, *parts: str) -> str:
    return f'<section id="{key}"><h2>{title}</h2>{"".join(parts)}</section>'


def _lines(texts: Iterable[str]) -> str:
    items = "".join(f"<li>{escape(text)}</li>" for text in texts)
    return f'<ul class="notes">{items}</ul>' if items else ""


def _figure(caption: str, drawing: str, key: str = "") -> str:
    """Return a drawing with its caption, which is our own HTML."""
    return f"<figure><figcaption>{caption}{key}</figcaption>{drawing}</figure>"


def _table(caption: str, header: Sequence[str], rows: Sequence[Sequence[str]], *, texts: int = 1) -> str:
    """
    Return a table whose first `texts` columns are words; rows of the same name share it as their heading.

    On a phone a row is a list of its values, each beside the heading of its column (`data-label`).
    """
    head = "".join(_cell("th", ' scope="col"', name, place < texts) for place, name in enumerate(header))
    body = ""
    for name, group in groupby(rows, key=itemgetter(0)):
        same = list(group)
        span = f' scope="rowgroup" rowspan="{len(same)}"' if len(same) > 1 else ' scope="row"'
        for place, row in enumerate(same):
            cells = [
                _cell("td", f' data-label="{escape(header[column])}"', text, column < texts, len(header))
                for column, text in enumerate(row[1:], 1)
            ]
            body += f"<tr>{'' if place else _cell('th', span, name, is_text=True)}{''.join(cells)}</tr>"
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
        f"<caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _folded(caption: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a long table that is opened by a click: the first value of each row is the heading of its group."""
    head = "".join(_cell("th", ' scope="col"', name, place < 1) for place, name in enumerate(header))
    body = ""
    for name, group in groupby(rows, key=itemgetter(0)):
        span = f' scope="rowgroup" colspan="{len(header)}"'
        body += f'<tbody class="group"><tr>{_cell("th", span, name, is_text=True)}</tr>'
        for row in group:
            cells = [
                _cell("td", f' data-label="{escape(header[column])}"', text, column < 1, len(header))
                for column, text in enumerate(row[1:])
            ]
            body += f"<tr>{''.join(cells)}</tr>"
        body += "</tbody>"
    return (
        f"<details><summary>{escape(caption)} ({len(rows)} rows)</summary>"
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
        f"<caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead>{body}</table></div></details>"
    )


def _cell(tag: str, attributes: str, text: str, is_text: bool, columns: int = 0) -> str:
    style = "text" if is_text else ""
    if is_text and tag == "td":  # on a phone the heading of the other values, or alone under the name
        style += " long" if columns == 2 else " head"  # noqa: PLR2004 - a name and a text
    return f"<{tag}{attributes}{f' class={chr(34)}{style}{chr(34)}' if style else ''}>{escape(text)}</{tag}>"
