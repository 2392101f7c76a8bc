"""Figures of a study: accuracy and length in the course of training, with bands of 95 % (1.96 standard errors)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from studies.compare import small
from studies.compare.accuracy_tables import capitalized, label, reported_results, standard_error
from studies.compare.experiment import OBJECTIVES
from studies.compare.grid import REFERENCE, Result, Results, Scale, Setting, chosen_rate
from studies.compare.small import TEACHERS, VARIANTS, VARIANTS_TASK
from studies.presentation import BLUE, GREEN, GREY, ORANGE, PURPLE, RC_PARAMS, SKY, panels

STYLES = [
    (BLUE, "-"), (SKY, "--"), (PURPLE, ":"), ("black", "-."), (ORANGE, "--"), (GREEN, "-."), (GREY, ":"),
    (BLUE, ":"), (ORANGE, "-"), (GREEN, "-"),
]  # fmt: skip


def draw(scale: Scale, results: Results, folder: Path) -> list[Path]:
    """Writes every figure into the folder as PNG and SVG; returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    with matplotlib.rc_context(RC_PARAMS | {"svg.hashsalt": "distil_kernels"}):
        if isinstance(scale, small.Scale):
            figures = {
                "objectives": _objectives(scale, results, "held-out accuracy, sampled"),
                "teachers": _teachers(scale, results),
            }
            if any(budget.task == VARIANTS_TASK for budget in scale.tasks):
                figures["credit"] = _credit(scale, results)
        else:
            figures = {"language": _objectives(scale, results, "accuracy of the step's rollouts")}
        for name, figure in figures.items():
            # Without version and date equal numbers make equal files.
            for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None, "Creator": None})):
                paths.append(folder / f"compare_{name}{suffix}")
                figure.savefig(paths[-1], metadata=metadata)
    return paths


def _task_panels(count: int) -> tuple[Figure, list[Axes]]:
    return panels(count, (max(5.0, 3.5 * count), 4.2))


def _curve(axes: Axes, runs: Sequence[Result], quantity: str, style: tuple[str, str], name: str) -> None:
    points = list(zip(*(getattr(run, quantity) for run in runs), strict=True))
    means = [sum(values) / len(values) for values in points]
    half_widths = [1.96 * standard_error(values) for values in points]
    steps = runs[0].steps
    axes.plot(steps, means, style[1], color=style[0], label=name)
    if len(runs) == 1:  # one seed has no standard error
        return
    axes.fill_between(
        steps,
        [mean - half for mean, half in zip(means, half_widths, strict=True)],
        [mean + half for mean, half in zip(means, half_widths, strict=True)],
        color=style[0],
        alpha=0.15,
        linewidth=0,
    )


def _legend(figure: Figure, axes: Axes) -> None:
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside lower center", ncols=min(4, int(figure.get_figwidth() / 2.4))
    )


def _objectives(scale: Scale, results: Results, ylabel: str) -> Figure:
    figure, task_axes = _task_panels(len(scale.tasks))
    styles = dict(zip(OBJECTIVES, STYLES[: len(OBJECTIVES)], strict=True))
    for axes, budget in zip(task_axes, scale.tasks, strict=True):
        for setting in (setting for setting in budget.settings if setting[1] == "frozen"):
            rate = chosen_rate(scale, results, budget, setting)
            runs = reported_results(scale, results, budget, setting, rate)
            _curve(axes, runs, "sampled", styles[setting[0]], label(setting))
        axes.set(xlabel="steps", ylim=(0, 1.02), title=capitalized(budget.title))
    task_axes[0].set_ylabel(ylabel)
    _legend(figure, task_axes[0])
    return figure


def _teachers(scale: small.Scale, results: Results) -> Figure:
    budgets = [budget for budget in scale.tasks if budget.all_teachers]
    figure, task_axes = _task_panels(len(budgets))
    for axes, budget in zip(task_axes, budgets, strict=True):
        rate = chosen_rate(scale, results, budget, REFERENCE)
        for setting, colour in zip((REFERENCE, *TEACHERS), (BLUE, GREEN, ORANGE), strict=True):
            runs = reported_results(scale, results, budget, setting, rate)
            _curve(axes, runs, "teacher", (colour, "-"), f"{setting[1]} teacher")
            _curve(axes, runs, "sampled", (colour, "--"), f"its student ({setting[1]})")
        axes.set(xlabel="steps", ylim=(0, 1.02), title=f"{capitalized(budget.title)}, rate {rate:g}")
    task_axes[0].set_ylabel("held-out accuracy, sampled")
    _legend(figure, task_axes[0])
    return figure


def _credit(scale: small.Scale, results: Results) -> Figure:
    budget = next(budget for budget in scale.tasks if budget.task == VARIANTS_TASK)
    rate = chosen_rate(scale, results, budget, REFERENCE)
    settings: tuple[Setting, ...] = (REFERENCE, *VARIANTS)
    figure, (accuracy_axes, length_axes) = panels(2, (10, 4.4))
    for setting, style in zip(settings, STYLES, strict=True):
        runs = reported_results(scale, results, budget, setting, rate)
        _curve(accuracy_axes, runs, "sampled", style, label(setting))
        _curve(length_axes, runs, "length", style, label(setting))
    accuracy_axes.set(xlabel="steps", ylabel="held-out accuracy, sampled", ylim=(0, 1.02))
    length_axes.set(xlabel="steps", ylabel="characters of a sampled answer", ylim=(0, 10.5))
    figure.suptitle(f"{capitalized(budget.title)}: what is credited, rate {rate:g}")
    _legend(figure, accuracy_axes)
    return figure
