"""Tasks: things that pose problems, know the expert's answer, and verify an answer.

A task has no splits of its own. A problem is held out when the hash of its key says so, so that training and held-out
problems are disjoint whatever seeds or tasks are used.
"""

from __future__ import annotations

import difflib
import zlib
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from distil_kernels.train.tasks.answers import Mathematics, MultipleChoice, Questions
from distil_kernels.train.tasks.code import Code
from distil_kernels.train.tasks.numbers import (
    AddNumbers,
    LargestNumber,
    Product,
    Remainder,
    Reverse,
    SortNumbers,
)
from distil_kernels.train.tasks.problem import NO_VERDICT, Feedback, Problem, Task
from distil_kernels.train.tasks.reasoning_gym import ReasoningGym
from distil_kernels.train.tasks.records import DATA, Records
from distil_kernels.train.tasks.shop import Purchases

__all__ = [
    "DOMAINS",
    "NO_VERDICT",
    "OWN_TASKS",
    "Feedback",
    "Problem",
    "Task",
    "answered_problems",
    "held_out_problems",
    "is_held_out",
    "make_task",
    "problems",
    "record_file",
    "with_seed",
]

OWN_TASKS: dict[str, Callable[[int], Task]] = {
    "largest": LargestNumber,
    "add": AddNumbers,
    "sort": SortNumbers,
    "product": Product,
    "remainder": Remainder,
    "reverse": Reverse,
    "shop": Purchases,
}
DOMAINS: dict[str, Callable[..., Task]] = {
    "qa": Questions,
    "science": MultipleChoice,
    "math": Mathematics,
    "code": Code,
}
"""Tasks over the records of a file; all but qa come with a small one of their own."""

HELD_OUT_SHARE = 8
"""One problem in eight is held out."""


def record_file(name: str) -> Path | None:
    """The file whose records a task has; None for a task that generates its problems."""
    domain, _, file = name.partition(":")
    if domain not in DOMAINS or not (file or domain != "qa"):
        return None
    return Path(file) if file else DATA / f"{domain}.jsonl"


def make_task(name: str, seed: int, show_private_tests: bool = False, skip_bad_records: bool = False) -> Task:
    """A task by its name: one of OWN_TASKS, `reasoning_gym:NAME`, or a domain, DOMAIN or `DOMAIN:FILE.jsonl`.

    Args:
        skip_bad_records: records of a file that cannot be used are left out.

    Raises:
        ValueError: no such task, or a file that cannot be used.
    """
    if name.startswith("reasoning_gym:"):
        return ReasoningGym(name.removeprefix("reasoning_gym:"), seed)
    path, domain = record_file(name), name.partition(":")[0]
    if path is not None and domain == "code":
        return Code(path, seed, shows_private_tests=show_private_tests, skips_bad=skip_bad_records)
    if path is not None:
        return DOMAINS[domain](path, seed, skips_bad=skip_bad_records)
    if domain == "qa":
        raise ValueError(f"[task] qa has no records of its own: expected qa:FILE.jsonl, got {name!r}")
    if name not in OWN_TASKS:
        close = difflib.get_close_matches(name, [*OWN_TASKS, *DOMAINS], n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise ValueError(
            f"[task] expected one of {', '.join(OWN_TASKS)}, reasoning_gym:NAME, science, math, code, or one of "
            f"{', '.join(DOMAINS)} with a file (qa:FILE.jsonl), got {name!r}{hint}"
        )
    return OWN_TASKS[name](seed)


def with_seed(task: Task, name: str, seed: int) -> Task:
    """The task of this name with other problems, or the problems of its file in other orders."""
    return task.with_seed(seed) if isinstance(task, Records) else make_task(name, seed)


def is_held_out(problem: Problem) -> bool:
    """Whether a problem belongs to the held-out ones: a property of its key alone."""
    return zlib.crc32(problem.key.encode()) % HELD_OUT_SHARE == 0


def held_out_problems(task: Task, count: int) -> list[Problem]:
    """Different held-out problems: `count` of them, or as many as a file has."""
    found: dict[str, Problem] = {}
    for _, problem in islice(problems(task, held_out=True), 4 * count):
        found.setdefault(problem.key, problem)
        if len(found) == count:
            break
    return list(found.values())


def answered_problems(task: Task, count: int) -> list[Problem]:
    """The first different training problems with an answer to show: `count`, or as many as a thousand hold."""
    found: dict[str, Problem] = {}
    for _, problem in islice(problems(task, held_out=False), 1000 if count else 0):
        if problem.answer:
            found.setdefault(problem.key, problem)
        if len(found) == count:
            break
    return list(found.values())


def problems(task: Task, held_out: bool, start: int = 0) -> Iterator[tuple[int, Problem]]:
    """Endless sound problems of one split from index `start`, each with the index to go on from.

    Raises:
        ValueError: the task gave a thousand problems in a row of the other split (it has too few different ones).
    """
    is_sound: Callable[[int], bool] = getattr(task, "is_sound", lambda index: True)
    misses = 0
    while misses < 1000:
        problem = task.problem(start)
        start += 1
        misses += 1
        if is_held_out(problem) == held_out and is_sound(start - 1):
            misses = 0
            yield start, problem
    split = "held-out" if held_out else "training"
    raise ValueError(
        f"[task] no {split} problem in a thousand, where one in {HELD_OUT_SHARE} is held out, by its hash: the task "
        "has too few different ones"
    )
