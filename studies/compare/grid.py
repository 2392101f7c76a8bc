"""A grid of runs: tuning, then the reported seeds; finished runs are kept in one file and never repeated.

    tuning     every setting at every learning rate of one grid, on seeds of their own; the rate with the highest
               accuracy averaged over training is chosen
    reported   every setting at its rate

Seeds are the outer loop, so that a study that is stopped early has the same seeds for every setting. A run is a frozen
dataclass of all that decides its result; a line of the file is {"run": ..., "result": ...}.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

import torch

Setting = tuple[str, str]
"""Objective and teacher."""
REFERENCE: Setting = ("distil", "frozen")


@dataclass
class Result:
    steps: list[int]
    sampled: list[float]
    """Accuracy of answers sampled at temperature 1 after each of these steps."""
    greedy: list[float]
    teacher: list[float]
    """Sampled accuracy of the teacher that reads corrections, on held-out problems; empty without a teacher."""
    length: list[float]
    """Mean length of a sampled answer, its end included, after each of the steps."""
    correct: list[int]
    """Of each held-out problem, how many of the last `final_samples` answers are right."""
    seconds: float
    """Of the processor."""
    teacher_entropy: list[float] = field(default_factory=list)
    """Nats per token of the students' answers, at each of the steps; empty where it is not asked for."""


Results = dict[Any, Result]
"""By run."""


class Budget(Protocol):
    """What is the same for every objective of a task."""

    @property
    def task(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def steps(self) -> int: ...
    @property
    def prompts(self) -> int: ...
    @property
    def rollouts(self) -> int: ...
    @property
    def settings(self) -> tuple[Setting, ...]: ...


class Scale(Protocol):
    """How large a study is."""

    @property
    def tasks(self) -> Sequence[Any]:
        """Budgets."""

    @property
    def rates(self) -> tuple[float, ...]: ...
    @property
    def seeds(self) -> int: ...
    @property
    def final_samples(self) -> int: ...

    def run(self, budget: Any, setting: Setting, rate: float, seed: int) -> Any:
        """A reported run."""

    def tuning(self, budget: Any, setting: Setting, rate: float) -> list[Any]:
        """The runs that decide about a rate, on seeds that are never reported."""

    def others(self, results: Results, seed: int) -> list[Any]:
        """What is reported beside every setting at its rate."""


def area(result: Result) -> float:
    """Mean sampled accuracy over the course of training, without the start."""
    return fmean(result.sampled[1:])


def chosen_rate(scale: Scale, results: Results, budget: Budget, setting: Setting) -> float:
    """The grid's best on the tuning seeds; the lowest of equals."""
    return max(scale.rates, key=lambda rate: fmean(area(results[run]) for run in scale.tuning(budget, setting, rate)))


def tuning_runs(scale: Scale) -> list[Any]:
    runs = [
        run
        for budget in scale.tasks
        for setting in budget.settings
        for rate in scale.rates
        for run in scale.tuning(budget, setting, rate)
    ]
    return list(dict.fromkeys(runs))


def reported_runs(scale: Scale, results: Results) -> list[Any]:
    """Without repetition, seed after seed; `results` holds the tuning runs."""
    rates = [
        (budget, setting, chosen_rate(scale, results, budget, setting))
        for budget in scale.tasks
        for setting in budget.settings
    ]
    runs = []
    for seed in range(scale.seeds):
        runs += [scale.run(budget, setting, rate, seed) for budget, setting, rate in rates]
        runs += scale.others(results, seed)
    return list(dict.fromkeys(runs))


def load(path: Path, kind: type) -> Results:
    """What a study's file holds, {} where there is none; `kind` is the class of its runs."""
    if not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {kind(**line["run"]): Result(**line["result"]) for line in lines}


def save(path: Path, results: Results) -> None:
    """One line per run; the file is replaced as a whole, so that a stopped study leaves a whole one."""
    lines = [json.dumps({"run": asdict(run), "result": asdict(result)}) for run, result in results.items()]
    part = path.with_suffix(".part")
    part.write_text("\n".join(lines) + "\n", encoding="utf-8")
    os.replace(part, path)


def conduct(
    scale: Scale,
    path: Path,
    kind: type,
    execute: Callable[[Any], tuple[Any, Result]],
    jobs: int,
    progress: Callable[[str, int, int], None],
    needs: Callable[[Any], Hashable] | None = None,
    prepare: Callable[[Any], Any] | None = None,
) -> Results:
    """All results of a study that is kept in a file: those there already, and the missing ones.

    Args:
        execute: from a run to itself and its result, in one of the processes.
        jobs: processes, each on one thread.
        progress: called with the phase, its runs done and their number.
        needs: what a run needs first, made by `prepare` once for all runs that need the same.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    results = load(path, kind)
    with ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        for phase in ("tuning", "reported runs"):
            wanted = tuning_runs(scale) if phase == "tuning" else reported_runs(scale, results)
            missing = [run for run in wanted if run not in results]
            if needs and prepare:
                first = list(dict.fromkeys(map(needs, missing)))
                for done, _ in enumerate(_each(pool, prepare, first), 1):
                    progress(f"models for {phase}", done, len(first))
            done = len(wanted) - len(missing)
            progress(phase, done, len(wanted))
            for run, result in _each(pool, execute, missing):
                results[run] = result
                save(path, results)
                done += 1
                progress(phase, done, len(wanted))
    return results


def _each(pool: ProcessPoolExecutor, function: Callable[..., Any], inputs: Iterable[Any]) -> Iterator[Any]:
    """Results as they come; what has not begun is dropped when the caller stops."""
    futures = [pool.submit(function, item) for item in inputs]
    try:
        for future in as_completed(futures):
            yield future.result()
    finally:
        for future in futures:
            future.cancel()
