"""Feedback on many answers: at once where programs are run, and `NO_VERDICT` on those that no judge lived to judge."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

from distil_kernels.train.tasks.problem import NO_VERDICT, Feedback, Problem, Task
from distil_kernels.train.tasks.sandbox import JudgeFailed, in_parallel

Verify = Callable[[Task, Problem, str], Feedback]


def verified(
    verify: Verify, task: Task, groups: Sequence[tuple[Problem, Sequence[str]]], may_thread: bool
) -> list[list[Feedback]]:
    """What `verify` says of the answers to each problem, in their order.

    A warning says how many answers have no verdict.

    Args:
        may_thread: `verify` may be called from several threads.
    """

    def judged(pair: tuple[Problem, str]) -> Feedback:
        try:
            return verify(task, *pair)
        except JudgeFailed:
            return NO_VERDICT

    pairs = [(problem, answer) for problem, answers in groups for answer in answers]
    runs_programs = may_thread and hasattr(task, "trace")
    found = iter(in_parallel(judged, pairs) if runs_programs else map(judged, pairs))
    feedback = [[next(found) for _ in answers] for _, answers in groups]
    missing = sum(not said.has_verdict for group in feedback for said in group)
    if missing:
        warnings.warn(f"{missing} of {len(pairs)} answers have no verdict (their judges died): left out", stacklevel=2)
    return feedback
