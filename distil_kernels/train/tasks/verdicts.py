"""Feedback on many answers: at once where programs are run, and without those that no judge lived to judge."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Sequence

from distil_kernels.train.tasks.problem import Feedback, Problem, Task
from distil_kernels.train.tasks.sandbox import JudgeFailed, in_parallel

Verify = Callable[[Task, Problem, str], Feedback]


def verified(
    verify: Verify, task: Task, groups: Sequence[tuple[Problem, Sequence[str]]], may_thread: bool
) -> list[list[Feedback]]:
    """What `verify` says of the answers to each problem, in their order.

    An answer without a verdict gets feedback without words, from which nothing is learnt, and the mean score of the
    other answers to its problem; a warning says how many there are.

    Args:
        may_thread: `verify` may be called from several threads.
    """

    def judged(pair: tuple[Problem, str]) -> Feedback | None:
        try:
            return verify(task, *pair)
        except JudgeFailed:
            return None

    pairs = [(problem, answer) for problem, answers in groups for answer in answers]
    runs_programs = may_thread and hasattr(task, "trace")
    found = iter(in_parallel(judged, pairs) if runs_programs else map(judged, pairs))
    feedback = [[next(found) for _ in answers] for _, answers in groups]
    missing = sum(said is None for group in feedback for said in group)
    if missing:
        warnings.warn(f"{missing} of {len(pairs)} answers have no verdict (their judges died): left out", stacklevel=2)
    return [_without_missing(group) for group in feedback]


def _without_missing(group: Sequence[Feedback | None]) -> list[Feedback]:
    scores = [said.score for said in group if said is not None]
    missing = Feedback(statistics.fmean(scores) if scores else 0.0, "", "")
    return [missing if said is None else said for said in group]
