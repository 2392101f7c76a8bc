"""Tasks: things that pose problems, know the expert's answer, and verify an answer.

A task has no splits of its own. A problem is held out when the hash of its question says so, so that training and
held-out problems are disjoint whatever seeds or tasks are used.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

from distil_kernels.train.tasks.numbers import AddNumbers, LargestNumber, SortNumbers
from distil_kernels.train.tasks.reasoning_gym import ReasoningGym


class Problem(NamedTuple):
    """One problem of a task."""

    question: str
    answer: str
    """The expert's: what a correction shows."""
    entry: Any
    """What the task needs to verify an answer."""


class Task(Protocol):
    """What the trainer asks of a task."""

    def problem(self, index: int) -> tuple[str, str, Any]:
        """Question, expert's answer and entry of the `index`-th problem; the same for the same index and seed."""

    def score(self, answer: str, entry: Any) -> float:
        """From 0 (wrong) to 1 (right), of an answer stripped of white space at its ends."""


OWN_TASKS = {"largest": LargestNumber, "add": AddNumbers, "sort": SortNumbers}
HELD_OUT_SHARE = 8
"""One problem in eight is held out."""


def make_task(name: str, seed: int) -> Task:
    """A task by its name: one of OWN_TASKS, or `reasoning_gym:NAME`.

    Raises:
        ValueError: no such task.
    """
    if name.startswith("reasoning_gym:"):
        return ReasoningGym(name.removeprefix("reasoning_gym:"), seed)
    if name not in OWN_TASKS:
        raise ValueError(f"[task] expected one of {', '.join(OWN_TASKS)} or reasoning_gym:NAME, got {name!r}")
    return OWN_TASKS[name](seed)


def is_held_out(question: str) -> bool:
    """Whether a question belongs to the held-out problems: a property of its text alone."""
    return zlib.crc32(question.encode()) % HELD_OUT_SHARE == 0


def problems(task: Task, held_out: bool, start: int = 0) -> Iterator[tuple[int, Problem]]:
    """Endless distinct-by-split problems with the index to go on from: (index + 1, problem), from index `start`.

    Raises:
        ValueError: the task gave a thousand problems in a row of the other split (it has too few different ones).
    """
    misses = 0
    while misses < 1000:
        question, answer, entry = task.problem(start)
        start += 1
        misses += 1
        if is_held_out(question) == held_out:
            misses = 0
            yield start, Problem(question, answer, entry)
    raise ValueError(
        f"[task] no {'held-out' if held_out else 'training'} problem in a thousand: too few different ones"
    )
