"""What a problem is, what is said about an answer, and what a task can do."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol


class Problem(NamedTuple):
    """One problem of a task."""

    question: str
    answer: str
    """The expert's: what a correction shows; empty where none is known."""
    entry: Any
    """What the task needs to verify an answer."""
    key: str
    """The same for problems that are one problem written in different ways."""


class Feedback(NamedTuple):
    """What the verifier says about one rollout."""

    score: float
    """From 0 to 1."""
    text: str
    """In words: the expert's correction, or what happened to the answer."""
    demonstration: str
    """The expert's answer; empty where there is none to show."""


class Task(Protocol):
    """What the trainer asks of a task. One whose answers are run also has

    trace(answer, entry) -> (score, text): what happened, in words, from the rollout alone
    """

    def problem(self, index: int) -> Problem:
        """The `index`-th problem; the same for the same index and seed."""

    def score(self, answer: str, entry: Any) -> float:
        """From 0 (wrong) to 1 (right), of an answer stripped of white space at its ends."""
