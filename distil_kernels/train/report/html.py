"""report.html: one run as one file that needs no network and no script.

The layout stands in page.html.jinja, which escapes all text of models, tasks and users. Here is what it is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter

from distil_kernels.train.command_line import resolved
from distil_kernels.train.config import Config
from distil_kernels.train.report.chart import charts
from distil_kernels.train.report.formatting import COLORS, Record, full_colors, with_error
from distil_kernels.train.report.templates import render

NUM_EVALUATIONS = 8
NUM_TRAINED = 6
"""Evaluations and training steps of which the page shows rollouts: it can be read, whatever the run's length."""


def page(config: Config, name: str, metrics: Sequence[Record], rollouts: Sequence[Record]) -> str:
    """Returns the document, from the records of metrics.jsonl and rollouts.jsonl.

    Raises:
        ValueError: there is nothing to report yet.
    """
    steps = [record for record in metrics if record["kind"] == "step"]
    evaluations = [record for record in metrics if record["kind"] == "evaluation"]
    if not evaluations and not steps:
        raise ValueError(f"[report] {name} has no records yet: expected at least one evaluation or step")
    held_out = _at_some_steps([record for record in rollouts if record["kind"] == "held_out"], NUM_EVALUATIONS)
    trained = _at_some_steps([record for record in rollouts if record["kind"] == "training"], NUM_TRAINED)
    full = full_colors(held_out)
    shown = sorted({record["step"] for record in held_out})
    length = f"{len(steps)} steps, {sum(record['seconds'] for record in steps + evaluations) / 60:.1f} minutes"
    pass_at = list(evaluations[-1]["pass_at"])[1:] if evaluations else []  # pass@1 is the sampled score

    def shares(record: Record, index: int) -> str:
        """Returns the CSS variables of a token: its shares of the full colours."""
        return ";".join(f"--{color}:{min(1.0, abs(record[color][index]) / full[color]):.3f}" for color in COLORS)

    return render(
        "page.html.jinja",
        name=name,
        task=config.task,
        summary=f"{config.model}, {config.objective}, {config.teacher} teacher, credit {config.credit_span}; {length}",
        num_problems=evaluations[-1]["num_problems"] if evaluations else 0,
        columns=["", "step", "sampled", "greedy", *(f"pass@{k}" for k in pass_at), "teacher", "tokens"],
        rows=_rows(evaluations, pass_at),
        charts=charts(metrics),
        rollouts=held_out,
        shown_steps=f"step{'s' * (len(shown) != 1)} {', '.join(map(str, shown))}",
        trained=[_of_first_problem(list(records)) for _, records in groupby(trained, itemgetter("step"))],
        colors=COLORS,
        full=full,
        shares=shares,
        config=resolved(config),
    )


def _at_some_steps(rollouts: Sequence[Record], count: int) -> list[Record]:
    """Returns the rollouts of at most `count` steps, evenly from the first to the last, by their steps."""
    steps = sorted({record["step"] for record in rollouts})
    if len(steps) > count:
        steps = [steps[round(index * (len(steps) - 1) / (count - 1))] for index in range(count)]
    return sorted((record for record in rollouts if record["step"] in steps), key=itemgetter("step"))


def _of_first_problem(rollouts: Sequence[Record]) -> list[Record]:
    """Returns the rollouts of the problem that the first one is of."""
    return [record for record in rollouts if record["question"] == rollouts[0]["question"]]


def _rows(evaluations: Sequence[Record], pass_at: Sequence[str]) -> list[list[str]]:
    """Returns the cells of the first, the best and the last evaluation."""
    if not evaluations:
        return []
    best = max(evaluations, key=lambda record: record["sampled"])
    rows = []
    for label, record in (("before", evaluations[0]), ("best", best), ("last", evaluations[-1])):
        scores = [(record[name], record[f"{name}_se"]) for name in ("sampled", "greedy")]
        scores += [*(record["pass_at"][k] for k in pass_at), (record["teacher"], record["teacher_se"])]
        rows.append([label, str(record["step"]), *(with_error(*score) for score in scores), f"{record['length']:.1f}"])
    return rows
