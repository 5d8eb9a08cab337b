"""Charts as HTML: lines as a picture that stretches, texts and marks as elements that do not."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hf_divguard.cli.output import number_in_words, printable
from hf_divguard.cli.page.curves import Curve, Scale

__all__ = ["Mark", "chart", "data_script", "safe"]

_SIDE = 1000
_MOST_BELOW = 400


@dataclass(frozen=True)
class Mark:
    """Something that is drawn at a step.

    Args:
        kind: ``"onset"``, ``"found"``, ``"rollback"``, ``"warned"``, or the verdict of a checkpoint.
        step: Where it stands.
        text: What it says.
        below: Whether it stands below the axis, as checkpoints do.
    """

    kind: str
    step: int
    text: str
    below: bool = False


_SIGNS = {"onset": "◂", "found": "▼", "rollback": "↩", "warned": "△", "best": "★"}


def safe(text: object) -> str:
    """Return a text as HTML that shows it, whatever it holds.

    Example:
        >>> safe("</script><b>")
        '&lt;/script&gt;&lt;b&gt;'
    """
    return html.escape(printable(text))


def data_script(name: str, content: Any) -> str:
    """Return JSON as an element that no text in it can end."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return f'<script type="application/json" id="{name}">{text}</script>'


def chart(
    name: str, title: str, curves: Sequence[Curve], span: tuple[int, int], marks: Sequence[Mark]
) -> str:
    """Return the chart of ``curves`` over the steps of ``span``."""
    is_rate = all(curve.name == "learning_rate" for curve in curves)
    values = [value for curve in curves for _, value in curve.points]
    scale = Scale.of(values, may_be_logarithmic=not is_rate).padded()
    above = [mark for mark in marks if not mark.below]
    keys = "".join(
        f'<li class="key{number % 6}">{safe(curve.name)}</li>' for number, curve in enumerate(curves)
    )
    return (
        f'<figure class="chart" data-chart="{name}" tabindex="0" role="group" '
        f'aria-label="{safe(_summary(title, curves))}"><figcaption><h3>{safe(title)}</h3>'
        + (f'<ul class="keys">{keys}</ul>' if len(curves) > 1 else "")
        + f"<small>{safe(_notes(curves, scale))}</small></figcaption>"
        f'<div class="plot"><div class="yaxis">{_y_labels(scale)}</div>'
        f'<div class="area">{_picture(curves, scale, span, above)}{_signs(above, span)}'
        f'{_broken(curves, span)}<i class="cursor" hidden></i></div>'
        f'<div class="xaxis">{_x_labels(span)}{_below(marks, span)}</div></div>'
        f'<output aria-live="polite">&nbsp;</output></figure>'
    )


def _notes(curves: Sequence[Curve], scale: Scale) -> str:
    finite = sum(curve.total - curve.n_broken for curve in curves)
    shown = sum(len(curve.points) for curve in curves)
    notes = ["Logarithmic scale."] if scale.is_logarithmic else []
    notes += [f"{shown:,} of {finite:,} values are drawn, with all extremes."] if shown < finite else []
    return " ".join(notes)


def _summary(title: str, curves: Sequence[Curve]) -> str:
    parts = []
    for curve in curves:
        if curve.points:
            values = [value for _, value in curve.points]
            parts.append(
                f"{curve.name} from {number_in_words(values[0])} to {number_in_words(values[-1])}, lowest "
                f"{number_in_words(min(values))}, highest {number_in_words(max(values))}"
            )
        if curve.broken:
            parts.append(f"{curve.name} is not finite from step {curve.broken[0]} on, at times or always")
    return f"{title}: {'; '.join(parts) or 'no value'}. Arrow keys read single values."


def x_share(step: int, span: tuple[int, int]) -> float:
    """Return where a step lies in ``span``, from 0 to 1."""
    return min(1.0, max(0.0, (step - span[0]) / max(1, span[1] - span[0])))


def _percent(share: float) -> str:
    return f"{100 * share:.2f}%"


def _picture(curves: Sequence[Curve], scale: Scale, span: tuple[int, int], marks: Sequence[Mark]) -> str:
    parts = [
        f'<path class="grid" d="M0 {y:.1f}H{_SIDE}"/>'
        for y in (_SIDE * (1 - scale.share(tick)) for tick in scale.ticks)
    ]
    for mark in marks:
        x = _SIDE * x_share(mark.step, span)
        parts.append(f'<path class="line {mark.kind}" d="M{x:.1f} 0V{_SIDE}"/>')
    for number, curve in enumerate(curves):
        points = [
            f"{_SIDE * x_share(step, span):.1f} {_SIDE * (1 - scale.share(value)):.1f}"
            for step, value in curve.points
        ]
        if len(points) == 1:
            points *= 2
        if points:
            parts.append(f'<path class="curve key{number % 6}" d="M{"L".join(points)}"/>')
    return f'<svg viewBox="0 0 {_SIDE} {_SIDE}" preserveAspectRatio="none" aria-hidden="true">{"".join(parts)}</svg>'


def _signs(marks: Sequence[Mark], span: tuple[int, int]) -> str:
    return "".join(
        f'<b class="sign {mark.kind}" style="left:{_percent(x_share(mark.step, span))}" title="{safe(mark.text)}">'
        f"{_SIGNS.get(mark.kind, '|')}</b>"
        for mark in marks
    )


def _broken(curves: Sequence[Curve], span: tuple[int, int]) -> str:
    return "".join(
        f'<b class="sign broken" style="left:{_percent(x_share(step, span))}" title="not finite at step {step}">×</b>'
        for curve in curves
        for step in curve.broken
    )


def _below(marks: Sequence[Mark], span: tuple[int, int]) -> str:
    below = [mark for mark in marks if mark.below]
    if len(below) > _MOST_BELOW:
        below = below[:: len(below) // _MOST_BELOW + 1]
    return "".join(
        f'<b class="save {mark.kind}" style="left:{_percent(x_share(mark.step, span))}" title="{safe(mark.text)}"></b>'
        for mark in below
    )


def _y_labels(scale: Scale) -> str:
    return "".join(
        f'<span style="top:{_percent(1 - scale.share(tick))}">{tick:.6g}</span>' for tick in scale.ticks
    )


def _x_labels(span: tuple[int, int]) -> str:
    scale = Scale.of([float(span[0]), float(max(span[1], span[0] + 1))], may_be_logarithmic=False)
    whole = [int(tick) for tick in scale.ticks if tick == int(tick)]
    return "".join(f'<span style="left:{_percent(x_share(tick, span))}">{tick:,}</span>' for tick in whole)
