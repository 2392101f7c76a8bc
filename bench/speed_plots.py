"""Figures of measured runs: lines for several sizes, bars for one, made from the JSON of the runs alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from speed_tables import MIB, our_row, title, worst_error

_LEGEND_WIDTH = 3.0
"""Width of the legend in inches."""
_BAR_COLOURS = {"ours": "C0", "peer": "0.7"}


def plot(runs: list[dict], folder: Path) -> list[Path]:
    """Writes a figure of ours and its peers per op, dtype and thread count; returns the paths.

    It has time and memory against N and V if an axis has two points, else time, memory and error as bars.
    """
    import matplotlib

    matplotlib.use("Agg")
    groups: dict[tuple, list[dict]] = {}
    for table in (table for run in runs for table in run["tables"]):
        case = table["case"]
        groups.setdefault((case["op"], case["dtype"], case["device"], case["threads"]), []).append(table)
    paths = []
    for (op, dtype, device, threads), tables in groups.items():
        series = {axis: _longest_series(tables, axis) for axis in ("num_rows", "vocab_size")}
        series = {axis: sized for axis, sized in series.items() if len(sized) > 1}
        name = f"{op}_{dtype}_{device}_{threads}"
        if series:
            figure = _lines(series)
            figure.suptitle(f"{op}, {dtype}, {device}, {threads} threads: forward and backward")
        elif any(row["group"] == "peer" and "ms" in row for row in tables[0]["rows"]):
            figure = _bars(tables[0])
            name += "_" + "x".join(str(tables[0]["case"][size]) for size in ("num_rows", "vocab_size", "hidden_size"))
        else:
            continue
        paths += save(figure, folder, name)
    return paths


def save(figure: Any, folder: Path, name: str) -> list[Path]:
    """Writes a figure of pyplot as PNG and SVG and closes it; returns the paths."""
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{suffix}" for suffix in ("png", "svg")]
    for path in paths:
        figure.savefig(path, dpi=150)
    plt.close(figure)
    return paths


def _lines(series: dict[str, list[dict]]) -> Any:
    import matplotlib.pyplot as plt

    width = 5.5 * len(series) + _LEGEND_WIDTH
    figure, axes = plt.subplots(2, len(series), figsize=(width, 7), squeeze=False)
    for column, (axis, tables) in enumerate(series.items()):
        rows_by_name = [_ours_and_peers(table) for table in tables]
        limits = [_fastest_products(table) for table in tables]
        times = [
            {name: row["ms"] / limit for name, row in rows.items()}
            for rows, limit in zip(rows_by_name, limits, strict=True)
        ]
        memory = [{name: row["peak_extra_bytes"] / MIB for name, row in rows.items()} for rows in rows_by_name]
        sizes = [table["case"][axis] for table in tables]
        _draw(axes[0][column], sizes, times, axis, "time over the bare products'")
        _draw(axes[1][column], sizes, memory, axis, "peak extra memory, MiB")
        axes[0][column].axhline(1.0, color="k", linestyle=":")
        axes[1][column].set_yscale("log")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="center right", frameon=False)
    figure.tight_layout(rect=(0, 0, 1 - _LEGEND_WIDTH / width, 0.96))
    return figure


def _bars(table: dict) -> Any:
    """Bars of time, memory and error in the converged regime, for ours and its peers."""
    import matplotlib.pyplot as plt

    rows = sorted(_ours_and_peers(table).values(), key=lambda row: -row["ms"])
    names, colors = [row["name"] for row in rows], [_BAR_COLOURS[row["group"]] for row in rows]
    values = {
        "milliseconds (dotted: the bare products)": [row["ms"] for row in rows],
        "peak extra memory, MiB": [row["peak_extra_bytes"] / MIB for row in rows],
        "gradient error, student near teacher": [worst_error(row) for row in rows],
    }  # fmt: skip
    figure, axes = plt.subplots(1, len(values), figsize=(13, 0.4 * len(rows) + 1.6), sharey=True)
    for axis, (label, numbers) in zip(axes, values.items(), strict=True):
        bars = axis.barh(names, numbers, color=colors)
        axis.bar_label(bars, [f"{number:.2g}" if number < 10 else f"{number:.0f}" for number in numbers], padding=3)
        axis.set(xlabel=label)
        axis.margins(x=0.2)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].axvline(_fastest_products(table), color="k", linestyle=":")
    axes[2].set_xscale("log")
    figure.suptitle(title(table))
    figure.tight_layout(w_pad=2)
    return figure


def _ours_and_peers(table: dict) -> dict[str, dict]:
    timed = [row for row in table["rows"] if row.get("peak_extra_bytes") and "ms" in row]
    ours = our_row(timed)
    return ({} if ours is None else {"ours": ours}) | {row["name"]: row for row in timed if row["group"] == "peer"}


def _fastest_products(table: dict) -> float:
    return min(row["ms"] for row in table["rows"] if row["group"] == "limit")


def _longest_series(tables: list[dict], axis: str) -> list[dict]:
    """The most tables that differ in `axis` only, ascending; tables that differ in V may differ in D too."""
    fixed = {"num_rows": ("vocab_size", "hidden_size"), "vocab_size": ("num_rows",)}[axis]
    series: dict[tuple, dict[int, dict]] = {}
    for table in tables:
        case = table["case"]
        series.setdefault(tuple(case[name] for name in fixed), {})[case[axis]] = table
    longest = max(series.values(), key=len)
    return [longest[size] for size in sorted(longest)]


def _draw(axes: Any, sizes: list[int], values: list[dict[str, float]], axis: str, label: str) -> None:
    for name in dict.fromkeys(name for each in values for name in each):
        points = [(size, each[name]) for size, each in zip(sizes, values, strict=True) if name in each]
        if len(points) > 1:
            axes.plot(*zip(*points, strict=True), "o-" if name == "ours" else "s--", label=name, markersize=4)
    axes.set(xlabel={"num_rows": "tokens N", "vocab_size": "vocabulary V"}[axis], ylabel=label)
    axes.set_xscale("log")
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
