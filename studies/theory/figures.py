"""The figures of docs/theory.md. Colours are Okabe and Ito's, for any colour vision; lines differ in dash too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from studies.theory import bandit, tabular
from studies.theory.bandit import BanditResult
from studies.theory.regret import RegretResult
from studies.theory.report import Results
from studies.theory.success import MAX_N, SuccessResult
from studies.theory.tabular import TabularResult

BLUE, ORANGE, GREEN, PURPLE, GREY, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#555555", "#56B4E9"
STYLES = {"forward_ce": (BLUE, "-"), "reverse_kl": (ORANGE, "--"), "jsd": (GREEN, "-.")}
RULES: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "savefig.dpi": 110,
}


def draw(results: Results, folder: Path) -> list[Path]:
    """Writes every figure into the folder; returns their paths."""
    with matplotlib.rc_context(RULES):
        figures = {
            "bandit": _bandit(results.bandit),
            "multistep": _multistep(results.tabular),
            "regret": _regret(results.regret),
            "success": _success(results.success),
        }
        paths = []
        for name, figure in figures.items():
            paths.append(folder / f"{name}.png")
            # Without the version of matplotlib the file is the same wherever the numbers are.
            figure.savefig(paths[-1], metadata={"Software": None})
    return paths


def _panels(count: int, width: float = 4.6) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width * count, 3.6), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def _bandit(result: BanditResult) -> Figure:
    figure, (path, shares) = _panels(2, width=5.2)
    for name, rewards in result.rewards.items():
        colour, dash = STYLES[name]
        path.plot(rewards, dash, color=colour, label=bandit.LABELS[name])
    path.axhline(result.teacher_reward, color=GREY, linestyle=":", label="teacher")
    path.set(xlabel=f"plain gradient steps of {bandit.STEP_SIZE}", ylabel="expected reward", ylim=(0, None))
    path.set_title("Three actions, a better teacher")
    path.legend(loc="lower right")

    kinds = list(result.hurts)
    groups = [(kind, step) for step in ("plain", "natural") for kind in kinds]
    width = 0.26
    for i, (name, (colour, _)) in enumerate(STYLES.items()):
        values = [result.hurts[kind][step][name] for kind, step in groups]
        places = [g + (i - 1) * width for g in range(len(groups))]
        heights = [100 * share.value for share in values]
        errors = [196 * share.standard_error for share in values]
        shares.bar(places, heights, width, yerr=errors, color=colour, label=bandit.LABELS[name], capsize=2)
    short = {kinds[0]: "any\nbetter\nteacher", kinds[1]: f"better\nby {bandit.MARGIN}", kinds[2]: "student\ntilted"}
    shares.set_xticks(range(len(groups)), [short[kind] for kind, _ in groups], fontsize=8)
    for x, step in ((1, "plain step"), (4, "natural step")):
        shares.annotate(step, (x, 0.97), xycoords=("data", "axes fraction"), ha="center", va="top")
    shares.axvline(2.5, color=GREY, linewidth=0.8)
    shares.set(ylabel="pairs whose reward falls, %", ylim=(0, 26))
    shares.set_title("Random four-action pairs (bars: 95 %)")
    shares.legend(loc="upper right", bbox_to_anchor=(1, 0.9))
    return figure


def _multistep(result: TabularResult) -> Figure:
    figure, (left, reward, branch) = _panels(3, width=4.0)
    styles = {
        "token-wise": (ORANGE, "--"),
        "sequence-level": (BLUE, "-"),
        "sequence-level, cost kl": (GREEN, "-."),
    }
    for axes, curves, label, title in (
        (left, result.aliased_prob_left, "probability of L", "Aliased: first token"),
        (reward, result.aliased_reward, "expected reward", "Aliased: reward"),
        (branch, result.branch_prob_left, "probability of L", "Branch: first token"),
    ):
        for name, values in curves.items():
            colour, dash = styles[name]
            axes.plot([tabular.RECORD_EVERY * i for i in range(len(values))], values, dash, color=colour, label=name)
        axes.set(xlabel="exact gradient steps", ylabel=label, xlim=(0, 800), ylim=(0, 1))
        axes.set_title(title)
    reward.legend(loc="upper left")
    branch.legend(loc="lower right")
    return figure


def _regret(result: RegretResult) -> Figure:
    figure, panels = _panels(2, width=4.8)
    for axes, name, colour in zip(panels, result.regret, (BLUE, ORANGE), strict=True):
        axes.loglog(result.rounds, result.bound[name], "--", color=GREY, label="bound")
        axes.loglog(result.rounds, result.regret[name], color=colour, label="measured")
        axes.set(xlabel="rounds", ylabel="cumulative regret, nats", ylim=(0.05, 2000))
        axes.set_title(name.capitalize())
        axes.legend(loc="upper left")
    return figure


def _success(result: SuccessResult) -> Figure:
    figure, (bound, sharp, every) = _panels(3, width=4.2)
    for (name, values), (colour, dash) in zip(
        result.bound_path.items(), ((GREY, ":"), (BLUE, "-"), (SKY, "--")), strict=True
    ):
        bound.plot(values, dash, color=colour, label={"log J": "log success"}.get(name, name))
    bound.set(xlabel="forward CE steps of 0.5", ylabel="nats")
    bound.set_title("Log success and its lower bounds")
    bound.legend(loc="lower right")

    styles = {
        # The first and the third lie on each other, and nearly on the second.
        "forward CE": (SKY, "-", 7.0),
        "JSD": (GREEN, "-", 3.5),
        "on-policy CE": ("black", ":", 1.5),
        "on-policy CE + credit": (PURPLE, "-.", 2.0),
        "reverse KL": (ORANGE, "--", 2.0),
    }
    floor = list(result.pass_at_n)[-1]
    for axes, curves, title in (
        (sharp, result.pass_at_n[floor], "Pass@N: the instance's own answer"),
        (every, result.pass_any_at_n[floor], "Pass@N: any of the four modes"),
    ):
        for name, (colour, dash, width) in styles.items():
            axes.semilogx(range(1, MAX_N + 1), curves[name], dash, color=colour, linewidth=width, label=name, base=2)
        axes.set(xlabel="N, answers drawn", ylabel="probability of success", ylim=(0, 1.02))
        axes.set_title(title)
    every.legend(loc="lower right")
    return figure
