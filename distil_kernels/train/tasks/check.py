"""Runs the reference solution or right answer of every problem of a task through the task's own verifier."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from distil_kernels.train.tasks.problem import Problem, Task
from distil_kernels.train.tasks.records import Records
from distil_kernels.train.tasks.sandbox import JudgeFailed, in_parallel

GENERATED = 200
"""Problems of a task that generates them."""


class Report(NamedTuple):
    """What a check found; problems are named by their line in the file, or their number."""

    right: list[str]
    """Problems whose own answer is right."""
    wrong: list[tuple[str, str]]
    """Problems whose own answer is not, with what the verifier says."""
    unanswered: list[str]
    """Problems with no answer of their own: they can be judged, and their verifier cannot be checked."""
    unjudgeable: list[str]
    """Records that the file's reader left out, with the reason."""

    @property
    def is_ok(self) -> bool:
        return not (self.wrong or self.unjudgeable)

    def lines(self) -> Iterator[str]:
        """For a reader."""
        total = len(self.right) + len(self.wrong) + len(self.unanswered) + len(self.unjudgeable)
        yield f"{total} problems"
        yield f"{len(self.right)} whose own answer is right, {len(self.wrong)} whose own answer is wrong"
        yield f"{len(self.unanswered)} without an answer of their own, {len(self.unjudgeable)} that cannot be judged"
        for name, text in self.wrong:
            yield f"wrong, {name}: {text}"
        for text in self.unjudgeable:
            yield f"left out, {text}"


def check(task: Task) -> Report:
    """Checks every record of a file, or the first problems of a task that generates them."""
    if isinstance(task, Records):
        named = list(zip(task.places, task.all_problems, strict=True))
        unjudgeable = task.left_out
    else:
        named = [(f"problem {index}", task.problem(index)) for index in range(GENERATED)]
        unjudgeable = []
    answered = [(name, problem) for name, problem in named if problem.answer]

    def verdict(problem: Problem) -> tuple[float, str]:
        trace = getattr(task, "trace", None)
        try:
            if trace is not None:
                return trace(problem.answer, problem.entry)
            return task.score(
                problem.answer.strip(), problem.entry
            ), f"the answer {problem.answer!r} scores less than 1"
        except JudgeFailed as error:
            return 0.0, str(error)

    problems = [problem for _, problem in answered]
    verdicts = in_parallel(verdict, problems) if hasattr(task, "trace") else list(map(verdict, problems))
    pairs = [(name, *found) for (name, _), found in zip(answered, verdicts, strict=True)]
    return Report(
        [name for name, score, _ in pairs if score >= 1.0],
        [(name, text) for name, score, text in pairs if score < 1.0],
        [name for name, problem in named if not problem.answer],
        unjudgeable,
    )
