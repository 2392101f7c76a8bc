"""The curves of a run as line charts: which there are, and where each point is drawn.

`plot` writes them as one SVG file; the page of `html` has the same charts, by the same macro of charts.jinja, among its
text. Coordinates are those of an SVG of WIDTH x HEIGHT.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

from distil_kernels.train.report.templates import render

Record = dict[str, Any]

WIDTH, HEIGHT = 460, 250
LEFT, RIGHT, TOP, BOTTOM = 54, 20, 14, 46
"""Margins around the area of the curves; the lower one with one row of labels."""
ROW = 16
"""Height of a row of labels."""
LETTER = 6.6
"""Width of a letter of a label, at most on average."""
LONG = 200
"""Points from which on a curve is drawn as a moving mean."""
WINDOWS = 25
"""A moving mean is over a 25th of the points."""
MAX_POINTS = 1000
"""Points of a curve that are drawn."""
PHASES = (
    "rollout", "weights", "teacher", "student", "loss", "backward", "exchange", "optimizer", "held_out",
)  # fmt: skip
"""What a step spends its time on, as `seconds_<phase>` in metrics.jsonl."""


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

    @property
    def is_long(self) -> bool:
        """Whether the single values are noise around a moving mean."""
        return not self.has_dots and len(self.points) >= LONG

    @property
    def curve(self) -> Sequence[Point]:
        """The points of the line: their moving means where there are many."""
        return _thinned(_moving_means(self.points)) if self.is_long else self.points

    @property
    def background(self) -> Sequence[Point]:
        """The single values behind a moving mean."""
        return _thinned(self.points) if self.is_long else []


class Label(NamedTuple):
    """The name of a curve below its chart."""

    text: str
    x: float
    y: float


@dataclass(frozen=True)
class Chart:
    """Curves over steps. Points whose value is not finite are not in it."""

    title: str
    series: Sequence[Series]
    y_ticks: Sequence[float]
    x_ticks: Sequence[float]
    first: float
    """The step at the left end."""
    last: float
    """The step at the right end, which is the last one that there is."""
    width: int = WIDTH
    left: int = LEFT
    right: int = WIDTH - RIGHT
    bottom: int = HEIGHT - BOTTOM

    @property
    def height(self) -> int:
        return HEIGHT + ROW * max(0, len({label.y for label in self.labels}) - 1)

    @property
    def labels(self) -> list[Label]:
        """Where the curves are named, in as many rows as they need; nowhere where there is one."""
        labels: list[Label] = []
        x, y = float(LEFT), HEIGHT - 6.0
        for series in self.series if len(self.series) > 1 else []:
            width = 32 + LETTER * len(series.label)
            if labels and x + width > WIDTH:
                x, y = float(LEFT), y + ROW
            labels.append(Label(series.label, x, y))
            x += width
        return labels

    def x(self, step: float) -> float:
        """Returns the horizontal coordinate of a step."""
        share = (step - self.first) / ((self.last - self.first) or 1)
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
    first, last = (end(point.step for point in points) for end in (min, max))
    x_ticks = [tick for tick in ticks(first, last) if first <= tick <= last and tick == int(tick)]
    return Chart(title, finite, ticks(least, most), x_ticks, first, last)


def charts(metrics: Sequence[Record]) -> list[Chart]:
    """Returns the charts of a run, from the records of metrics.jsonl."""
    steps = [record for record in metrics if record["kind"] == "step"]
    evaluations = [record for record in metrics if record["kind"] == "evaluation"]

    def training(key: str, label: str, has_dots: bool = False) -> Series:
        return Series(label, [Point(record["step"], record.get(key, math.nan)) for record in steps], has_dots)

    def held_out(key: str) -> Series:
        return Series(key, [Point(r["step"], r[key], r[f"{key}_se"]) for r in evaluations], has_dots=True)

    accuracy = [held_out("sampled"), held_out("greedy"), held_out("teacher"), training("accuracy", "training")]
    phases = [training(f"seconds_{phase}", phase.replace("_", " ")) for phase in PHASES]
    memory = [training("peak_memory_gib", "process"), training("peak_gpu_memory_gib", "GPU")]
    changes = training("held_out_change", "log-prob of an answer", has_dots=True)
    possible = [
        line_chart("Accuracy (held out, and in training)", accuracy, high=1.0),
        line_chart("Teacher against student, nats a token", [training("ce", "cross-entropy"), training("kl", "KL")]),
        line_chart("Entropy, nats a token", [training("entropy", "student"), training("teacher_entropy", "teacher")]),
        line_chart("Answer length, tokens", [training("length", "training rollouts")]),
        line_chart("Share of rollouts cut at the limit", [training("truncated", "training rollouts")], high=1.0),
        line_chart(
            "Importance ratios of the last update: mean, and share beyond the clip",
            list(filter(_is_known, [training("ratio", "mean"), training("ratio_tail", "share beyond")])),
        ),
        line_chart("Gradient norm before clipping", [training("grad_norm", "norm")]),
        line_chart("Learning rate", [training("learning_rate", "AdamW")]),
        line_chart("Seconds of a step, by what it does", list(filter(_is_known, phases))),
        line_chart("Tokens a second", [training("tokens_per_second", "training rollouts")]),
        line_chart("Peak memory, GiB", list(filter(_is_known, memory))),
        line_chart("What a step changed: held-out right answers, nats", [changes], low=None),
    ]
    return [chart for chart in possible if chart is not None]


def _is_known(series: Series) -> bool:
    return any(math.isfinite(point.value) for point in series.points)


def _moving_means(points: Sequence[Point]) -> list[Point]:
    """Returns at each point the mean of the last ones, a 25th of all."""
    size = max(1, len(points) // WINDOWS)
    sums = list(accumulate((point.value for point in points), initial=0.0))
    return [
        Point(point.step, (sums[end] - sums[max(0, end - size)]) / min(end, size))
        for end, point in enumerate(points, 1)
    ]


def _thinned(points: Sequence[Point]) -> list[Point]:
    """Returns at most MAX_POINTS of the points, the last one among them."""
    return list(points[:: -math.ceil(len(points) / MAX_POINTS)])[::-1]


def plot(charts: Sequence[Chart], title: str) -> str:
    """Returns charts in two columns as one SVG document."""
    height = max((chart.height for chart in charts), default=HEIGHT)
    return render("plot.svg.jinja", title=title, charts=charts, width=WIDTH, height=height)


def ticks(low: float, high: float) -> list[float]:
    """Returns round values from at most `low` to at least `high`, about five of them."""
    if high <= low:
        high = low + 1
    raw = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 10) for index in range(first, last + 1)]
