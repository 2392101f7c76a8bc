"""The study of small models: its tasks, settings and budgets, on the grid of `grid`.

It reports every setting at its rate and, at DistIL's rate, DistIL's other teachers and the variants of its credit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from studies.compare import grid
from studies.compare.digit_tasks import TASKS
from studies.compare.experiment import CREDITS, OBJECTIVES, SmallRun, execute
from studies.compare.grid import REFERENCE, Result, Results, Setting, chosen_rate
from studies.compare.pretrain import Pretraining, pretrained

SETTINGS: tuple[Setting, ...] = (
    *((name, "frozen") for name in OBJECTIVES),
    *((name, teacher) for name in ("distil", "reverse_kl") for teacher in ("ema", "live")),
)
TEACHERS: tuple[Setting, ...] = (("distil", "ema"), ("distil", "live"))
VARIANTS: tuple[Setting, ...] = tuple((name, "frozen") for name in CREDITS)
VARIANTS_TASK = "list"
"""The task of the credit's variants: its teacher is unsure of the signs, whose cross-entropy nothing lowers."""


class Budget(NamedTuple):
    """A task and the training that every objective gets on it."""

    task: str
    steps: int
    prompts: int
    """Prompts per step."""
    rollouts: int = 4
    """Answers per prompt."""
    pretrain_steps: int = 500
    all_teachers: bool = True
    """False leaves out the teachers that are not frozen."""

    @property
    def title(self) -> str:
        return TASKS[self.task].title

    @property
    def settings(self) -> tuple[Setting, ...]:
        return SETTINGS if self.all_teachers else tuple(setting for setting in SETTINGS if setting[1] == "frozen")


@dataclass(frozen=True)
class Scale:
    """The size of the study; other settings of a run are the defaults of `SmallRun`."""

    tasks: tuple[Budget, ...] = (
        Budget("sort", 40, 16),
        Budget("list", 60, 16),
        Budget("descend", 80, 16),
        Budget("add", 150, 32, rollouts=2, pretrain_steps=1000, all_teachers=False),
    )
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    seeds: int = 10
    tuning_seeds: int = 2
    models: int = 3
    """Number of pre-trained models; the seeds are dealt to them in turn."""
    eval_problems: int = 96
    final_samples: int = 16

    def run(self, budget: Budget, setting: Setting, rate: float, seed: int) -> SmallRun:
        objective, teacher = setting
        return SmallRun(
            budget.task, objective, teacher, rate, seed, seed % self.models, budget.pretrain_steps, budget.steps,
            budget.prompts, budget.rollouts, eval_every=max(1, budget.steps // 10), eval_problems=self.eval_problems,
            final_samples=self.final_samples,
        )  # fmt: skip

    def tuning(self, budget: Budget, setting: Setting, rate: float) -> list[SmallRun]:
        """The runs that score a rate, on seeds that are never reported."""
        return [self.run(budget, setting, rate, 1000 + i) for i in range(self.tuning_seeds)]

    def others(self, results: Results, seed: int) -> list[SmallRun]:
        """DistIL's other teachers and the credit's variants at DistIL's rate."""
        runs = []
        for budget in self.tasks:
            settings = (TEACHERS if budget.all_teachers else ()) + (VARIANTS if budget.task == VARIANTS_TASK else ())
            rate = chosen_rate(self, results, budget, REFERENCE)
            runs += [self.run(budget, setting, rate, seed) for setting in settings]
        return runs


QUICK = Scale(
    tasks=(Budget("list", 1, 2, pretrain_steps=4), Budget("add", 1, 2, pretrain_steps=4, all_teachers=False)),
    rates=(3e-4, 1e-3), seeds=2, tuning_seeds=1, models=1, eval_problems=8, final_samples=8,
)  # fmt: skip


def conduct(scale: Scale, folder: Path, jobs: int, progress: Callable[[str, int, int], None]) -> Results:
    """Runs the study in `folder` by `grid.conduct` and returns all results."""
    return grid.conduct(
        scale, folder / "runs.jsonl", SmallRun, partial(_execute, folder=folder / "models"), jobs, progress,
        _model_of, partial(_pretrain, folder=folder / "models"),
    )  # fmt: skip


def _model_of(run: SmallRun) -> Pretraining:
    return Pretraining(run.task, run.model_seed, run.pretrain_steps)


def _pretrain(settings: Pretraining, folder: Path) -> Pretraining:
    pretrained(settings, folder)
    return settings


def _execute(run: SmallRun, folder: Path) -> tuple[SmallRun, Result]:
    return run, execute(run, pretrained(_model_of(run), folder))
