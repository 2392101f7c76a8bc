"""Demonstrations from siblings: a rollout's teacher is shown another rollout of the same problem that scored full.

Never the rollout itself, even where it is the only one that is right: that one is left out of distillation, as all are
where none is right. So what a rollout's teacher reads, and whether it reads anything, is a function of its siblings
alone. Given them the teacher is a fixed distribution at every state, the costs before a token do not depend on it, and
credit_span="future" is the exact gradient of each rollout's expected cost. What a rollout does to its siblings'
teachers is not part of that cost: the siblings are held fixed, as problems are.

A baseline over the same siblings is not quite free: their costs were taken under teachers that may have been shown this
rollout. Without bias are the baselines moving_average and none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from distil_kernels.train.models.reading import Reader
from distil_kernels.train.tasks import Feedback, Problem

Said = tuple[str, Feedback]
"""An answer, and what the verifier says of it alone."""
Say = Callable[[Reader, Sequence[Problem], Sequence[Sequence[Said]], int], list[list[Feedback]]]
"""(student, problems, the answers to each, count) -> feedback to the first `count` answers to each problem."""


def as_verified(
    student: Reader, problems: Sequence[Problem], answers: Sequence[Sequence[Said]], count: int
) -> list[list[Feedback]]:
    """What the verifier says is all."""
    return [[feedback for _, feedback in own[:count]] for own in answers]


def from_siblings(
    student: Reader, problems: Sequence[Problem], answers: Sequence[Sequence[Said]], count: int
) -> list[list[Feedback]]:
    """One right answer of the others to the same problem, drawn from torch's global generator; empty without any."""
    return [[_another([feedback for _, feedback in own], index) for index in range(count)] for own in answers]


def _another(group: list[Feedback], own: int) -> Feedback:
    score = group[own].score
    right = [feedback for index, feedback in enumerate(group) if index != own and feedback.score >= 1.0]
    return right[int(torch.randint(len(right), ()))]._replace(score=score) if right else Feedback(score, "", "")
