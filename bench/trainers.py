"""A step of this trainer (preset sdpo) and of TRL's trainers, also switched to our losses: time, memory, same numbers?

    python bench/trainers.py                        the default job's shape
    python bench/trainers.py --shape long --gradient_checkpointing
    python bench/trainers.py --trainers full DistIL     those whose names hold one of these words, and ours
    python bench/trainers.py --render bench/results/trainers_*.json     Markdown of earlier runs

Every trainer runs in a separate process and takes its steps in turns with the others, in an order shuffled for each
round. All have the same model, optimiser, precision and attention, and get the same prompts of student and teacher as
token ids. The learning rate is 0 (AdamW does all its work), so that all of them keep the same weights; before each step
all set the same seed, so that they sample the same completions: the step's loss and gradient must then agree.

SDPO computes what ours does. DistillationTrainer and GKD have another teacher and JSD: they are there for the switch
(`apply_distil_kernels_to_trl`), with and without which each is timed.

Columns: median seconds of a step and their spread; ratio to ours; medians of its rollouts (with prompts and feedback)
and of its update (all that follows); completion tokens per second; MiB that its process holds before a step, and its
peak in rollouts and update beyond that (gradients included), medians too; KL(student||teacher) per token, which is
another number for sampled_token. The last line is the run as JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import math
import multiprocessing
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

import machine
import speed_tables
import torch
from timing import Timing, interleaved
from trainer_steps import TRAINERS, Work, work_through

from distil_kernels.extras import require
from distil_kernels.train.config import Config
from distil_kernels.train.presets import PRESETS

SHAPES: dict[str, dict[str, Any]] = {
    "short": {},  # the default job: 4 x 4 answers that end with their line
    "long": {
        "task": "reasoning_gym:course_schedule",
        "layout": "chat",
        "num_examples": 0,
        "prompts_per_step": 2,
        "max_new_tokens": 96,
    },
}
"""Options of Config. In `long` no token ends an answer."""
WARM_UP = 1
SWITCHED = ", switched"
MEDIANS = ("rollout", "held", "rollout_peak", "update_peak")
COLUMNS = (
    "", "s/step", "+-", "x ours", "rollout s", "update s", "tokens/s", "MiB", "rollout +MiB", "update +MiB", "KL/token",
)  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    options = _parse(arguments)
    if options.render:
        print("\n\n".join(markdown(json.loads(Path(path).read_text())) for path in options.render))
        return
    require("bench/trainers.py", "train", "accelerate", "rich", "transformers")
    torch.set_num_threads(options.threads)
    names = [name for name in TRAINERS if name == "ours" or any(word in name for word in options.trainers)]
    if missing := [name for name in ("trl", "datasets") if importlib.util.find_spec(name) is None]:
        print(f"only ours: {' and '.join(missing)} not installed", file=sys.stderr)
        names = ["ours"]
    config = Config(
        **PRESETS["sdpo"], **SHAPES[options.shape], model=options.model, learning_rate=0.0,
        precision=options.precision, gradient_checkpointing=options.gradient_checkpointing,
    )  # fmt: skip
    run = {"header": machine.header("cpu", options.threads)}
    print(*machine.header_lines(run["header"]), sep="\n", flush=True)
    work = Work.of(config, WARM_UP + options.rounds, options.shape == "long", options.threads)
    run["table"] = measure(names, work)
    speed_tables.print_lines(title(run["table"]), COLUMNS, cells(run["table"]), notes(run["table"]))
    if options.json:
        Path(options.json).write_text(json.dumps(run, indent=1) + "\n")
    print(json.dumps(run))


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="short")
    parser.add_argument(
        "--trainers", nargs="+", default=[""], metavar="WORD", help="peers to time with ours; default: all"
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="TRL's default, not ours")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", metavar="PATH")
    parser.add_argument("--render", nargs="+", metavar="JSON", help="print earlier runs as Markdown")
    return parser.parse_args(arguments)


def measure(names: list[str], work: Work) -> dict[str, Any]:
    """Times `work.steps` steps of each trainer, of which the first WARM_UP do not count; returns the table."""
    context = multiprocessing.get_context("spawn")
    pipes, steps = {}, {name: [] for name in names}
    for name in names:
        pipes[name], child_pipe = context.Pipe()
        context.Process(target=work_through, args=(name, work, child_pipe), daemon=True).start()
        child_pipe.close()  # a trainer's process that ends then ends the wait for it

    def step(name: str) -> None:
        pipes[name].send("step")
        steps[name].append(pipes[name].recv())

    for name in names:
        for _ in range(WARM_UP):
            step(name)
    calls = {name: partial(step, name) for name in names}
    timings = interleaved(calls, "cpu", work.steps - WARM_UP, math.inf)
    lengths = [len(completion) for record in steps[names[0]] for completion in record["completions"]]
    return {
        "config": dataclasses.asdict(work.config),
        "threads": work.threads,
        "prompt_tokens": statistics.fmean(map(len, work.prompts)),
        "teacher_prompt_tokens": statistics.fmean(map(len, work.teacher_prompts)),
        "completion_tokens": [min(lengths), max(lengths)],
        "rows": [_row(name, timings[name], steps[name], steps[names[0]]) for name in names],
    }


def _row(name: str, timing: Timing, steps: list[dict[str, Any]], ours: list[dict[str, Any]]) -> dict[str, Any]:
    timed = steps[WARM_UP:]
    speeds = [sum(map(len, step["completions"])) / step["seconds"] for step in timed]
    medians = {key: statistics.median(step[key] for step in timed) for key in MEDIANS}
    return {
        "name": name,
        "seconds": timing.seconds,
        "spread": timing.spread,
        "rounds": timing.rounds,
        **medians,
        "update": statistics.median(step["seconds"] - step["rollout"] for step in timed),
        "tokens_per_second": statistics.median(speeds),
        "same_completions": sum(a["completions"] == b["completions"] for a, b in zip(steps, ours, strict=True)),
        "kl": [step["kl"] for step in steps],
        "grad_norm": [step["grad_norm"] for step in steps],
    }


def title(table: dict[str, Any]) -> str:
    config, (least, most) = table["config"], table["completion_tokens"]
    return (
        f"{config['prompts_per_step']} prompts x {config['rollouts_per_prompt']} rollouts of "
        f"{least if least == most else f'{least} to {most}'} tokens, prompts of {table['prompt_tokens']:.0f} (teacher "
        f"{table['teacher_prompt_tokens']:.0f}), {config['precision']}, "
        f"{'gradient checkpointing, ' * config['gradient_checkpointing']}{table['threads']} threads"
    )


def cells(table: dict[str, Any]) -> list[list[str]]:
    ours = table["rows"][0]["seconds"]
    return [
        [
            row["name"], f"{row['seconds']:.2f}", f"{row['spread']:.2f}", f"{row['seconds'] / ours:.2f}",
            f"{row['rollout']:.2f}", f"{row['update']:.2f}", f"{row['tokens_per_second']:.1f}",
            *(f"{row[key] / speed_tables.MIB:.0f}" for key in ("held", "rollout_peak", "update_peak")),
            f"{row['kl'][0]:.6f}",
        ]
        for row in table["rows"]
    ]  # fmt: skip


def notes(table: dict[str, Any]) -> list[str]:
    ours, *others = table["rows"]
    steps, (least, most) = len(ours["kl"]), table["completion_tokens"]
    lines = [f"medians of {ours['rounds']} steps; KL of the first one (the loss where there is none)"]
    by_name = {row["name"]: row for row in others}
    for name, after in by_name.items():
        if (before := by_name.get(name.removesuffix(SWITCHED))) and name.endswith(SWITCHED):
            faster, update, peak = (before[key] / after[key] for key in ("seconds", "update", "update_peak"))
            lines.append(
                f"{name}: a step {faster:.2f} times as fast, its update {update:.2f} times, in {1 / peak:.2f} of the "
                f"memory; loss off by {_largest_error(after['kl'], before['kl']):.1e} at most, norm of the gradient by "
                f"{_largest_error(after['grad_norm'], before['grad_norm']):.1e}"
            )
    for row in others:
        if (peer := TRAINERS[row["name"]]) is None or peer.trainer not in ("SDPO", "DistIL"):
            continue  # another teacher and another loss
        note = f"{row['name']}: the same completions in {row['same_completions']} of {steps} steps"
        if row["name"] == "trl full_logits":
            note += f"; KL per token off by {_largest_error(row['kl'], ours['kl']):.1e} at most"
            if least == most:  # its loss is the mean over a completion's tokens, ours the sum
                per_token = [norm / most for norm in ours["grad_norm"]]
                note += f", norm of the gradient by {_largest_error(row['grad_norm'], per_token):.1e}"
        lines.append(note)
    return lines


def _largest_error(values: list[float], expected: list[float]) -> float:
    """The largest relative difference of two lists."""
    return max(abs(a - b) / max(abs(b), 1e-30) for a, b in zip(values, expected, strict=True))


def markdown(run: dict[str, Any]) -> str:
    header, table = run["header"], run["table"]
    lines = ["```", header["command"], *machine.header_lines(header), "```", ""]
    return "\n".join(lines + speed_tables.markdown_lines(title(table), COLUMNS, cells(table), notes(table)))


if __name__ == "__main__":
    main()
