"""
The report as one HTML page with its styles and drawings, without scripts.

The page opens from a file, offline, in light and dark; its Content-Security-Policy forbids it to load anything.
"""

from collections.abc import Iterable, Sequence
from html import escape
from itertools import groupby
from operator import itemgetter

from worker.client.report.plots import plot_answers, plot_distribution, plot_errors, plot_ranges, plot_tokens
from worker.client.report.results import TOKEN_KINDS, RunReport, iso_time
from worker.client.report.text import (
    amount,
    count,
    duration_rows,
    error_rows,
    examples,
    headline,
    legend,
    remarks,
    share,
    span,
)

NAMES = {
    "ttft_s": "Time to first token",
    "ttlt_s": "Time to last token",
    "tpot_s": "Time per output token",
    "queue_s": "Time in the queue",
    "held_s": "Time held",
}
MEANINGS = {
    "ttft_s": "from the start of the last attempt to its first generated text; only of streamed answers",
    "ttlt_s": "from the start of the last attempt to its end",
    "tpot_s": "per output token after the first; only of streamed answers",
    "queue_s": "from the publishing of the message to its first attempt",
    "held_s": "waiting in the worker between attempts, for a backend to recover",
}
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
figure { margin: 16px 0 0; min-width: 0; overflow-x: auto; }
#time svg, #errors svg { min-width: 620px; }
figcaption { font-weight: 600; font-size: 14px; margin-bottom: 4px; }
figcaption span { font-weight: 400; color: var(--dim); }
.key { margin-left: 14px; white-space: nowrap; font-weight: 400; color: var(--dim); }
.key i { display: inline-block; width: 11px; height: 11px; border-radius: 2px; margin-right: 5px; }
.key i.good, .key i.p50 { background: var(--good); } .key i.p90 { background: var(--tokens); }
.key i.errors, .key i.p99 { background: var(--bad); } .key i:where(.p50, .p90, .p99) { border-radius: 50%; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(400px, 100%), 1fr)); gap: 8px 24px;
  align-items: end; } .pair.top { align-items: start; }
svg { display: block; width: 100%; height: auto; }
svg text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; fill: var(--dim); }
svg .tag { fill: var(--mark); font-weight: 600; font-size: 11px; paint-order: stroke; stroke: var(--paper);
  stroke-width: 3px; }
svg .grid { stroke: var(--rule); } svg .axis { stroke: var(--dim); }
svg .good { fill: var(--good); } svg .errors { fill: var(--bad); } svg .tokens { fill: var(--tokens); }
svg .mark { stroke: var(--mark); stroke-width: 1.3; } svg .mark.weak { stroke-dasharray: 3 3; }
svg .range { stroke: var(--good); stroke-width: 2.5; opacity: .55; }
svg .dot { fill: var(--good); stroke: var(--paper); stroke-width: 1.5; }
svg .p90 { fill: var(--tokens); } svg .p99 { fill: var(--bad); }
svg .dot.weak { fill: var(--paper); stroke: var(--good); } svg .p90.weak { stroke: var(--tokens); }
svg .p99.weak { stroke: var(--bad); }
.scroll { overflow-x: auto; margin-top: 18px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding-bottom: 4px; }
th, td { padding: 5px 10px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--rule); }
th { font-weight: 400; } thead th { color: var(--dim); font-size: 13px; }
th:first-child { padding-left: 0; } tbody th { vertical-align: top; font-weight: 600; max-width: 340px;
  overflow: hidden; text-overflow: ellipsis; }
