"""Charts of a run as SVG: values where the axes say, and labels as text."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest

from distil_kernels.train.report.chart import Point, Series, line_chart, plot

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
