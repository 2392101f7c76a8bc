"""What a person sees: a progress bar, a line per step, the table at the end, and plot.png."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from distil_kernels.train.evaluate import Evaluation
from distil_kernels.train.report.chart import with_error


def progress_bar(console: Console) -> Progress:
    """Steps done, seconds per step, time left; nothing but the lines where there is no terminal."""
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
    divergence = f"ce {record['ce']:.3f}  kl {record['kl']:.3f}  " if "ce" in record else ""
    return (
        f"step {record['step']:4d}  accuracy {record['accuracy']:.2f}  loss {record['loss']:7.3f}  "
        f"{divergence}entropy {record.get('entropy', math.nan):.2f}  "
        f"length {record['length']:.1f}  |grad| {record['grad_norm']:.2f}  {record['seconds']:.1f} s"
    )


def evaluation_line(step: int, result: Evaluation) -> str:
    return (
        f"held-out at step {step}: sampled {with_error(result.sampled, result.sampled_se)}  "
        f"greedy {with_error(result.greedy, result.greedy_se)}  "
        f"teacher {with_error(result.teacher, result.teacher_se)}  "
        f"length {result.length:.1f}"
    )


def final_table(evaluations: list[dict[str, Any]]) -> Table:
    """First, best and last evaluation; `evaluations` are the records of metrics.jsonl."""
    table = Table(title=f"{evaluations[0]['problems']} held-out problems, mean ± standard error")
    for column in ("", "step", "sampled", "greedy", "teacher", "length"):
        table.add_column(column, justify="left" if not column else "right")
    best = max(evaluations, key=lambda record: record["sampled"])
    for label, record in (("before", evaluations[0]), ("best", best), ("last", evaluations[-1])):
        cells = [with_error(record[name], record[f"{name}_se"]) for name in ("sampled", "greedy", "teacher")]
        table.add_row(label, str(record["step"]), *cells, f"{record['length']:.1f}")
    return table


def plot(records: list[dict[str, Any]], path: Path, title: str) -> None:
    """Accuracy with error bars, cost, entropy and length over steps, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = [record for record in records if record["kind"] == "step"]
    evaluations = [record for record in records if record["kind"] == "evaluation"]
    figure, panels = pyplot.subplots(2, 2, figsize=(10, 7), sharex=True)
    accuracy, cost, entropy, length = panels.flat
    at = [record["step"] for record in steps]
    accuracy.plot(at, [record["accuracy"] for record in steps], color="0.8", label="training rollouts")
    held_out_at = [record["step"] for record in evaluations]
    for name, label in (("sampled", "held out, sampled"), ("greedy", "held out, greedy"), ("teacher", "teacher")):
        values = [record[name] for record in evaluations]
        errors = [0.0 if math.isnan(record[name + "_se"]) else record[name + "_se"] for record in evaluations]
        accuracy.errorbar(held_out_at, values, errors, marker="o", capsize=2, label=label)
    accuracy.set(title="accuracy", ylim=(-0.02, 1.02))
    accuracy.legend(fontsize=8)
    for panel, names, name in (
        (cost, ("ce", "kl"), "per token: student against teacher, nats"),
        (entropy, ("entropy", "teacher_entropy"), "entropy, nats"),
        (length, ("length",), "answer length, tokens"),
    ):
        for key in names:
            panel.plot(at, [record.get(key, math.nan) for record in steps], label=key)
        panel.set(title=name)
        panel.set_ylim(bottom=0)
        panel.legend(fontsize=8)
    for panel in panels[1]:
        panel.set_xlabel("step")
    figure.suptitle(title)
    figure.tight_layout()
    beside = path.with_name(path.stem + ".tmp.png")
    figure.savefig(beside, dpi=120)
    pyplot.close(figure)
    beside.replace(path)
