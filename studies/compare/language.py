"""The study of a real language model: the trainer itself, with one objective after the other, on the grid of `grid`.

A run is `train.trainer.Trainer` in this process: `steps` updates on problems that never repeat, then `final_samples`
sampled answers to each held-out problem. The course of training costs nothing more: it is the accuracy of each step's
own rollouts, sampled at temperature 1 before its update, of problems that are the same for all objectives of a seed.
A rate is chosen for an objective on all TUNING tasks together. Nothing of a run is kept but its line.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

from distil_kernels.train.config import Config
from distil_kernels.train.presets import PRESETS
from studies.compare import grid
from studies.compare.grid import REFERENCE, Result, Results, Setting

_FULL_CREDIT: dict[str, Any] = {"teacher_ratio_clip": None, "credit_clip": None}
OPTIONS: dict[str, dict[str, Any]] = {
    "distil": PRESETS["distil"] | _FULL_CREDIT,
    "distil_kl": _FULL_CREDIT,
    "ce": PRESETS["distil"] | {"credit_span": "none"},
    "reverse_kl": PRESETS["sdpo"] | {"teacher": "frozen"},
    "jsd": PRESETS["opsd"],
    "policy_gradient": PRESETS["grpo"],
}
"""The trainer's options of `experiment.OBJECTIVES` here. Teachers are frozen, and the credit is whole,
which the trainer's defaults bound."""


@dataclass(frozen=True)
class Run:
    """Everything that decides the result of a run; 0 steps are the model as it starts."""

    task: str
    objective: str
    learning_rate: float
    seed: int
    steps: int
    prompts: int
    rollouts: int
    max_new_tokens: int
    eval_problems: int
    final_samples: int
    """Answers to each held-out problem after the last step; 0 for no evaluation."""
    model: str = "smollm2"
    num_examples: int = 1
    warmup_steps: int = 2
    eval_seed: int = 1234
    precision: Literal["auto", "float32", "bfloat16"] = "bfloat16"
    """Of products; weights are float32. Takes .64 of float32's time on processors with instructions for it."""


def execute(run: Run) -> tuple[Run, Result]:
    from rich.console import Console

    from distil_kernels.train.build import build
    from distil_kernels.train.trainer import Trainer

    begin = time.process_time()
    config = Config(
        model=run.model, task=run.task, seed=run.seed, steps=run.steps, prompts_per_step=run.prompts,
        rollouts_per_prompt=run.rollouts, max_new_tokens=run.max_new_tokens, num_examples=run.num_examples,
        learning_rate=run.learning_rate, warmup_steps=run.warmup_steps, eval_problems=run.eval_problems,
        eval_samples=max(1, run.final_samples), eval_seed=run.eval_seed, precision=run.precision,
        **OPTIONS[run.objective],
    )  # fmt: skip
    config.check()
    with TemporaryDirectory() as directory:
        parts = build(config, Path(directory))
        trainer = Trainer(config, parts, Console(quiet=True))
        records = [trainer.train_step() for _ in range(run.steps)]
        result = Result(
            list(range(run.steps)), [record["accuracy"] for record in records], [], [],
            [record["length"] for record in records], [], 0.0,
            [record["teacher_entropy"] for record in records if "teacher_entropy" in record],
        )  # fmt: skip
        if run.final_samples:
            evaluation = parts.data.evaluator.evaluate(parts.models.student, parts.models.teacher)
            assert evaluation is not None
            result.greedy, result.teacher = [evaluation.greedy], [evaluation.teacher]
            result.correct = evaluation.num_correct
    result.seconds = time.process_time() - begin
    return run, result


class Budget(NamedTuple):
    """The same for every objective."""

    task: str
    title: str
    max_new_tokens: int
    """All tokens of a right answer, its end and a space before it included, and one more."""
    steps: int = 8
    prompts: int = 4
    """Per step."""
    rollouts: int = 4
    """Answers to each prompt."""

    @property
    def settings(self) -> tuple[Setting, ...]:
        return tuple((name, "frozen") for name in OPTIONS)


@dataclass(frozen=True)
class Scale:
    """How large a study is."""

    tasks: tuple[Budget, ...] = (
        Budget("largest", "largest of four", 5),
        Budget("add", "add three digits", 7),
        Budget("reasoning_gym:letter_counting", "count a letter", 4),
        Budget("reverse", "reverse four digits", 7),
        Budget("reasoning_gym:gcd", "greatest common divisor", 6),
    )
    rates: tuple[float, ...] = (3e-5, 1e-4, 3e-4)
    seeds: int = 5
    tuning_tasks: tuple[Budget, ...] = tasks[:2]
    final_samples: int = 16
    eval_problems: int = 16
    model: str = "smollm2"

    def run(self, budget: Budget, setting: Setting, rate: float, seed: int) -> Run:
        return Run(
            budget.task, setting[0], rate, seed, budget.steps, budget.prompts, budget.rollouts, budget.max_new_tokens,
            self.eval_problems, self.final_samples, self.model,
        )  # fmt: skip

    def start(self, budget: Any, seed: int) -> Run:
        """The model as it starts: examples and held-out problems of the seed's runs."""
        return replace(self.run(budget, REFERENCE, 0.0, seed), steps=0)

    def tuning(self, budget: Any, setting: Setting, rate: float) -> list[Run]:
        """One rate for an objective on all tasks: the same runs whatever the budget."""
        runs = [self.run(task, setting, rate, 1000) for task in self.tuning_tasks]
        return [replace(run, eval_problems=1, final_samples=0) for run in runs]

    def others(self, results: Results, seed: int) -> list[Run]:
        return [self.start(budget, seed) for budget in self.tasks]


QUICK = Scale(
    tasks=(Budget("largest", "largest of four", 3, steps=2, prompts=2, rollouts=2),), rates=(1e-3, 1e-2), seeds=2,
    tuning_tasks=(Budget("largest", "largest of four", 3, steps=2, prompts=2, rollouts=2),), final_samples=4,
    eval_problems=4,
)  # fmt: skip


def conduct(scale: Scale, folder: Path, jobs: int, progress: Callable[[str, int, int], None]) -> Results:
    """All results of a study that lives in `folder`, as `grid.conduct`."""
    return grid.conduct(scale, folder / "runs.jsonl", Run, execute, jobs, progress)
