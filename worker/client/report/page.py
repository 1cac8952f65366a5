"""
The report as one HTML page that needs nothing else: styles and drawings stand in it, scripts there are none.

It opens from a file, offline, in light and dark; its Content-Security-Policy forbids it to load anything.
"""

from collections.abc import Iterable, Sequence
from html import escape
from itertools import groupby
from operator import itemgetter

from worker.client.report.numbers import amount, count, share, span
from worker.client.report.page_style import STYLE
from worker.client.report.plots import plot_answers, plot_errors, plot_tokens
from worker.client.report.results import TOKEN_KINDS, RunReport, iso_time
from worker.client.report.spreads import plot_distribution, plot_ranges
from worker.client.report.text import duration_rows, error_rows, headline, legend, remarks

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
_MAX_MODELS_SHOWN = 12
"""Rows of a plot by model; the tables have them all."""


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
            f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>",
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
    if len(report.models) < 2:  # noqa: PLR2004 - the histograms say it all for one
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
    return _section("errors", "Errors", plot, _table("Error classes", header, rows), _lines(legend(report, rows)))


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
    """Return a drawing with its caption, which is HTML of ours."""
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
