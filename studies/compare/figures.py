"""Curves with bands of 95 % over seeds (1.96 standard errors)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from studies.compare import study
from studies.compare.experiment import OBJECTIVES
from studies.compare.grid import REFERENCE, Result, Results, Scale, Setting, chosen_rate
from studies.compare.report import capitalized, label, seeds_of, standard_error
from studies.compare.study import TEACHERS, VARIANTS, VARIANTS_TASK
from studies.theory.figures import BLUE, GREEN, GREY, ORANGE, PURPLE, RULES, SKY

STYLES = [
    (BLUE, "-"), (SKY, "--"), (PURPLE, ":"), ("black", "-."), (ORANGE, "--"), (GREEN, "-."), (GREY, ":"),
]  # fmt: skip


def draw(scale: Scale, results: Results, folder: Path) -> list[Path]:
    """Writes every figure into the folder, as PNG and SVG; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    with matplotlib.rc_context(RULES | {"svg.hashsalt": "distil_kernels"}):
        if isinstance(scale, study.Scale):
            about = "held-out accuracy, sampled"
            figures = {"objectives": _objectives(scale, results, about), "teachers": _teachers(scale, results)}
            if any(budget.task == VARIANTS_TASK for budget in scale.tasks):
                figures["credit"] = _credit(scale, results)
        else:
            figures = {"language": _objectives(scale, results, "accuracy of the step's rollouts")}
        for name, figure in figures.items():
            # Without version and date a file is the same wherever the numbers are.
            for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None, "Creator": None})):
                paths.append(folder / f"compare_{name}{suffix}")
                figure.savefig(paths[-1], metadata=metadata)
    return paths


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(max(5.0, 3.5 * count), 4.2), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def _curve(axes: Axes, runs: Sequence[Result], quantity: str, style: tuple[str, str], name: str) -> None:
    points = list(zip(*(getattr(run, quantity) for run in runs), strict=True))
    means = [sum(values) / len(values) for values in points]
    reach = [1.96 * standard_error(values) for values in points]
    steps = runs[0].steps
    axes.plot(steps, means, style[1], color=style[0], label=name)
    if len(runs) == 1:  # no band
        return
    axes.fill_between(
        steps,
        [mean - r for mean, r in zip(means, reach, strict=True)],
        [mean + r for mean, r in zip(means, reach, strict=True)],
        color=style[0],
        alpha=0.15,
        linewidth=0,
    )


def _legend(figure: Figure, axes: Axes) -> None:
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside lower center", ncols=min(4, int(figure.get_figwidth() / 2.4))
    )


def _objectives(scale: Scale, results: Results, about: str) -> Figure:
    figure, panels = _panels(len(scale.tasks))
    styles = dict(zip(OBJECTIVES, STYLES, strict=True))
    for axes, budget in zip(panels, scale.tasks, strict=True):
        for setting in (setting for setting in budget.settings if setting[1] == "frozen"):
            rate = chosen_rate(scale, results, budget, setting)
            runs = seeds_of(scale, results, budget, setting, rate)
            _curve(axes, runs, "sampled", styles[setting[0]], label(setting))
        axes.set(xlabel="steps", ylim=(0, 1.02), title=capitalized(budget.title))
    panels[0].set_ylabel(about)
    _legend(figure, panels[0])
    return figure


def _teachers(scale: study.Scale, results: Results) -> Figure:
    budgets = [budget for budget in scale.tasks if budget.all_teachers]
    figure, panels = _panels(len(budgets))
    for axes, budget in zip(panels, budgets, strict=True):
        rate = chosen_rate(scale, results, budget, REFERENCE)
        for setting, colour in zip((REFERENCE, *TEACHERS), (BLUE, GREEN, ORANGE), strict=True):
            runs = seeds_of(scale, results, budget, setting, rate)
            _curve(axes, runs, "teacher", (colour, "-"), f"{setting[1]} teacher")
            _curve(axes, runs, "sampled", (colour, "--"), f"its student ({setting[1]})")
        axes.set(xlabel="steps", ylim=(0, 1.02), title=f"{capitalized(budget.title)}, rate {rate:g}")
    panels[0].set_ylabel("held-out accuracy, sampled")
    _legend(figure, panels[0])
    return figure


def _credit(scale: study.Scale, results: Results) -> Figure:
    budget = next(budget for budget in scale.tasks if budget.task == VARIANTS_TASK)
    rate = chosen_rate(scale, results, budget, REFERENCE)
    settings: tuple[Setting, ...] = (REFERENCE, *VARIANTS)
    figure, (accuracy, length) = _panels(2)
    figure.set_size_inches(10, 4.4)
    for setting, style in zip(settings, STYLES, strict=True):
        runs = seeds_of(scale, results, budget, setting, rate)
        _curve(accuracy, runs, "sampled", style, label(setting))
        _curve(length, runs, "length", style, label(setting))
    accuracy.set(xlabel="steps", ylabel="held-out accuracy, sampled", ylim=(0, 1.02))
    length.set(xlabel="steps", ylabel="characters of a sampled answer", ylim=(0, 10.5))
    figure.suptitle(f"{capitalized(budget.title)}: what is credited, rate {rate:g}")
    _legend(figure, accuracy)
    return figure
