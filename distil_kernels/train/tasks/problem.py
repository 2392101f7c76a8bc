"""What a problem is and what a task can do."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol


class Problem(NamedTuple):
    """One problem of a task."""

    question: str
    answer: str
    """The expert's: what a correction shows."""
    entry: Any
    """What the task needs to verify an answer."""
    key: str
    """The same for problems that are one problem written in different ways."""


class Task(Protocol):
    """What the trainer asks of a task."""

    def problem(self, index: int) -> Problem:
        """The `index`-th problem; the same for the same index and seed."""

    def score(self, answer: str, entry: Any) -> float:
        """From 0 (wrong) to 1 (right), of an answer stripped of white space at its ends."""
