"""Charts of a run as SVG: values where the axes say, and labels as text."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from distil_kernels.train.report.chart import LEFT, WIDTH, Point, Series, charts, line_chart, plot
from distil_kernels.train.report.formatting import tick_text

SVG = "{http://www.w3.org/2000/svg}"


def test_charts_put_values_where_the_axes_say() -> None:
    points = [Point(0, 0.0, 0.0), Point(10, 1.0, 0.1), Point(5, math.nan, 0.0)]
    chart = line_chart("a < b", [Series("one", points, has_dots=True)], high=1.0)
    assert chart is not None
    text = plot([chart], "a < b")
    assert "a &lt; b" in text and "nan" not in text
    (first, last) = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', text)
    ticks = {label: y for y, label in re.findall(r'y="([\d.]+)" text-anchor="end">([\d.]+)<', text)}
    assert float(first[1]) == pytest.approx(float(ticks["0"]) - 3.5, abs=0.11)
    assert float(last[1]) == pytest.approx(float(ticks["1"]) - 3.5, abs=0.11)
    assert line_chart("nothing", [Series("one", [])]) is None


def test_a_plot_is_one_document_with_every_chart_in_its_place() -> None:
    """Three charts in two columns: two rows, no two at one place, each with all of its curves."""
    series = [Series("<one>", [Point(1, 2.0), Point(2, 3.0)]), Series("two", [Point(1, 1.0), Point(2, math.nan)])]
    charts = [chart for chart in (line_chart(title, series) for title in ("a", "b", "c")) if chart is not None]
    document = ElementTree.fromstring(plot(charts, "run & more"))
    drawn = document.findall(f"{SVG}svg")
    assert len({(chart.get("x"), chart.get("y")) for chart in drawn}) == 3
    bottom = max(float(chart.attrib["y"]) + float(chart.attrib["height"]) for chart in drawn)
    assert bottom < float(document.attrib["viewBox"].split()[3])
    assert [len(chart.findall(f".//{SVG}polyline")) for chart in drawn] == [2, 2, 2]
    words = [element.text for element in document.iter(f"{SVG}text")]
    assert {"run & more", "a", "b", "c", "<one>", "two"} <= set(words)
    assert plot([], "nothing yet").count("<svg") == 1


def test_the_axis_ends_where_the_run_does() -> None:
    for last in (2, 7, 24, 31, 1001):
        chart = line_chart("a", [Series("one", [Point(0, 1.0), Point(last, 2.0)])])
        assert chart is not None and (chart.x(0), chart.x(last)) == (LEFT, chart.right)
        assert all(0 <= tick <= last for tick in chart.x_ticks) and len(chart.x_ticks) >= 2
    alone = line_chart("a", [Series("one", [Point(3, 1.0)])])
    assert alone is not None and alone.x(3) == LEFT


@pytest.mark.parametrize(("value", "text"), [
    (0, "0"), (0.25, "0.25"), (1e-5, "1e-5"), (2.5e-05, "2.5e-5"), (150, "150"), (2500, "2500"), (12345678, "12.35M"),
    (20000, "20k"), (1e9, "1G"), (-50000, "-50k"), (0.001, "0.001"),
])  # fmt: skip
def test_values_at_an_axis_are_short(value: float, text: str) -> None:
    assert tick_text(value) == text and len(text) <= 6


def test_no_label_is_cut_and_no_two_overlap() -> None:
    names = ["rollout", "weights", "teacher", "student", "loss", "backward", "exchange", "optimizer", "held out"]
    chart = line_chart("a", [Series(name, [Point(1, 2.0), Point(2, 3.0)]) for name in names])
    assert chart is not None and [label.text for label in chart.labels] == names
    rows: dict[float, list[tuple[float, float]]] = {}
    for label in chart.labels:
        rows.setdefault(label.y, []).append((label.x, label.x + 19 + 6.6 * len(label.text)))
        assert label.y < chart.height and rows[label.y][-1][1] <= WIDTH
    assert len(rows) > 1
    for spans in rows.values():
        assert all(end <= begin for (_, end), (begin, _) in pairwise(spans))
    assert chart.height > line_chart("a", [Series("one", [Point(1, 2.0)])]).height  # type: ignore[union-attr]


def test_many_steps_are_a_moving_mean_with_the_single_values_behind_it() -> None:
    noisy = [Point(step, step + 50.0 * (-1) ** step) for step in range(1, 201)]
    series = Series("one", noisy)
    means = series.curve
    assert [point.step for point in means] == list(range(1, 201)) and series.background == noisy
    assert means[-1].value == pytest.approx(sum(point.value for point in noisy[-8:]) / 8)
    assert means[2].value == pytest.approx(sum(point.value for point in noisy[:3]) / 3)
    assert plot([line_chart("a", [series])], "run").count('class="single"') == 1  # type: ignore[list-item]
    assert Series("few", noisy[:199]).curve == noisy[:199] and not Series("few", noisy[:199]).background
    long = Series("long", [Point(step, 1.0) for step in range(1, 25_001)])
    assert len(long.curve) == len(long.background) == 1000 and long.curve[-1].step == 25_000


def test_phases_memory_and_speed_have_charts() -> None:
    step = {
        "kind": "step",
        "seconds_rollout": 1.0,
        "seconds_backward": 2.0,
        "tokens_per_second": 9.0,
        "peak_memory_gib": 1.5,
    }
    drawn = {chart.title: chart for chart in charts([step | {"step": number} for number in (1, 2)])}
    assert [series.label for series in drawn["Seconds of a step, by what it does"].series] == ["rollout", "backward"]
    assert [series.label for series in drawn["Peak memory, GiB"].series] == ["process"]
    assert "Tokens a second" in drawn


def test_importance_ratios_have_a_chart_where_there_are_some() -> None:
    def titles(**values: float) -> dict[str, list[str]]:
        drawn = charts([{"kind": "step", "step": number, "kl": 1.0, **values} for number in (1, 2)])
        return {chart.title: [series.label for series in chart.series] for chart in drawn}

    title = "Importance ratios of the last update: mean, and share beyond the clip"
    assert title not in titles()
    assert titles(ratio=1.01, ratio_tail=0.07)[title] == ["mean", "share beyond"]
