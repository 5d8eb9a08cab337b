"""The whole page: head, answer, charts, timeline, tables. Nothing in it comes from the network."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_divguard._version import __version__
from hf_divguard.cli.page.charts import Mark, chart, data_script, safe
from hf_divguard.cli.page.curves import Curve

__all__ = ["Chart", "Page", "Table", "document"]

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
_LEGEND = (
    ("sign onset", "◂", "onset"),
    ("sign found", "▼", "found"),
    ("sign rollback", "↩", "rollback"),
    ("sign warned", "△", "warning"),
    ("sign broken", "×", "not finite"),
    ("save complete", "", "complete checkpoint"),
    ("save suspect", "", "suspect or quarantined"),
    ("save incomplete", "", "incomplete"),
)


@dataclass(frozen=True)
class Chart:
    """A chart: its title and its lines."""

    title: str
    curves: list[Curve]


@dataclass(frozen=True)
class Table:
    """A table: its title, its head, its rows, and what to say if there is none."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    empty: str
    note: str = ""


@dataclass(frozen=True)
class Page:
    """What the page shows.

    Args:
        name: Name of the run.
        state: One word.
        reason: One sentence.
        facts: Names and texts of the answer.
        paste: What to paste; ``None`` for nothing.
        charts: The charts.
        marks: What is marked in them.
        tables: The tables.
        notes: Sentences about what could not be read.
    """

    name: str
    state: str
    reason: str
    facts: Sequence[tuple[str, str]]
    paste: str | None
    charts: Sequence[Chart]
    marks: Sequence[Mark]
    tables: Sequence[Table]
    notes: Sequence[str] = field(default_factory=list)


def document(page: Page) -> str:
    """Return the page as one HTML document."""
    folder = Path(__file__).parent
    style, script = ((folder / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    span = _span(page)
    body = [
        f'<header><div><h1>{safe(page.name)}</h1><p><strong class="state {safe(page.state)}">{safe(page.state)}'
        f"</strong> {safe(page.reason)}</p></div>"
        '<button type="button" id="theme" aria-label="Change between light and dark">Light / dark</button></header>',
        f"<main>{_answer(page)}{_curves(page, span)}",
        *(_table(f"t{number}", each) for number, each in enumerate(page.tables)),
        "".join(f'<p class="note">{safe(note)}</p>' for note in page.notes),
        f"</main><footer>hf_divguard {__version__}, {time.strftime('%Y-%m-%d %H:%M:%S %z')}</footer>",
    ]
    data = {
        "span": span,
        "charts": [
            [{"name": curve.name, "points": curve.points} for curve in each.curves] for each in page.charts
        ],
        "marks": [[mark.step, mark.text] for mark in page.marks if not mark.below],
    }
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><meta name="referrer" content="no-referrer">'
        f'<link rel="icon" href="data:,"><title>{safe(page.name)}: {safe(page.state)}</title><style>{style}</style>'
        f"</head><body>{''.join(body)}{data_script('data', data)}<script>{script}</script></body></html>\n"
    )


def _answer(page: Page) -> str:
    facts = "".join(f"<dt>{safe(name)}</dt><dd>{safe(text)}</dd>" for name, text in page.facts)
    paste = (
        f'<p class="paste"><code id="paste">{safe(page.paste)}</code>'
        '<button type="button" id="copy">Copy</button></p>'
        if page.paste
        else ""
    )
    return f'<section aria-labelledby="answer"><h2 id="answer">Answer</h2><dl>{facts}</dl>{paste}</section>'


def _curves(page: Page, span: tuple[int, int]) -> str:
    charts = "".join(
        chart(f"c{number}", each.title, each.curves, span, page.marks)
        for number, each in enumerate(page.charts)
    )
    legend = "".join(
        f'<li><b class="{kind}">{sign}</b> {words}</li>'
        for kind, sign, words in _LEGEND
        if _is_used(kind, page)
    )
    drawn = f'<ul class="legend">{legend}</ul>{charts}' if charts else "<p>The run has no log to draw.</p>"
    return f'<section aria-labelledby="curves"><h2 id="curves">Curves</h2>{drawn}</section>'


def _is_used(kind: str, page: Page) -> bool:
    word = kind.split()[1]
    if word == "broken":
        return any(curve.broken for each in page.charts for curve in each.curves)
    words = {"quarantined": "suspect", "unreadable": "incomplete", "unknown": "incomplete"}
    return any(words.get(mark.kind, mark.kind) == word for mark in page.marks)


def _span(page: Page) -> tuple[int, int]:
    steps = [step for each in page.charts for curve in each.curves for step, _ in curve.points]
    steps += [step for each in page.charts for curve in each.curves for step in curve.broken]
    steps += [mark.step for mark in page.marks]
    return (min(steps), max(steps)) if steps else (0, 1)


def _table(name: str, table: Table) -> str:
    title = f'<h2 id="{name}">{safe(table.title)}</h2>'
    if not table.rows:
        return f'<section aria-labelledby="{name}">{title}<p>{safe(table.empty)}</p></section>'
    head = "".join(f'<th scope="col">{safe(cell)}</th>' for cell in table.head)
    rows = "".join(
        "<tr>"
        + "".join(
            f'<td data-head="{safe(name)}">{_cell(cell)}</td>'
            for name, cell in zip(table.head, row, strict=True)
        )
        + "</tr>"
        for row in table.rows
    )
    note = f"<p>{safe(table.note)}</p>" if table.note else ""
    return (
        f'<section aria-labelledby="{name}">{title}{note}<div class="wide" tabindex="0" role="region" '
        f'aria-labelledby="{name}"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div></section>'
    )


_VERDICTS = ("complete", "suspect", "quarantined", "incomplete", "unreadable", "unknown")


def _cell(text: Any) -> str:
    return f'<strong class="state {text}">{text}</strong>' if text in _VERDICTS else safe(text)
