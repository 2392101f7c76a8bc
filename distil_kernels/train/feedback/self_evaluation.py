"""The model's own critique of its answer as feedback: the student judges its answer, the teacher reads the judgement.

    Q: 51, 76, 16, 67              or, in the chat layout,   question / its answer / JUDGE
    A: 67
    Feedback:                      <- the student, as it is now, continues greedily and without gradient

The score is the task's, for the record. The critique is computed from the rollout, so the whole sequence's cost is the
exact credit, as for a trace; the words of the critique are no actions, and get no credit. A rollout whose critique is
empty, or whose prompt is over the limit, is left out of distillation.
"""

from __future__ import annotations

from collections.abc import Sequence

from distil_kernels.train.feedback.prompts import Prompts
from distil_kernels.train.models.reading import Reader
from distil_kernels.train.rollouts.packed_batch import distinct
from distil_kernels.train.rollouts.prompt_group import PromptGroup
from distil_kernels.train.rollouts.sampling import Sampling, generate
from distil_kernels.train.tasks import Feedback

BATCH_ROWS = 128


class SelfEvaluation:
    """A `FeedbackFn`; critiques have at most `max_tokens` tokens."""

    def __init__(self, prompts: Prompts, max_tokens: int) -> None:
        self._prompts = prompts
        self._sampling = Sampling(max_tokens, prompts.stop_ids(), temperature=0.0)

    def __call__(self, student: Reader, groups: Sequence[PromptGroup], count: int) -> list[list[Feedback]]:
        judged = [
            self._prompts.critic(group.problem, rollout.answer)
            for group in groups
            for rollout in group.rollouts[:count]
        ]
        # Equal answers to a problem are judged once.
        judge_prompts, judge_index = distinct([prompt for prompt in judged if prompt])
        critiques: list[str] = []
        for begin in range(0, len(judge_prompts), BATCH_ROWS):
            batch = judge_prompts[begin : begin + BATCH_ROWS]
            rollouts = generate(student, batch, range(len(batch)), self._sampling)
            critiques += [self._prompts.answer(rollout.tokens).strip() for rollout in rollouts]
        indices = iter(judge_index)
        texts = iter([critiques[next(indices)] if prompt else "" for prompt in judged])
        return [
            [Feedback(rollout.feedback.score, next(texts), "") for rollout in group.rollouts[:count]]
            for group in groups
        ]
