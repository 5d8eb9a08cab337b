"""A picture of the last steps of a run as SVG: panels one above the other, with marks at given steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

__all__ = ["curve_picture"]

_WIDTH, _PANEL, _LEFT, _RIGHT, _TOP, _GAP = 760, 130, 70, 16, 34, 26
_COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c")
# Values of one sign that span more than this are drawn on a logarithmic scale.
_LOG_SPAN = 50.0


def curve_picture(
    steps: Sequence[int], series: Mapping[str, Sequence[float | None]], marks: Mapping[str, int], title: str
) -> str:
    """Return a picture of curves over steps.

    Args:
        steps: The steps, in order.
        series: Values by the name of the curve, one for each step; ``None`` where there is none. Values
            that are not finite are drawn as crosses at the upper edge.
        marks: Steps that get a vertical line, by what is written beside it.
        title: What stands above.

    Example:
        >>> picture = curve_picture([1, 2, 3], {"loss": [2.0, 1.5, float("nan")]}, {"onset": 3}, "Step 3")
        >>> picture.startswith("<svg"), picture.count("<polyline"), "onset" in picture
        (True, 1, True)
    """
    drawn = {name: values for name, values in series.items() if any(value is not None for value in values)}
    height = _TOP + len(drawn) * (_PANEL + _GAP) + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" '
        f'height="{height}" font-family="sans-serif" font-size="11">',
        f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="{_LEFT}" y="18" font-size="13" fill="#222222">{escape(title)}</text>',
    ]
    for number, (name, values) in enumerate(drawn.items()):
        top = _TOP + number * (_PANEL + _GAP)
        parts += _panel(steps, values, name, top, _COLOURS[number % len(_COLOURS)])
        parts += _marks(steps, marks, top, with_text=number == 0)
    return "\n".join([*parts, "</svg>", ""])


def _x(steps: Sequence[int], step: float) -> float:
    first, last = steps[0], steps[-1]
    share = (step - first) / (last - first) if last > first else 0.5
    return _LEFT + min(1.0, max(0.0, share)) * (_WIDTH - _LEFT - _RIGHT)


def _panel(
    steps: Sequence[int], values: Sequence[float | None], name: str, top: int, colour: str
) -> list[str]:
    finite = [value for value in values if value is not None and math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    is_log = low > 0 and high / low > _LOG_SPAN
    bottom = top + _PANEL

    def y(value: float) -> float:
        first, last, here = (math.log(low), math.log(high), math.log(value)) if is_log else (low, high, value)
        return (
            bottom - 4 - (here - first) / (last - first) * (_PANEL - 8) if last > first else top + _PANEL / 2
        )

    parts = [
        f'<rect x="{_LEFT}" y="{top}" width="{_WIDTH - _LEFT - _RIGHT}" height="{_PANEL}" fill="none" stroke="#bbbbbb"/>',
        f'<text x="{_LEFT + 6}" y="{top + 14}" fill="{colour}">{escape(name)}{" (log)" if is_log else ""}</text>',
        f'<text x="{_LEFT - 6}" y="{top + 10}" text-anchor="end" fill="#555555">{high:.4g}</text>',
        f'<text x="{_LEFT - 6}" y="{bottom}" text-anchor="end" fill="#555555">{low:.4g}</text>',
        f'<text x="{_LEFT}" y="{bottom + 13}" fill="#555555">{steps[0]}</text>',
        f'<text x="{_WIDTH - _RIGHT}" y="{bottom + 13}" text-anchor="end" fill="#555555">{steps[-1]}</text>',
    ]
    points: list[str] = []
    for step, value in zip([*steps, steps[-1]], [*values, None], strict=True):
        if value is not None and math.isfinite(value):
            points.append(f"{_x(steps, step):.1f},{y(value):.1f}")
            continue
        if points:
            line = " ".join(points if len(points) > 1 else points * 2)
            parts.append(
                f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5" stroke-linecap="round"/>'
            )
            points = []
        if value is not None:
            x = _x(steps, step)
            parts.append(
                f'<path d="M{x - 4:.1f},{top + 2} l8,8 m0,-8 l-8,8" stroke="#d62728" stroke-width="1.5"/>'
            )
    return parts


def _marks(steps: Sequence[int], marks: Mapping[str, int], top: int, *, with_text: bool) -> list[str]:
    parts = []
    for number, (name, step) in enumerate(marks.items()):
        x = _x(steps, step)
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{top + _PANEL}" stroke="#d62728" '
            'stroke-dasharray="4 3"/>'
        )
        if with_text:
            parts.append(
                f'<text x="{x - 4:.1f}" y="{top + 28 + 13 * number}" text-anchor="end" fill="#d62728">'
                f"{escape(name)} {step}</text>"
            )
    return parts
