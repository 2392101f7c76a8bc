"""Rollouts of some prompt groups, packed for the models and the loss.

prompts          [[1, 2], [1, 3]]            prompt_index  [0, 0, 1, 1]
completions      [[5, 6], [7], [8], [9, 9]]
tokens           [5, 6, 7, 8, 9, 9]          cu_seqlens    [0, 2, 3, 4, 6]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from distil_kernels.train.rollouts.prompt_group import PromptGroup, Rollout


class TokenMask(NamedTuple):
    """Which of N packed tokens count."""

    values: Tensor | None
    """[N] bool; None if all of them count."""
    num_tokens: int
    """Number of tokens that count, known without reading `values` back from a GPU."""

    @staticmethod
    def of(flags: Sequence[bool], device: torch.device) -> TokenMask:
        return TokenMask(None if all(flags) else torch.tensor(flags, device=device), sum(flags))

    def either(self, other: TokenMask) -> TokenMask:
        """The tokens that count here or there."""
        if self.values is None or other.values is None:
            return self if self.values is None else other
        either = self.values | other.values
        return TokenMask(either, int(either.sum()))

    def apply(self, values: Tensor) -> Tensor:
        """Values [N], 0 where a token does not count."""
        return values if self.values is None else values * self.values


@dataclass(frozen=True)
class PackedBatch:
    """N tokens of B completions of U problems."""

    prompts: list[list[int]]
    """The student's prompts, one per problem."""
    prompt_index: list[int]
    """[B], the index in `prompts` of each completion."""
    teacher_prompts: list[list[int]]
    """The different prompts of the teacher. A rollout without feedback has the student's prompt, and no token of it
    `learns`."""
    teacher_prompt_index: list[int]
    """[B], the index in `teacher_prompts` of each completion."""
    completions: list[list[int]]
    """B non-empty lists of token ids."""
    tokens: Tensor
    """[N] int64, the completions one after another."""
    cu_seqlens: Tensor
    """[B + 1] int64 on the CPU: completion b is tokens[cu_seqlens[b]:cu_seqlens[b + 1]]."""
    judged: TokenMask
    """The tokens that have an advantage: sampled by the model and not observed, in a rollout with a verdict."""
    learns: TokenMask
    """The tokens that are distilled: sampled by the model, in a rollout with feedback."""
    behaviour_logprobs: Tensor | None
    """[N] float32 under the rollout server that sampled the tokens; None if the student sampled them."""
    scores: Tensor
    """[B] float32 on the CPU; NaN without a verdict."""
    group_size: int
    """Completions per problem."""

    @staticmethod
    def of(
        groups: Sequence[PromptGroup],
        device: torch.device,
        skip_first_tokens: int = 0,
        leaves_out: Callable[[Rollout], bool] = lambda rollout: False,
    ) -> PackedBatch:
        """Packs groups of equally many rollouts.

        Args:
            skip_first_tokens: of each completion, which are not distilled.
            leaves_out: whether nothing is learnt from a rollout.
        """
        pairs = [(group, rollout) for group in groups for rollout in group.rollouts]
        rollouts = [rollout for _, rollout in pairs]
        teacher_prompts, teacher_prompt_index = distinct(
            [rollout.teacher_prompt or group.prompt for group, rollout in pairs]
        )
        logprobs = [value for rollout in rollouts for value in rollout.logprobs or []]
        return PackedBatch(
            prompts=[group.prompt for group in groups],
            prompt_index=[index for index, group in enumerate(groups) for _ in group.rollouts],
            teacher_prompts=teacher_prompts,
            teacher_prompt_index=teacher_prompt_index,
            completions=[rollout.tokens for rollout in rollouts],
            tokens=torch.tensor([token for rollout in rollouts for token in rollout.tokens], device=device),
            cu_seqlens=torch.tensor([0, *(len(rollout.tokens) for rollout in rollouts)]).cumsum(0),
            judged=TokenMask.of(
                [
                    flag and rollout.feedback.has_verdict and not leaves_out(rollout)
                    for rollout in rollouts
                    for flag in rollout.by_model
                ],
                device,
            ),
            learns=TokenMask.of(
                [
                    flag and rollout.has_feedback and not leaves_out(rollout) and place >= skip_first_tokens
                    for rollout in rollouts
                    for place, flag in enumerate(rollout.by_model)
                ],
                device,
            ),
            behaviour_logprobs=torch.tensor(logprobs, device=device) if logprobs else None,
            scores=torch.tensor([rollout.feedback.score for rollout in rollouts]),
            group_size=len(rollouts) // len(groups),
        )

    @property
    def lengths(self) -> list[int]:
        """[B], the number of tokens of each completion."""
        return [len(completion) for completion in self.completions]


def distinct(token_lists: Sequence[list[int]]) -> tuple[list[list[int]], list[int]]:
    """The different ones of some lists in order of appearance, and for each list its index among them."""
    index: dict[tuple[int, ...], int] = {}
    positions = [index.setdefault(tuple(tokens), len(index)) for tokens in token_lists]
    return [list(tokens) for tokens in index], positions
