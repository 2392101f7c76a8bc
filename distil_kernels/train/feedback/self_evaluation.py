"""The model's own critique of its answer as feedback: the student judges first, its teacher reads what it said.

    Q: 51, 76, 16, 67              or, in the chat layout,   question / its answer / JUDGE
    A: 67
    Feedback:                      <- the student, as it is now, goes on greedily and without gradient

The score is still the task's, for the log. The critique is computed from the rollout, so the whole sequence's cost is
the exact credit, as for a trace; the critique's own words are no actions, and get none. A critique that is empty, or
whose prompt is over the limit, leaves its rollout out of distillation.
"""

from __future__ import annotations

from collections.abc import Sequence

from distil_kernels.train.batches import unique
from distil_kernels.train.feedback.kinds import Prompts
from distil_kernels.train.feedback.siblings import Said
from distil_kernels.train.models.reading import Reader
from distil_kernels.train.rollouts.sampling import Sampling, sample
from distil_kernels.train.tasks import Feedback, Problem

BATCH_ROWS = 128


class Critic:
    """Called as `siblings.Say` says; critiques have at most `max_tokens` tokens."""

    def __init__(self, prompts: Prompts, max_tokens: int) -> None:
        self._prompts = prompts
        self._sampling = Sampling(max_tokens, prompts.stop_ids(), temperature=0.0)

    def __call__(
        self, student: Reader, problems: Sequence[Problem], answers: Sequence[Sequence[Said]], count: int
    ) -> list[list[Feedback]]:
        asked = [
            self._prompts.critic(problem, text)
            for problem, own in zip(problems, answers, strict=True)
            for text, _ in own[:count]
        ]
        different, rows = unique([prompt for prompt in asked if prompt])
        critiques: list[str] = []
        for begin in range(0, len(different), BATCH_ROWS):
            batch = different[begin : begin + BATCH_ROWS]
            done = sample(student, batch, range(len(batch)), self._sampling).completions
            critiques += [self._prompts.answer(tokens).strip() for tokens in done]
        row = iter(rows)
        texts = iter([critiques[next(row)] if prompt else "" for prompt in asked])
        return [[Feedback(feedback.score, next(texts), "") for _, feedback in own[:count]] for own in answers]
