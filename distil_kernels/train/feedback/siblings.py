"""Demonstrations from siblings: a rollout's teacher reads another rollout of the same problem that scored full.

It never reads the rollout itself. A rollout without a right sibling is left out of distillation, even if it is right.
So the feedback to a rollout, and whether it gets any, is a function of its siblings alone. Given the siblings, the
teacher is a fixed distribution at every state, the costs before a token do not depend on it, and credit_span="future"
is the exact gradient of each rollout's expected cost. The effect of a rollout on its siblings' teachers is not part of
that cost: the siblings are held fixed, as problems are.

A baseline over the same siblings has a small bias: their costs were taken under teachers that may have read this
rollout. The baselines moving_average and none have no bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from distil_kernels.train.tasks import Feedback

if TYPE_CHECKING:
    from distil_kernels.train.models.reading import Reader
    from distil_kernels.train.rollouts.prompt_group import PromptGroup


def right_sibling(student: Reader, groups: Sequence[PromptGroup], count: int) -> list[list[Feedback]]:
    """A `FeedbackFn`: one of the other right answers, by torch's global generator; empty if there is none."""
    return [
        [_of_another([rollout.feedback for rollout in group.rollouts], index) for index in range(count)]
        for group in groups
    ]


def _of_another(verified: list[Feedback], index: int) -> Feedback:
    """The feedback of a right answer that is not the one at `index`, with the score of the one at `index`."""
    score = verified[index].score
    import torch  # late: the options read the table of kinds without it

    right = [feedback for other, feedback in enumerate(verified) if other != index and feedback.score >= 1.0]
    return right[int(torch.randint(len(right), ()))]._replace(score=score) if right else Feedback(score, "", "")
