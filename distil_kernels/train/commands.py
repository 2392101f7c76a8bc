"""The commands eval, inspect, report, check, record_teacher and untie. None of them changes a run."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from distil_kernels.train.command_line import Parser, option_parser, read_options, run_config
from distil_kernels.train.run.directory import is_run, write_text
from distil_kernels.train.run.json_lines import json_line, read_lines, with_nan

if TYPE_CHECKING:
    from rich.console import Console

    from distil_kernels.train.build import Parts

Work = Callable[[], int | None]
"""What a command does once its options have been checked: returns the exit status, None for 0."""

PROG = "python -m distil_kernels.train"
EVAL_OPTIONS = {
    "task", "skip_bad_records", "max_new_tokens", "eval_problems", "eval_samples", "eval_seed", "precision",
    "backend", "reading",
}  # fmt: skip
"""Options that `eval` may override for a trained run."""


def evaluate(arguments: list[str]) -> Work:
    """Pass rates of a run's last checkpoint, or of any model, on held-out problems: a table and a JSON line."""
    parser = option_parser(
        f"{PROG} eval",
        "Accuracy on held-out problems, greedy and sampled, and unbiased pass@k, with standard errors. A run keeps its "
        f"own settings; given beside it may be {', '.join(sorted(EVAL_OPTIONS))}. A model takes every option.",
        "RUN_OR_MODEL",
    )
    parser.add_argument("target", metavar="RUN_OR_MODEL", help="run directory, or path or hub name of a model")
    config, given, others = read_options(parser, arguments)
    target = others["target"]
    # Late, so that wrong options are reported before seconds of imports.
    from distil_kernels.train.build import build
    from distil_kernels.train.run.checkpoint import newest_undamaged

    if is_run(Path(target)):
        extra = sorted(given - EVAL_OPTIONS)
        if extra:
            raise ValueError(f"[eval] a run keeps its settings: expected {sorted(EVAL_OPTIONS)}, got --{extra[0]}")
        path = newest_undamaged(Path(target), lambda text: print(text, file=sys.stderr))
        if path is None:
            raise ValueError(f"[eval] {target} has no checkpoint yet")
        config = dataclasses.replace(run_config(Path(target)), **{name: getattr(config, name) for name in given})
        config = dataclasses.replace(config, tracker="none", shard=False, tensor_parallel=1)
        config.check()
        parts = build(config, Path(target))
        step = parts.models.restore(path)["step"]
    else:
        if "model" in given:
            raise ValueError(f"[model] the model to evaluate is {target}, got --model {config.model} too")
        config = dataclasses.replace(
            config,
            model=target,
            teacher="live",
            teacher_model="",
            teacher_url="",
            teacher_store="",
            tracker="none",
            shard=False,
            tensor_parallel=1,
        )
        parts, step = build(config, Path()), 0
    return partial(_print_evaluation, parts, config.task, target, step)


def _print_evaluation(parts: Parts, task: str, target: str, step: int) -> None:
    result = parts.data.evaluator.evaluate(parts.models.student, parts.models.teacher)
    assert result is not None
    if not parts.processes.is_main:
        return
    from rich.table import Table

    table = Table(title=f"{target}: {result.num_problems} held-out problems of {task}")
    for column in ("", "mean", "standard error"):
        table.add_column(column, justify="right" if column else "left")
    rows = [("greedy", result.greedy, result.greedy_se), ("sampled", result.sampled, result.sampled_se)]
    rows += [(f"pass@{k}", *value) for k, value in result.pass_at.items()]
    for label, mean, error in [*rows, ("sampled, having read the feedback", result.teacher, result.teacher_se)]:
        table.add_row(label, f"{mean:.3f}", f"{error:.3f}" if math.isfinite(error) else "-")
    _console().print(table)
    print(json_line({"target": target, "step": step, **dataclasses.asdict(result)}))


def inspect(arguments: list[str]) -> Work:
    """Shows one held-out rollout of a run in the terminal."""
    parser = _parser("inspect", "Shows a rollout of a held-out problem, each token coloured by what it costs.")
    parser.add_argument("--step", type=int, help="evaluation to take it from [the last]")
    parser.add_argument("--problem", type=int, default=0, help="which of the problems [0]")
    parser.add_argument("--rollout", type=int, default=0, help="which of its rollouts [0]")
    parser.add_argument("--color", choices=("ce", "kl", "credit"), default="ce", help="what colours the tokens [ce]")
    options = parser.parse_args(arguments)
    directory = _run_directory(options.run)
    from distil_kernels.train.report import inspect

    with _readable(directory):
        records = with_nan(read_lines(directory / "rollouts.jsonl"))
        record = inspect.choose(records, options.step, options.problem, options.rollout)
        shown = inspect.rendered(record, options.color)
    return partial(_console().print, shown)