.text { text-align: left; } td.text { white-space: normal; overflow-wrap: anywhere; }
.notes { color: var(--dim); font-size: 14px; padding-left: 0; list-style: none; }
@media print { main { max-width: none; padding: 0; } figure, table { break-inside: avoid; } }
"""
"""System fonts; the colours, for light and dark, differ in lightness and not in hue alone."""
_MAX_MODELS_SHOWN = 12
"""Rows of a plot by model; the tables have all models."""


def render_page(report: RunReport) -> str:
    """Return the page."""
    title = f"Report of {report.source}"
    sections = [_over_time(report), _distributions(report), _models(report), _errors(report), _notes(report)]
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
    tiles = [
        ("Answers", count(total.answers), f"{amount(report.answers_per_s)} a second"),
        ("Errors", share(total.error_rate), f"{count(total.errors)} answers"),
        ("Duration", span(report.duration_s), "first start to last answer"),
        ("Output tokens", count(total.tokens["output"].total), f"{amount(total.tokens['output'].per_s)} a second"),
        ("Input tokens", count(total.tokens["input"].total), f"{count(total.tokens['input_cached'].total)} cached"),
    ]
    items = "".join(f"<div><dt>{name}</dt><dd>{value}</dd><dd>{more}</dd></div>" for name, value, more in tiles)
    return f'<dl class="tiles">{items}</dl>'


def _over_time(report: RunReport) -> str:
    if not report.bins:
        return ""
    plots = _figure("Answers a second, by the time they were complete", plot_answers(report), _key("good", "errors"))
    if report.total.tokens["output"].total:
        plots += _figure("Output tokens a second", plot_tokens(report))
    return _section("time", "Over time", plots)


def _key(*names: str) -> str:
    return "".join(f'<span class="key"><i class="{name}"></i>{name}</span>' for name in names)


def _distributions(report: RunReport) -> str:
    plots = ""
    for name, bars in report.histograms.items():
        spread = report.total.durations[name]
        if bars and spread.maximum:
            caption = f"{NAMES[name]}: <span>{MEANINGS[name]}</span>"
            plots += _figure(caption, plot_distribution(name.replace("_", "-"), NAMES[name], bars, spread))
    if not plots:
        return ""
    return _section("times", "Times of good answers", f'<div class="pair">{plots}</div>')


def _models(report: RunReport) -> str:
    if not report.models:
        return ""
    groups = [*report.models, *([report.total] if len(report.models) > 1 else [])]
    header = [
        "Model",
        "Answers",
        "Errors",
        "Error rate",
        *(kind.replace("_", " ").capitalize() for kind in TOKEN_KINDS),
        "Output/s",
    ]
    rows = [
        [group.name, count(group.answers), count(group.errors), share(group.error_rate)]
        + [count(group.tokens[kind].total) for kind in TOKEN_KINDS]
        + [amount(group.tokens["output"].per_s)]
        for group in groups
    ]
    parts = [_table("Answers and tokens", header, rows), _ranges(report)]
    rows = list(duration_rows(groups))
    if rows:
        header = ["Model", "Time", "Answers", "Unknown", "Mean", "p50", "p90", "p99", "Longest"]
        parts.append(_table("Times of good answers, seconds", header, rows, texts=2))
        parts.append(_lines(legend(report, rows)))
    return _section("models", "By model", *parts)


def _ranges(report: RunReport) -> str:
    if len(report.models) < 2:  # noqa: PLR2004 - the histograms show the same for one model
        return ""
    plots = ""
    for name in ("ttft_s", "ttlt_s", "tpot_s"):
        key = f"models-{name.replace('_', '-')}"
        drawing = plot_ranges(key, f"{NAMES[name]} by model", report.models[:_MAX_MODELS_SHOWN], name)
        if drawing:
            plots += _figure(NAMES[name], drawing, _key("p50", "p90", "p99"))
    return f'<div class="pair top">{plots}</div>' if plots else ""


def _errors(report: RunReport) -> str:
    if not report.error_classes:
        return ""
    header = ["Class", "Answers", "Of all", "Statuses", "With a part", "Mean s to fail", "p50", "p90"]
    rows = list(error_rows(report))
    plot = _figure("Answers by error class", plot_errors(report))
    shown = [[name, example] for name, example in examples(report)]
    return _section(
        "errors",
        "Errors",
        plot,
        _table("Error classes", header, rows),
        _lines(legend(report, rows)),
        _table("One example of each class", ["Class", "Line of the input, message, address"], shown, texts=2),
    )


def _notes(report: RunReport) -> str:
    statuses = ", ".join(f"{status}: {count(number)}" for status, number in report.total.statuses.items())
    lines = [*remarks(report), *([f"answers by status: {statuses}"] if statuses else [])]
    if report.requests_per_minute is not None:
        lines.append(
            f"attempts started within {span(report.send_window_s)}, {amount(report.requests_per_minute)} a minute"
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
    """Return a table whose first `texts` columns are words; rows of the same name share it as their heading."""
    head = "".join(_cell("th", ' scope="col"', name, place < texts) for place, name in enumerate(header))
    body = ""
    for name, group in groupby(rows, key=itemgetter(0)):
        same = list(group)
        span = f' scope="rowgroup" rowspan="{len(same)}"' if len(same) > 1 else ' scope="row"'
        for place, row in enumerate(same):
            cells = [_cell("td", "", text, column < texts) for column, text in enumerate(row[1:], 1)]
            body += f"<tr>{'' if place else _cell('th', span, name, is_text=True)}{''.join(cells)}</tr>"
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
        f"<caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell(tag: str, scope: str, text: str, is_text: bool) -> str:
    style = ' class="text"' if is_text else ""
    return f"<{tag}{scope}{style}>{escape(text)}</{tag}>"
