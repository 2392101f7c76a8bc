"""Which tokens of a batch learn from the teacher, which from rewards, and with what weight.

    loss = (1 / normalizer) sum_t [ d_b cost_t + reward_weight * -min(r A_b, clip(r) A_b) + reference_weight * k3_t ]

in one pass over the vocabulary. d_b, the weight of rollout b's distillation, is `distil_weight`, on its way to
`distil_weight_end`, times

    distil_on         1 where the rollout is of the outcome that is distilled, else 0 (SRPO, arXiv 2604.02288)
    question_weight   sqrt(p (1 - p)) with p the share of the problem's rollouts that are right (SC-SDPO, 2605.27765)

Both depend on the rollout's own outcome, and so on its tokens: with credit for later costs the gradient is then that
of the weighted cost as if its weight were given, which is biased. A rollout is right with a score of 1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from distil_kernels.train.config import Config
from distil_kernels.train.rollouts.packed_batch import PackedBatch, TokenMask


class Mixture(NamedTuple):
    """What a batch's loss has beside the costs of its tokens."""

    counted: TokenMask
    """Tokens that learn from the teacher, from rewards, or are held to the reference."""
    options: dict[str, Any]
    """Of the library's op."""

    @staticmethod
    def of(
        config: Config,
        batch: PackedBatch,
        distil_weight: float,
        behaviour_logprobs: Tensor | None,
        reference_logprobs: Tensor | None,
    ) -> Mixture:
        """Makes the record of a batch.

        Args:
            distil_weight: of this step.
            behaviour_logprobs, reference_logprobs: [N]; None for those of the student, and for no penalty.
        """
        device, options = batch.tokens.device, dict[str, Any]()
        weights = distil_weight * outcome_weights(batch.scores, batch.group_size, config)
        if config.reward_weight:
            advantages = group_advantages(batch.scores, batch.group_size, config.normalize_advantages)
            advantages *= of_outcome(batch.scores, config.reward_on)
            options |= {"advantages": advantages.to(device), "policy_weight": config.reward_weight}
            if behaviour_logprobs is not None:
                options["old_logprobs"] = behaviour_logprobs
        if reference_logprobs is not None:
            options |= {"reference_logprobs": reference_logprobs, "reference_weight": config.reference_weight}

        # Tokens that have a reward and no feedback count, and are not distilled.
        counted = batch.learns
        if config.reward_weight and batch.learns.values is not None:
            by_token = weights.to(device).repeat_interleave(batch.cu_seqlens.diff().to(device))
            options["distil_weight"] = by_token * batch.learns.values
            counted = batch.learns.either(batch.judged)
        elif (weights != 1.0).any():
            options["distil_weight"] = weights.to(device)
        return Mixture(counted, options)


def outcome_weights(scores: Tensor, group_size: int, config: Config) -> Tensor:
    """Returns the weight of each rollout's distillation [B] by its outcome and those of its problem.

    Args:
        scores: [B], NaN without a verdict: such a rollout counts as neither right nor wrong.
    """
    weights = of_outcome(scores, config.distil_on)
    if config.question_weight == "spread":
        right = (scores >= 1.0).to(scores.dtype).where(~scores.isnan(), torch.nan).unflatten(0, (-1, group_size))
        share = right.nanmean(1).nan_to_num(0.0)
        weights = weights * (share * (1.0 - share)).sqrt().repeat_interleave(group_size)
    return weights


def of_outcome(scores: Tensor, outcome: str) -> Tensor:
    """Returns 1 for each rollout [B] of an outcome ("all", "failed" or "succeeded"), else 0."""
    if outcome == "all":
        return torch.ones_like(scores)
    return (scores >= 1.0 if outcome == "succeeded" else scores < 1.0).to(scores.dtype)


def group_advantages(scores: Tensor, group_size: int, normalize: bool) -> Tensor:
    """[B] scores minus the mean of their group, over its rollouts with a verdict; 0 for those without (score NaN).

    `normalize` divides them by the group's standard deviation; they are 0 in a group of equal scores.
    """
    groups = scores.unflatten(0, (-1, group_size))
    has_verdict = ~groups.isnan()
    num_verdicts = has_verdict.sum(1, keepdim=True)
    mean = groups.nansum(1, keepdim=True) / num_verdicts.clamp(min=1)
    centred = torch.where(has_verdict, groups - mean, 0.0)
    if normalize:
        spread = (centred.square().sum(1, keepdim=True) / (num_verdicts - 1).clamp(min=1)).sqrt()
        centred = torch.where(spread > 0, centred / spread.clamp(min=1e-6), 0.0)
    return centred.flatten()
