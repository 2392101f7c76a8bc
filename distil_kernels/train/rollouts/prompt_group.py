"""A rollout, and the group of rollouts that were sampled for one problem."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import NamedTuple

from distil_kernels.train.environments import Turn
from distil_kernels.train.tasks import Feedback, Problem

NO_FEEDBACK = Feedback(0.0, "", "")


class Outcome(NamedTuple):
    """What became of a rollout's episode."""

    turns: tuple[Turn, ...]
    reward: float | None
    """The sum of the rewards; None where the task's verifier scores the answer, NaN without a verdict."""
    is_finished: bool
    """The environment or the answer's own end has ended it, and no limit."""
    answer: str
    """The text that a verifier reads."""
    feedback: str
    """What the teacher reads of the episode."""


@dataclass
class Rollout:
    """One completion of a prompt, and what the verifier and the teacher add to it."""

    tokens: list[int]
    """Completion token ids. The stop token is the last one, unless the length limit cut the completion."""
    by_model: list[bool]
    """One entry per token: False where it was observed."""
    logprobs: list[float] | None = None
    """Log-probs of the tokens under the policy that sampled them, as a rollout server states them (0 for those
    that were observed). None: the current student sampled them."""
    answer: str = ""
    """The text that the verifier reads."""
    feedback: Feedback = NO_FEEDBACK
    """Score and feedback of this answer."""
    outcome: Outcome | None = None
    """Of a rollout in an environment."""
    teacher_prompt: list[int] | None = None
    """Token ids that the teacher reads before the completion. None: there is no verdict, or the feedback is empty or
    does not fit, and the rollout is masked out of distillation."""

    @staticmethod
    def sampled(tokens: list[int], logprobs: list[float] | None = None) -> Rollout:
        """A completion whose tokens are all the model's."""
        return Rollout(tokens, [True] * len(tokens), logprobs)

    @property
    def has_feedback(self) -> bool:
        return self.teacher_prompt is not None

    def is_truncated(self, stop_ids: Collection[int]) -> bool:
        """Whether the length limit cut it off: neither a token that ends an answer nor an environment ended it."""
        return self.tokens[-1] not in stop_ids and not (self.outcome is not None and self.outcome.is_finished)

    def append(self, other: Rollout) -> None:
        """Continues this completion by the tokens of another one, which has log-probs if this one has."""
        self.tokens = self.tokens + other.tokens
        self.by_model = self.by_model + other.by_model
        if self.logprobs is not None:
            self.logprobs = self.logprobs + (other.logprobs or [0.0] * len(other.tokens))


@dataclass
class PromptGroup:
    """One problem, its prompt, and the rollouts sampled for it."""

    problem: Problem
    prompt: list[int]
    """Token ids that the student reads."""
    rollouts: list[Rollout] = field(default_factory=list)
    record: Problem | None = None
    """The task's own problem, where an environment's first observation has taken its question's place."""

    def without_rollouts(self, prompt: list[int] | None = None) -> PromptGroup:
        """The same problem before any rollout, or with another prompt."""
        return PromptGroup(self.problem, prompt or self.prompt, [], self.record)
