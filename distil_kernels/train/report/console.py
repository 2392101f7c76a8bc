"""What a training run prints: a progress bar, a line per step and per evaluation, a table at the end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from distil_kernels.train.evaluate import Evaluation
from distil_kernels.train.report.formatting import duration, number, with_error

LINES_PER_HEADER = 20
"""Steps after which their columns are named again."""


class _Column(NamedTuple):
    """A column of the steps' lines."""

    title: str
    width: int
    text: Callable[[dict[str, Any]], str]


def _of(key: str, digits: int) -> Callable[[dict[str, Any]], str]:
    return lambda record: number(record.get(key, math.nan), digits)


COLUMNS = (
    _Column("accuracy", 9, _of("accuracy", 3)),
    _Column("loss", 10, _of("loss", 3)),
    _Column("KL", 10, _of("kl", 3)),
    _Column("length", 9, _of("length", 1)),
    _Column("tokens/s", 10, _of("tokens_per_second", 1)),
    _Column(
        "GiB", 10, lambda record: number(record.get("peak_gpu_memory_gib", record.get("peak_memory_gib", math.nan)), 2)
    ),
)
VERBOSE_COLUMNS = (
    _Column("CE", 10, _of("ce", 3)),
    _Column("entropy", 10, _of("entropy", 3)),
    _Column("|grad|", 10, _of("grad_norm", 2)),
    _Column("cut", 10, _of("truncated", 2)),
    _Column("seconds", 10, _of("seconds", 1)),
)
"""Further columns of --verbose."""


def progress_bar(console: Console) -> Progress:
    """Returns a bar of steps taken; where there is no terminal it shows nothing."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
        console=console,
        disable=not console.is_terminal,
    )


class StepLines:
    """The lines of a run's steps, under the names of their columns, with the time that is left at the pace so far."""

    def __init__(self, console: Console, step: int, num_steps: int, verbose: bool) -> None:
        self._console, self._num_steps, self._verbose = console, num_steps, verbose
        self._first_step, self._began, self._num_lines = step, time.perf_counter(), 0

    def show(self, record: dict[str, Any]) -> str:
        """Prints the line of a step that is done, and returns the time left."""
        taken = record["step"] - self._first_step
        seconds_left = (time.perf_counter() - self._began) / taken * (self._num_steps - record["step"])
        if self._num_lines % LINES_PER_HEADER == 0:
            self._print(step_header(self._verbose), "dim")
        self._print(step_line(record, self._num_steps, seconds_left, self._verbose))
        self._num_lines += 1
        return f"{duration(seconds_left)} left"

    def _print(self, line: str, style: str = "") -> None:
        self._console.print(line, style=style, highlight=False, soft_wrap=True)


def step_header(verbose: bool = False) -> str:
    """Returns the names of the columns of `step_line`."""
    titles = "".join(f"{column.title:>{column.width}}" for column in _columns(verbose))
    return f"{'step':>11}{titles}{'left':>10}"


def step_line(record: dict[str, Any], num_steps: int, seconds_left: float, verbose: bool = False) -> str:
    """Returns the line of a training step, of at most 80 columns unless it is verbose.

    Args:
        record: of metrics.jsonl.
        num_steps: of the run.
        seconds_left: to its end.
    """
    cells = "".join(f"{column.text(record):>{column.width}}" for column in _columns(verbose))
    return f"{record['step']}/{num_steps}".rjust(11) + cells + duration(seconds_left).rjust(10)


def _columns(verbose: bool) -> tuple[_Column, ...]:
    return COLUMNS + VERBOSE_COLUMNS if verbose else COLUMNS


def evaluation_line(step: int, result: Evaluation) -> str:
    """Returns the line of an evaluation."""
    return (
        f"held out {step}: sampled {with_error(result.sampled, result.sampled_se)}  "
        f"greedy {with_error(result.greedy, result.greedy_se)}  "
        f"teacher {with_error(result.teacher, result.teacher_se)}"
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
