"""The grid of runs: tuning, then the reported seeds; finished runs are kept in one file and never repeated.

    tuning     every setting at every learning rate of one grid, on seeds of their own; the rate with the highest
               accuracy averaged over training is chosen
    reported   every setting at its rate; DistIL's other teachers and the credit's variants at DistIL's rate too

Seeds are the outer loop, so that a study that is stopped early has the same seeds for every setting.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch

from distil_kernels.compare.experiment import CREDITS, OBJECTIVES, Result, Run, execute
from distil_kernels.compare.pretrain import Pretraining, pretrained

Results = dict[Run, Result]
Setting = tuple[str, str]
"""Objective and teacher."""

SETTINGS: tuple[Setting, ...] = (
    *((name, "frozen") for name in OBJECTIVES),
    *((name, teacher) for name in ("distil", "reverse_kl") for teacher in ("ema", "live")),
)
REFERENCE: Setting = ("distil", "frozen")
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


QUICK = Scale(
    tasks=(Budget("list", 2, 2, pretrain_steps=20), Budget("add", 2, 2, pretrain_steps=20, all_teachers=False)),
    rates=(3e-4, 1e-3), seeds=2, tuning_seeds=1, models=1, eval_problems=8, final_samples=8,
)  # fmt: skip


def area(result: Result) -> float:
    """Mean sampled accuracy over the course of training, without the start."""
    return fmean(result.sampled[1:])


def chosen_rate(scale: Scale, results: Results, budget: Budget, setting: Setting) -> float:
    """The grid's best on the tuning seeds; the lowest of equals."""
    return max(scale.rates, key=lambda rate: fmean(area(results[run]) for run in scale.tuning(budget, setting, rate)))


def tuning_runs(scale: Scale) -> list[Run]:
    return [
        run
        for budget in scale.tasks
        for setting in budget.settings
        for rate in scale.rates
        for run in scale.tuning(budget, setting, rate)
    ]


def reported_runs(scale: Scale, results: Results) -> list[Run]:
    """Without repetition, seed after seed; `results` holds the tuning runs."""
    rates = {
        (budget, setting): chosen_rate(scale, results, budget, setting)
        for budget in scale.tasks
        for setting in budget.settings
    }
    runs = []
    for seed in range(scale.seeds):
        runs += [scale.run(budget, setting, rate, seed) for (budget, setting), rate in rates.items()]
        for budget in scale.tasks:
            explained = (TEACHERS if budget.all_teachers else ()) + (VARIANTS if budget.task == VARIANTS_TASK else ())
            runs += [scale.run(budget, setting, rates[budget, REFERENCE], seed) for setting in explained]
    return list(dict.fromkeys(runs))


def load(path: Path) -> Results:
    """What a study's file holds, {} where there is none."""
    if not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {Run(**line["run"]): Result(**line["result"]) for line in lines}


def save(path: Path, results: Results) -> None:
    """One line per run; the file is replaced as a whole, so that a stopped study leaves a whole one."""
    lines = [json.dumps({"run": asdict(run), "result": asdict(result)}) for run, result in results.items()]
    part = path.with_suffix(".part")
    part.write_text("\n".join(lines) + "\n", encoding="utf-8")
    os.replace(part, path)


def conduct(scale: Scale, folder: Path, jobs: int, progress: Callable[[str, int, int], None]) -> Results:
    """All results of a study that lives in `folder`: those there already, and the missing ones.

    Args:
        jobs: processes, each on one thread.
        progress: called with the phase, its runs done and their number.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "runs.jsonl"
    results = load(path)
    with ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        for phase in ("tuning", "reported runs"):
            wanted = tuning_runs(scale) if phase == "tuning" else reported_runs(scale, results)
            missing = [run for run in wanted if run not in results]
            models = list(dict.fromkeys(Pretraining(run.task, run.model_seed, run.pretrain_steps) for run in missing))
            for done, _ in enumerate(_each(pool, partial(_pretrain, folder=folder / "models"), models), 1):
                progress(f"models for {phase}", done, len(models))
            done = len(wanted) - len(missing)
            progress(phase, done, len(wanted))
            for run, result in _each(pool, partial(_execute, folder=folder / "models"), missing):
                results[run] = result
                save(path, results)
                done += 1
                progress(phase, done, len(wanted))
    return results


def _pretrain(settings: Pretraining, folder: Path) -> Pretraining:
    pretrained(settings, folder)
    return settings


def _execute(run: Run, folder: Path) -> tuple[Run, Result]:
    return run, execute(run, pretrained(Pretraining(run.task, run.model_seed, run.pretrain_steps), folder))


def _each(pool: ProcessPoolExecutor, function: Callable[..., Any], inputs: Iterable[Any]) -> Iterator[Any]:
    """Results as they come; what has not begun is dropped when the caller stops."""
    futures = [pool.submit(function, item) for item in inputs]
    try:
        for future in as_completed(futures):
            yield future.result()
    finally:
        for future in futures:
            future.cancel()