def report(arguments: list[str]) -> Work:
    """Writes a run as one HTML file."""
    parser = _parser("report", "Writes a run as one HTML file: curves, before and after, rollouts, configuration.")
    parser.add_argument("--output", help="the file [RUN/report.html]")
    options = parser.parse_args(arguments)
    directory = _run_directory(options.run)
    from distil_kernels.train.report.html import page

    output = Path(options.output) if options.output else directory / "report.html"
    with _readable(directory):
        metrics, rollouts = (with_nan(read_lines(directory / name)) for name in ("metrics.jsonl", "rollouts.jsonl"))
        text = page(run_config(directory), directory.resolve().name, metrics, rollouts)

    def write() -> None:
        write_text(output, text)
        print(output)

    return write


def check(arguments: list[str]) -> Work:
    """Every reference solution or right answer of a task, judged by the task's own verifier."""
    parser = Parser(prog=f"{PROG} check", description=check.__doc__, allow_abbrev=False)
    parser.add_argument("task", metavar="TASK", help="a task, as --task takes it: code:FILE.jsonl, math, ...")
    parser.add_argument("--unsafe_sandbox", action="store_true", help="as in training")
    options = parser.parse_args(arguments)
    from distil_kernels.train.tasks import make_task
    from distil_kernels.train.tasks.check import check as checked
    from distil_kernels.train.tasks.sandbox import SANDBOX

    SANDBOX.is_unsafe_allowed = options.unsafe_sandbox
    task = make_task(options.task, seed=0, skip_bad_records=True)  # all of them are named

    def run() -> int:
        report = checked(task)
        print("\n".join(report.lines()))
        return 0 if report.is_ok else 1

    return run


def record_teacher(arguments: list[str]) -> Work:
    """Writes what a teacher says of a data set's own answers to a store, which teacher stored reads."""
    parser = option_parser(
        f"{PROG} record_teacher",
        "Writes what a teacher says of the sequences that a run with these options would learn (rollouts none; as many "
        "as its --steps and --prompts_per_step take) to safetensors files. A store that is there is gone on with.",
        "STORE",
    )
    parser.add_argument("store", metavar="STORE", help="directory of the store")
    parser.add_argument(
        "--payload", choices=("topk", "hidden"), help="teacher_top log-probs, or hidden states and the head [topk]"
    )
    parser.add_argument(
        "--dtype", choices=("float16", "bfloat16", "float32"), help="of log-probs and hidden states [float16]"
    )
    config, _, others = read_options(parser, arguments)
    config, payload = config.with_absolute_paths(), others.get("payload", "topk")
    from distil_kernels.train.recording import Recording, check_recording

    check_recording(config, payload)
    from distil_kernels.train.build import build

    parts = build(config, Path())
    recording = Recording(config, parts, Path(others["store"]), payload, others.get("dtype", "float16"))

    def run() -> int:
        from rich.console import Console
        from rich.progress import track

        console = Console(stderr=True)
        for _ in track(range(config.steps), "recording", console=console, disable=not console.is_terminal):
            recording.step()
        recording.writer.flush()
        print(f"{others['store']}: {recording.writer.num_sequences} sequences")
        return 0

    return run


def untie(arguments: list[str]) -> Work:
    """Writes a copy of a model whose head is a tensor of its own, as a vLLM server on a CPU needs it."""
    parser = Parser(prog=f"{PROG} untie", description=untie.__doc__, allow_abbrev=False)
    parser.add_argument("model", metavar="MODEL", help="path or hub name of a causal LM")
    parser.add_argument("directory", metavar="DIRECTORY", help="where the copy is written, with its tokenizer")
    options = parser.parse_args(arguments)
    from distil_kernels.train.rollouts.vllm_server import write_served

    return partial(write_served, options.model, Path(options.directory))


def _parser(command: str, description: str) -> argparse.ArgumentParser:
    """Returns a parser for a command on a run directory."""
    parser = Parser(prog=f"{PROG} {command}", description=description, allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", help="run directory")
    return parser


def _run_directory(name: str) -> Path:
    """Returns the path of a run directory, or raises ValueError where there is none."""
    if not is_run(Path(name)):
        raise ValueError(f"[RUN] {name} is no run directory (it has no config.json of a run)")
    return Path(name)


@contextmanager
def _readable(directory: Path) -> Iterator[None]:
    """A context in which a record without what is read of it is a fault of the run directory."""
    try:
        yield
    except Exception as error:  # of records that hold anything
        if str(error).startswith("["):
            raise
        raise ValueError(
            f"[RUN] expected metrics.jsonl and rollouts.jsonl of {directory} as the run wrote them, got a record that "
            f"cannot be shown ({type(error).__name__}: {error})"
        ) from error


def _console() -> Console:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160)
