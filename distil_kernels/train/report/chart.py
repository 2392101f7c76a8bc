"""Line charts as inline SVG: axes, grid, error bars, a legend; colours come from the page's style sheet."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import NamedTuple

WIDTH, HEIGHT = 460, 250
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 14, 46


class Series(NamedTuple):
    """One line: its points as (x, y, standard error or NaN)."""

    label: str
    points: Sequence[tuple[float, float, float]]
    marked: bool = False
    """With a dot at each point."""


def line_chart(title: str, series: Sequence[Series], low: float | None = 0.0, high: float | None = None) -> str:
    """A figure; points whose value is not finite are left out. `low` and `high` fix the ends of the y axis."""
    shown = [s._replace(points=[p for p in s.points if math.isfinite(p[1])]) for s in series]
    points = [point for s in shown for point in s.points]
    if not points:
        return ""
    bars = [(y - _finite(e), y + _finite(e)) for _, y, e in points]
    y_ticks = _ticks(min(b for b, _ in bars) if low is None else low, max(b for _, b in bars) if high is None else high)
    x_ticks = _ticks(min(x for x, _, _ in points), max(x for x, _, _ in points))
    x_ticks = [tick for tick in x_ticks if tick == int(tick)]

    def x_at(x: float) -> float:
        return LEFT + (x - x_ticks[0]) / ((x_ticks[-1] - x_ticks[0]) or 1) * (WIDTH - LEFT - RIGHT)

    def y_at(y: float) -> float:
        y = min(max(y, y_ticks[0]), y_ticks[-1])
        return HEIGHT - BOTTOM - (y - y_ticks[0]) / ((y_ticks[-1] - y_ticks[0]) or 1) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">']
    for tick in y_ticks:
        y = y_at(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in x_ticks:
        parts.append(
            f'<text class="tick" x="{x_at(tick):.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{tick:g}'
        )
        parts.append("</text>")
    for index, line in enumerate(shown):
        parts.append(f'<g class="series s{index}">')
        path = " ".join(f"{x_at(x):.1f},{y_at(y):.1f}" for x, y, _ in line.points)
        parts.append(f'<polyline points="{path}"/>')
        for x, y, error in line.points if line.marked else ():
            parts.append(_point(x_at(x), y_at(y), y_at(y - _finite(error)), y_at(y + _finite(error))))
            parts.append(f"<title>{html.escape(line.label)}, step {x:g}: {with_error(y, error)}</title></circle>")
        parts.append("</g>")
    for index, line in enumerate(shown if len(shown) > 1 else ()):
        x = LEFT + index * (WIDTH - LEFT - RIGHT) / len(shown)
        parts.append(f'<g class="series s{index}"><line x1="{x:.0f}" x2="{x + 14:.0f}" y1="{HEIGHT - 10}" ')
        parts.append(f'y2="{HEIGHT - 10}"/></g><text class="legend" x="{x + 19:.0f}" y="{HEIGHT - 6}">')
        parts.append(f"{html.escape(line.label)}</text>")
    parts.append("</svg>")
    return f"<figure><figcaption>{html.escape(title)}</figcaption>{''.join(parts)}</figure>"


def _point(x: float, y: float, low: float, high: float) -> str:
    """Error bar and the start of a dot."""
    return f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}"/><circle cx="{x:.1f}" cy="{y:.1f}" r="3.2">'


def with_error(value: float, error: float) -> str:
    """As mean ± standard error, where there is one."""
    return f"{value:.3f}" + (f" ± {error:.3f}" if math.isfinite(error) else "")


def _finite(error: float) -> float:
    return error if math.isfinite(error) else 0.0


def _ticks(low: float, high: float) -> list[float]:
    """Round values from at most `low` to at least `high`, about five of them."""
    if high <= low:
        high = low + 1
    raw = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 10) for index in range(first, last + 1)]
