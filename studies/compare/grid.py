"""A grid of runs: tuning, then the reported seeds; finished runs are stored in one file and never repeated.

    tuning     every setting at every learning rate of one grid, on seeds that are not reported; the rate with the
               highest accuracy averaged over training is chosen
    reported   every setting at its rate

Seeds are the outer loop, so that a study that is stopped early has the same seeds for every setting. A run is a frozen
dataclass of everything that decides its result; a line of the file is {"run": ..., "result": ...}.
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
"""The names of an objective and of a teacher."""
REFERENCE: Setting = ("distil", "frozen")
"""The setting to which the tables compare every other one."""


@dataclass
class Result:
    """The curves and final scores of one run; the field names are keys of runs.jsonl."""

    steps: list[int]
    """Numbers of updates after which the lists below were measured."""
    sampled: list[float]
    """Accuracy of answers sampled at temperature 1."""
    greedy: list[float]
    """Accuracy of greedy answers."""
    teacher: list[float]
    """Sampled accuracy of the teacher that reads corrections, on held-out problems; empty without a teacher."""
    length: list[float]
    """Mean length of a sampled answer, its end included."""
    correct: list[int]
    """Number of right answers among the last `final_samples` ones, for each held-out problem."""
    seconds: float
    """Processor time of the run."""
    teacher_entropy: list[float] = field(default_factory=list)
    """The teacher's entropy in nats per token of the student's answers; empty where it was not measured."""


Results = dict[Any, Result]
"""Results by run."""


class Budget(Protocol):
    """A task and the training that every objective gets on it."""

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
    """The size of a study: tasks, learning rates, seeds and samples."""

    @property
    def tasks(self) -> Sequence[Any]:
        """The budget of each task."""

    @property
    def rates(self) -> tuple[float, ...]: ...
    @property
    def seeds(self) -> int: ...
    @property
    def final_samples(self) -> int: ...

    def run(self, budget: Any, setting: Setting, rate: float, seed: int) -> Any:
        """The run of a setting that is reported for a seed."""

    def tuning(self, budget: Any, setting: Setting, rate: float) -> list[Any]:
        """The runs that score a rate, on seeds that are never reported."""

    def others(self, results: Results, seed: int) -> list[Any]:
        """The reported runs other than every setting at its rate."""


def area(result: Result) -> float:
    """The sampled accuracy averaged over training, without the start."""
    return fmean(result.sampled[1:])


def chosen_rate(scale: Scale, results: Results, budget: Budget, setting: Setting) -> float:
    """The rate of the grid with the best tuning runs; the lowest one among equals."""
    return max(scale.rates, key=lambda rate: fmean(area(results[run]) for run in scale.tuning(budget, setting, rate)))


def tuning_runs(scale: Scale) -> list[Any]:
    """All tuning runs of a study, each once."""
    runs = [
        run
        for budget in scale.tasks
        for setting in budget.settings
        for rate in scale.rates
        for run in scale.tuning(budget, setting, rate)
    ]
    return list(dict.fromkeys(runs))


def reported_runs(scale: Scale, results: Results) -> list[Any]:
    """All reported runs of a study, each once, seed after seed; `results` must hold the tuning runs."""
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
    """Reads the results in a study's file, {} if it does not exist; `kind` is the class of the runs."""
    if not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {kind(**line["run"]): Result(**line["result"]) for line in lines}


def save(path: Path, results: Results) -> None:
    """Writes one line per run and replaces the file at once, so that a stopped study leaves a complete one."""
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
    """Executes the runs that a study's file lacks, stores each as it ends, and returns all results.

    Args:
        execute: maps a run to the run and its result, in one of the processes.
        jobs: number of processes, each on one thread.
        progress: called with the name of the phase, its completed runs and all its runs.
        needs: maps a run to what it needs first, which `prepare` makes once for all runs that need the same.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    results = load(path, kind)
    with ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        for phase in ("tuning", "reported runs"):
            runs = tuning_runs(scale) if phase == "tuning" else reported_runs(scale, results)
            missing = [run for run in runs if run not in results]
            if needs and prepare:
                requirements = list(dict.fromkeys(map(needs, missing)))
                for completed, _ in enumerate(_each(pool, prepare, requirements), 1):
                    progress(f"models for {phase}", completed, len(requirements))
            num_stored = len(runs) - len(missing)
            progress(phase, num_stored, len(runs))
            for completed, (run, result) in enumerate(_each(pool, execute, missing), num_stored + 1):
                results[run] = result
                save(path, results)
                progress(phase, completed, len(runs))
    return results


def _each(pool: ProcessPoolExecutor, function: Callable[..., Any], inputs: Iterable[Any]) -> Iterator[Any]:
    """Yields results in the order in which they end; calls that have not begun are cancelled when the caller stops."""
    futures = [pool.submit(function, item) for item in inputs]
    try:
        for future in as_completed(futures):
            yield future.result()
    finally:
        for future in futures:
            future.cancel()
