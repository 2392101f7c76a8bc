"""What a training run prints: a progress bar, a line per step and per evaluation, a table at the end."""

from __future__ import annotations

import math
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from distil_kernels.train.evaluate import Evaluation
from distil_kernels.train.report.formatting import with_error


def progress_bar(console: Console) -> Progress:
    """Returns a bar of steps taken, seconds per step and time left; where there is no terminal it shows nothing."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


def step_line(record: dict[str, Any]) -> str:
    """Returns the line of a training step, from its record of metrics.jsonl."""
    divergence = f"ce {record['ce']:.3f}  kl {record['kl']:.3f}  " if "ce" in record else ""
    return (
        f"step {record['step']:4d}  accuracy {record['accuracy']:.2f}  loss {record['loss']:7.3f}  "
        f"{divergence}entropy {record.get('entropy', math.nan):.2f}  "
        f"length {record['length']:.1f}  |grad| {record['grad_norm']:.2f}  {record['seconds']:.1f} s"
    )


def evaluation_line(step: int, result: Evaluation) -> str:
    """Returns the line of an evaluation."""
    return (
        f"held-out at step {step}: sampled {with_error(result.sampled, result.sampled_se)}  "
        f"greedy {with_error(result.greedy, result.greedy_se)}  "
        f"teacher {with_error(result.teacher, result.teacher_se)}  "
        f"length {result.length:.1f}"
    )


def final_table(evaluations: list[dict[str, Any]]) -> Table:
    """Returns a table of the first, the best and the last evaluation, from their records of metrics.jsonl."""
    table = Table(title=f"{evaluations[0]['num_problems']} held-out problems, mean ± standard error")
    for column in ("", "step", "sampled", "greedy", "teacher", "length"):
        table.add_column(column, justify="left" if not column else "right")
    best = max(evaluations, key=lambda record: record["sampled"])
    for label, record in (("before", evaluations[0]), ("best", best), ("last", evaluations[-1])):
        cells = [with_error(record[name], record[f"{name}_se"]) for name in ("sampled", "greedy", "teacher")]
        table.add_row(label, str(record["step"]), *cells, f"{record['length']:.1f}")
    return table
