"""What a problem is, what is said about an answer, and what a task can do."""

from __future__ import annotations

import math
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
    """From 0 to 1; NaN where no judge lived to give one."""
    text: str
    """In words: the expert's correction, or what happened to the answer."""
    demonstration: str
    """The expert's answer; empty where there is none to show."""

    @property
    def has_verdict(self) -> bool:
        return not math.isnan(self.score)


NO_VERDICT = Feedback(math.nan, "", "")
"""What is said of an answer whose judge hung or died: it is neither right nor wrong, and nothing is learnt from it."""


class Task(Protocol):
    """What the trainer asks of a task. One whose answers are run also has

    trace(answer, entry) -> (score, text): what happened, in words, from the rollout alone

    and may have

    is_sound(index) -> bool: whether the `index`-th problem's own answer is right; else it is passed over
    state_dict(), load_state_dict(state): what it has found of its problems, which a resumed run takes over
    """

    def problem(self, index: int) -> Problem:
        """The `index`-th problem; the same for the same index and seed."""

    def score(self, answer: str, entry: Any) -> float:
        """From 0 (wrong) to 1 (right), of an answer stripped of white space at its ends."""
