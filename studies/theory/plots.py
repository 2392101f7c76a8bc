"""The figures of docs/theory.md, drawn from the results."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from studies.presentation import BLUE, GREEN, GREY, ORANGE, PURPLE, RC_PARAMS, SKY, panels
from studies.theory import bandit, tabular
from studies.theory.bandit import BanditResult
from studies.theory.regret import RegretResult
from studies.theory.results import Results
from studies.theory.success import MAX_N, SuccessResult
from studies.theory.tabular import TabularResult

HEIGHT = 3.6
"""Height of every figure, in inches."""
STYLES = {"forward_ce": (BLUE, "-"), "reverse_kl": (ORANGE, "--"), "jsd": (GREEN, "-.")}


def draw(results: Results, folder: Path) -> list[Path]:
    """Writes every figure into the folder as PNG; returns the paths."""
    with matplotlib.rc_context(RC_PARAMS):
        figures = {
            "bandit": _bandit(results.bandit),
            "multistep": _multistep(results.tabular),
            "regret": _regret(results.regret),
            "success": _success(results.success),
        }
        paths = []
        for name, figure in figures.items():
            paths.append(folder / f"{name}.png")
            # Without the version of matplotlib equal numbers make equal files.
            figure.savefig(paths[-1], metadata={"Software": None})
    return paths


def _bandit(result: BanditResult) -> Figure:
    figure, (rewards_axes, shares_axes) = panels(2, (2 * 5.2, HEIGHT))
    for name, rewards in result.rewards.items():
        colour, dash = STYLES[name]
        rewards_axes.plot(rewards, dash, color=colour, label=bandit.LABELS[name])
    rewards_axes.axhline(result.teacher_reward, color=GREY, linestyle=":", label="teacher")
    rewards_axes.set(xlabel=f"plain gradient steps of {bandit.STEP_SIZE}", ylabel="expected reward", ylim=(0, None))
    rewards_axes.set_title("Three actions, a better teacher")
    rewards_axes.legend(loc="lower right")

    kinds = list(result.hurts)
    groups = [(kind, step) for step in ("plain", "natural") for kind in kinds]
    width = 0.26
    for i, (name, (colour, _)) in enumerate(STYLES.items()):
        values = [result.hurts[kind][step][name] for kind, step in groups]
        places = [g + (i - 1) * width for g in range(len(groups))]
        heights = [100 * share.value for share in values]
        errors = [196 * share.standard_error for share in values]
        shares_axes.bar(places, heights, width, yerr=errors, color=colour, label=bandit.LABELS[name], capsize=2)
    tick_labels = {
        kinds[0]: "any\nbetter\nteacher",
        kinds[1]: f"better\nby {bandit.MARGIN}",
        kinds[2]: "student\ntilted",
    }
    shares_axes.set_xticks(range(len(groups)), [tick_labels[kind] for kind, _ in groups], fontsize=8)
    for x, step in ((1, "plain step"), (4, "natural step")):
        shares_axes.annotate(step, (x, 0.97), xycoords=("data", "axes fraction"), ha="center", va="top")
    shares_axes.axvline(2.5, color=GREY, linewidth=0.8)
    shares_axes.set(ylabel="pairs whose reward falls, %", ylim=(0, 26))
    shares_axes.set_title("Random four-action pairs (bars: 95 %)")
    shares_axes.legend(loc="upper right", bbox_to_anchor=(1, 0.9))
    return figure


def _multistep(result: TabularResult) -> Figure:
    figure, (aliased_axes, reward_axes, branch_axes) = panels(3, (3 * 4.0, HEIGHT))
    styles = {
        "token-wise": (ORANGE, "--"),
        "sequence-level": (BLUE, "-"),
        "sequence-level, cost kl": (GREEN, "-."),
    }
    for axes, curves, label, title in (
        (aliased_axes, result.aliased_prob_left, "probability of L", "Aliased: first token"),
        (reward_axes, result.aliased_reward, "expected reward", "Aliased: reward"),
        (branch_axes, result.branch_prob_left, "probability of L", "Branch: first token"),
    ):
        for name, values in curves.items():
            colour, dash = styles[name]
            axes.plot([tabular.RECORD_EVERY * i for i in range(len(values))], values, dash, color=colour, label=name)
        axes.set(xlabel="exact gradient steps", ylabel=label, xlim=(0, 800), ylim=(0, 1))
        axes.set_title(title)
    reward_axes.legend(loc="upper left")
    branch_axes.legend(loc="lower right")
    return figure


def _regret(result: RegretResult) -> Figure:
    figure, axes_by_algorithm = panels(2, (2 * 4.8, HEIGHT))
    for axes, name, colour in zip(axes_by_algorithm, result.regret, (BLUE, ORANGE), strict=True):
        axes.loglog(result.rounds, result.bound[name], "--", color=GREY, label="bound")
        axes.loglog(result.rounds, result.regret[name], color=colour, label="measured")
        axes.set(xlabel="rounds", ylabel="cumulative regret, nats", ylim=(0.05, 2000))
        axes.set_title(name.capitalize())
        axes.legend(loc="upper left")
    return figure


def _success(result: SuccessResult) -> Figure:
    figure, (bound_axes, instance_axes, any_mode_axes) = panels(3, (3 * 4.2, HEIGHT))
    for (name, values), (colour, dash) in zip(
        result.bound_path.items(), ((GREY, ":"), (BLUE, "-"), (SKY, "--")), strict=True
    ):
        bound_axes.plot(values, dash, color=colour, label={"log J": "log success"}.get(name, name))
    bound_axes.set(xlabel="forward CE steps of 0.5", ylabel="nats")
    bound_axes.set_title("Log success and its lower bounds")
    bound_axes.legend(loc="lower right")

    styles = {
        # The curves of forward CE and on-policy CE coincide, and JSD's nearly does: widths keep them apart.
        "forward CE": (SKY, "-", 7.0),
        "JSD": (GREEN, "-", 3.5),
        "on-policy CE": ("black", ":", 1.5),
        "on-policy CE + credit": (PURPLE, "-.", 2.0),
        "reverse KL": (ORANGE, "--", 2.0),
    }
    floor = list(result.pass_at_n)[-1]
    for axes, curves, title in (
        (instance_axes, result.pass_at_n[floor], "Pass@N: the instance's own answer"),
        (any_mode_axes, result.pass_any_at_n[floor], "Pass@N: any of the four modes"),
    ):
        for name, (colour, dash, width) in styles.items():
            axes.semilogx(range(1, MAX_N + 1), curves[name], dash, color=colour, linewidth=width, label=name, base=2)
        axes.set(xlabel="N, answers drawn", ylabel="probability of success", ylim=(0, 1.02))
        axes.set_title(title)
    any_mode_axes.legend(loc="lower right")
    return figure
