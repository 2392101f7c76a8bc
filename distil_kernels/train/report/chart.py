"""The curves of a run as line charts: which there are, and where each point is drawn.

`plot` writes them as one SVG file; the page of `html` has the same charts, by the same macro of charts.jinja, among its
text. Coordinates are those of an SVG of WIDTH x HEIGHT.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from distil_kernels.train.report.templates import render

Record = dict[str, Any]

WIDTH, HEIGHT = 460, 250
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 14, 46
"""Margins around the area of the curves."""


class Point(NamedTuple):
    """One value of a curve."""

    step: float
    value: float
    error: float = math.nan
    """Standard error; NaN where it is not known."""

    @property
    def low(self) -> float:
        """The lower end of the error bar; the value itself where the error is not known."""
        return self.value - (self.error if math.isfinite(self.error) else 0.0)

    @property
    def high(self) -> float:
        """The upper end of the error bar; the value itself where the error is not known."""
        return self.value + (self.error if math.isfinite(self.error) else 0.0)


class Series(NamedTuple):
    """One curve of a chart."""

    label: str
    points: Sequence[Point]
    has_dots: bool = False
    """Each point is a dot with an error bar."""


@dataclass(frozen=True)
class Chart:
    """Curves over steps. Points whose value is not finite are not in it."""

    title: str
    series: Sequence[Series]
    y_ticks: Sequence[float]
    x_ticks: Sequence[float]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    bottom: int = HEIGHT - BOTTOM

    def x(self, step: float) -> float:
        """Returns the horizontal coordinate of a step."""
        share = (step - self.x_ticks[0]) / ((self.x_ticks[-1] - self.x_ticks[0]) or 1)
        return LEFT + share * (self.right - LEFT)

    def y(self, value: float) -> float:
        """Returns the vertical coordinate of a value; one outside the axis is drawn at the axis's end."""
        value = min(max(value, self.y_ticks[0]), self.y_ticks[-1])
        share = (value - self.y_ticks[0]) / ((self.y_ticks[-1] - self.y_ticks[0]) or 1)
        return self.bottom - share * (self.bottom - TOP)


def line_chart(
    title: str, series: Sequence[Series], low: float | None = 0.0, high: float | None = None
) -> Chart | None:
    """Returns a chart of these curves; None where they have no finite value.

    Args:
        low, high: ends of the vertical axis; None takes them from the values and their error bars.
    """
    finite = [s._replace(points=[point for point in s.points if math.isfinite(point.value)]) for s in series]
    points = [point for s in finite for point in s.points]
    if not points:
        return None
    least = min(point.low for point in points) if low is None else low
    most = max(point.high for point in points) if high is None else high
    x_ticks = ticks(min(point.step for point in points), max(point.step for point in points))
    return Chart(title, finite, ticks(least, most), [tick for tick in x_ticks if tick == int(tick)])


def charts(metrics: Sequence[Record]) -> list[Chart]:
    """Returns the charts of a run, from the records of metrics.jsonl."""
    steps = [record for record in metrics if record["kind"] == "step"]
    evaluations = [record for record in metrics if record["kind"] == "evaluation"]

    def training(key: str, label: str, has_dots: bool = False) -> Series:
        return Series(label, [Point(record["step"], record.get(key, math.nan)) for record in steps], has_dots)

    def held_out(key: str) -> Series:
        return Series(key, [Point(r["step"], r[key], r[f"{key}_se"]) for r in evaluations], has_dots=True)

    accuracy = [held_out("sampled"), held_out("greedy"), held_out("teacher"), training("accuracy", "training")]
    changes = training("held_out_change", "log-prob of an answer", has_dots=True)
    possible = [
        line_chart("Accuracy (held out, and in training)", accuracy, high=1.0),
        line_chart("Teacher against student, nats a token", [training("ce", "cross-entropy"), training("kl", "KL")]),
        line_chart("Entropy, nats a token", [training("entropy", "student"), training("teacher_entropy", "teacher")]),
        line_chart("Answer length, tokens", [training("length", "training rollouts")]),
        line_chart("Share of rollouts cut at the limit", [training("truncated", "training rollouts")], high=1.0),
        line_chart("Gradient norm before clipping", [training("grad_norm", "norm")]),
        line_chart("Learning rate", [training("learning_rate", "AdamW")]),
        line_chart("What a step changed: held-out right answers, nats", [changes], low=None),
    ]
    return [chart for chart in possible if chart is not None]


def plot(charts: Sequence[Chart], title: str) -> str:
    """Returns charts in two columns as one SVG document."""
    return render("plot.svg.jinja", title=title, charts=charts, width=WIDTH, height=HEIGHT)


def ticks(low: float, high: float) -> list[float]:
    """Returns round values from at most `low` to at least `high`, about five of them."""
    if high <= low:
        high = low + 1
    raw = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 10) for index in range(first, last + 1)]
