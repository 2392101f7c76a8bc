"""The study of small models: its tasks, settings and budgets, on the grid of `grid`.

Beside every setting at its rate, DistIL's other teachers and the credit's variants are reported at DistIL's rate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from studies.compare import grid
from studies.compare.experiment import CREDITS, OBJECTIVES, Run, execute
from studies.compare.grid import REFERENCE, Result, Results, Setting, chosen_rate
from studies.compare.pretrain import Pretraining, pretrained
from studies.compare.tasks import TASKS

SETTINGS: tuple[Setting, ...] = (
    *((name, "frozen") for name in OBJECTIVES),
    *((name, teacher) for name in ("distil", "reverse_kl") for teacher in ("ema", "live")),
)
TEACHERS: tuple[Setting, ...] = (("distil", "ema"), ("distil", "live"))
VARIANTS: tuple[Setting, ...] = tuple((name, "frozen") for name in CREDITS)
VARIANTS_TASK = "list"
"""Its teacher is unsure of the signs, whose cross-entropy nothing lowers."""


class Budget(NamedTuple):
    """The same for every objective."""

    task: str
    steps: int
    prompts: int
    """Per step."""
    rollouts: int = 4
    """Answers to each prompt."""
    pretrain_steps: int = 500
    all_teachers: bool = True
    """Whether teachers that are not frozen take part."""

    @property
    def title(self) -> str:
        return TASKS[self.task].title

    @property
    def settings(self) -> tuple[Setting, ...]:
        return SETTINGS if self.all_teachers else tuple(setting for setting in SETTINGS if setting[1] == "frozen")


@dataclass(frozen=True)
class Scale:
    """How large a study is; the rest of a run's settings are the defaults of `Run`."""

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
    """Pre-training seeds that the seeds are dealt to in turn."""
    eval_problems: int = 96
    final_samples: int = 16

    def run(self, budget: Budget, setting: Setting, rate: float, seed: int) -> Run:
        objective, teacher = setting
        return Run(
            budget.task, objective, teacher, rate, seed, seed % self.models, budget.pretrain_steps, budget.steps,
            budget.prompts, budget.rollouts, eval_every=max(1, budget.steps // 10), eval_problems=self.eval_problems,
            final_samples=self.final_samples,
        )  # fmt: skip

    def tuning(self, budget: Budget, setting: Setting, rate: float) -> list[Run]:
        """On seeds that are never reported."""
        return [self.run(budget, setting, rate, 1000 + i) for i in range(self.tuning_seeds)]

    def others(self, results: Results, seed: int) -> list[Run]:
        runs = []
        for budget in self.tasks:
            explained = (TEACHERS if budget.all_teachers else ()) + (VARIANTS if budget.task == VARIANTS_TASK else ())
            rate = chosen_rate(self, results, budget, REFERENCE)
            runs += [self.run(budget, setting, rate, seed) for setting in explained]
        return runs


QUICK = Scale(
    tasks=(Budget("list", 2, 2, pretrain_steps=20), Budget("add", 2, 2, pretrain_steps=20, all_teachers=False)),
    rates=(3e-4, 1e-3), seeds=2, tuning_seeds=1, models=1, eval_problems=8, final_samples=8,
)  # fmt: skip


def conduct(scale: Scale, folder: Path, jobs: int, progress: Callable[[str, int, int], None]) -> Results:
    """All results of a study that lives in `folder`, as `grid.conduct`."""
    return grid.conduct(
        scale, folder / "runs.jsonl", Run, partial(_execute, folder=folder / "models"), jobs, progress,
        _model_of, partial(_pretrain, folder=folder / "models"),
    )  # fmt: skip


def _model_of(run: Run) -> Pretraining:
    return Pretraining(run.task, run.model_seed, run.pretrain_steps)


def _pretrain(settings: Pretraining, folder: Path) -> Pretraining:
    pretrained(settings, folder)
    return settings


def _execute(run: Run, folder: Path) -> tuple[Run, Result]:
    return run, execute(run, pretrained(_model_of(run), folder))
