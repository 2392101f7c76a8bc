"""A rollout, and the group of rollouts that were sampled for one problem."""

from __future__ import annotations

from dataclasses import dataclass, field

from distil_kernels.train.tasks import Feedback, Problem

NO_FEEDBACK = Feedback(0.0, "", "")


@dataclass
class Rollout:
    """One completion of a prompt, and what the verifier and the teacher add to it."""

    tokens: list[int]
    """Completion token ids. The stop token is the last one, unless the length limit cut the completion."""
    by_model: list[bool]
    """One entry per token: False where a tool inserted the token."""
    logprobs: list[float] | None = None
    """Log-probs of the tokens under the policy that sampled them, as a rollout server states them (0 for the tokens of
    a tool). None: the current student sampled them."""
    answer: str = ""
    """The text that the verifier reads."""
    feedback: Feedback = NO_FEEDBACK
    """Score and feedback of this answer."""
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
