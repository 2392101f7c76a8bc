"""Feedback on many answers: at once where programs are run, and `NO_VERDICT` on those that no judge lived to judge."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

from distil_kernels.train.tasks.problem import NO_VERDICT, Feedback, Problem, Task
from distil_kernels.train.tasks.sandbox import JudgeFailed, in_parallel

Verify = Callable[[Task, Problem, str], Feedback]


def verified(verify: Verify, answers: Sequence[tuple[Task, Problem, str]], may_thread: bool) -> list[Feedback]:
    """What `verify` says of each answer to a task's problem.

    A warning says how many answers have no verdict.

    Args:
        may_thread: `verify` may be called from several threads.
    """

    def judged(answer: tuple[Task, Problem, str]) -> Feedback:
        try:
            return verify(*answer)
        except JudgeFailed:
            return NO_VERDICT

    feedback = in_parallel(judged, answers) if may_thread else list(map(judged, answers))
    missing = sum(not said.has_verdict for said in feedback)
    if missing:
        warnings.warn(
            f"{missing} of {len(answers)} answers have no verdict (their judges died): left out", stacklevel=2
        )
    return feedback
