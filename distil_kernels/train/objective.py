"""The loss of one micro-batch: hidden states of both models at the completion tokens, into `fused_distil_loss`.

    L = (1 / normalizer) sum_t H(teacher_t, student_t),  differentiated as an expectation over the rollouts

or another cost of the family, or, without a teacher, L = -(1 / normalizer) sum_t A log S[y_t] with the rollout's score
less its group's mean for A.

Only completion rows are computed. The normalizer is the batch's number of rollouts, so that micro-batches add up to
the batch whatever their sizes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distil_kernels import DistilLoss, fused_distil_loss, fused_policy_loss
from distil_kernels.hf import CausalLM
from distil_kernels.train.baseline import PositionAverage
from distil_kernels.train.config import Config
from distil_kernels.train.teacher import Teacher


class Sums(NamedTuple):
    """Sums over completion tokens, to be divided by `tokens` when logged."""

    tokens: int
    totals: Tensor
    """[len(SUMMED)] float64."""
    sequence_teacher_logprob: Tensor | None
    """[B], of each completion under the teacher, where there is one."""

    def on_cpu(self) -> Sums:
        by_sequence = self.sequence_teacher_logprob
        return Sums(self.tokens, self.totals.cpu(), None if by_sequence is None else by_sequence.cpu())


SUMMED = ("cost", "ce", "kl", "reverse_kl", "entropy", "teacher_entropy", "agree", "abs_credit")


def _cost(config: Config) -> str:
    return config.objective if config.objective in ("reverse_kl", "jsd") else config.cost


def fused_loss(
    student: CausalLM,
    student_hidden: Tensor,
    teacher: Teacher,
    teacher_hidden: Tensor,
    completions: Sequence[list[int]],
    config: Config,
    average: PositionAverage,
    **options: Any,
) -> DistilLoss:
    """The op with a run's settings; hidden states are [N, D], packed completion after completion."""
    lengths = [len(done) for done in completions]
    teacher_weight, teacher_bias = teacher.head
    baseline: str | Tensor | None = config.baseline
    if config.baseline == "none" or config.credit_span == "none":
        baseline = None
    elif config.baseline == "moving_average":
        baseline = average.values(lengths)
    return fused_distil_loss(
        student_hidden,
        student.weight,
        teacher_hidden.to(student_hidden.dtype),
        teacher_weight,
        student_bias=student.bias,
        teacher_bias=teacher_bias,
        temperature=config.temperature,
        teacher_temperature=config.teacher_temperature,
        logit_softcap=student.softcap,
        tokens=torch.tensor([token for done in completions for token in done], device=student_hidden.device),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0),
        cost=_cost(config),
        jsd_weight=config.jsd_weight,
        credit_span=config.credit_span,
        discount=config.discount,
        horizon=config.horizon or None,
        normalize_by_remaining=config.normalize_by_remaining,
        baseline=baseline,
        group_size=config.rollouts_per_prompt,
        credit_clip=config.credit_clip or None,
        credit_scale=config.credit_scale,
        backend=config.backend,
        **options,
    )


def distil_loss(
    student: CausalLM,
    student_hidden: Tensor,
    teacher: Teacher,
    teacher_hidden: Tensor,
    completions: Sequence[list[int]],
    config: Config,
    average: PositionAverage,
    normalizer: float,
    taught: Sequence[bool],
) -> tuple[Tensor, Sums]:
    """Loss [] and what is logged of it; `average` takes note of the costs-to-go.

    Completions that are not `taught` cost nothing and show as 0 in the sums.
    """
    lengths = [len(done) for done in completions]
    mask = None
    if not all(taught):
        mask = torch.tensor(taught).repeat_interleave(torch.tensor(lengths)).to(student_hidden.device)
    out = fused_loss(
        student, student_hidden, teacher, teacher_hidden, completions, config, average,
        normalizer=normalizer, plan=config.plan, token_mask=mask,
    )  # fmt: skip
    average.observe(out.cost_to_go, lengths)
    stats = out.stats
    rows = (out.cost, *(getattr(stats, name) for name in SUMMED[1:-1]), out.credit.abs())
    totals = torch.stack([row.to(torch.float64).sum() for row in rows])
    device = student_hidden.device
    index = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)
    per_sequence = torch.zeros(len(lengths), dtype=torch.float64, device=device)
    per_sequence.index_add_(0, index, stats.teacher_logprob.to(torch.float64))
    return out.loss, Sums(sum(lengths), totals, per_sequence)


def policy_loss(
    student: CausalLM,
    student_hidden: Tensor,
    completions: Sequence[list[int]],
    scores: Sequence[float],
    config: Config,
    normalizer: float,
) -> tuple[Tensor, Sums]:
    """As `distil_loss` for rollouts that are as old as the model, so that no ratio is clipped; scores are [B]."""
    lengths = torch.tensor([len(done) for done in completions])
    tokens = torch.tensor([token for done in completions for token in done], device=student_hidden.device)
    advantages = group_advantages(torch.tensor(scores), config.rollouts_per_prompt, config.normalize_advantages)
    per_token = advantages.repeat_interleave(lengths).to(student_hidden.device)
    out = fused_policy_loss(
        student_hidden, student.weight, tokens=tokens, advantages=per_token, student_bias=student.bias,
        temperature=config.temperature, logit_softcap=student.softcap, normalizer=normalizer, backend=config.backend,
        plan=config.plan,
    )  # fmt: skip
    totals = torch.full((len(SUMMED),), math.nan, dtype=torch.float64, device=student_hidden.device)
    totals[SUMMED.index("entropy")] = out.entropy.to(torch.float64).sum()
    return out.loss, Sums(tokens.numel(), totals, None)


def group_advantages(scores: Tensor, group_size: int, normalize: bool) -> Tensor:
    """[B] scores less their group's mean, over the group's standard deviation where asked; 0 where all are equal."""
    groups = scores.unflatten(0, (-1, group_size))
    centred = groups - groups.mean(1, keepdim=True)
    if normalize:
        spread = groups.std(1, keepdim=True)
        centred = torch.where(spread > 0, centred / spread.clamp(min=1e-6), 0.0)
    return centred.flatten()


def means(sums: Sequence[Sums]) -> dict[str, float]:
    """Per-token means over micro-batches of what the objective knows, and the weight of the credit beside its cost."""
    num_tokens = sum(part.tokens for part in sums)
    totals = torch.stack([part.totals for part in sums]).sum(0).tolist()
    mean = {name: total / num_tokens for name, total in zip(SUMMED, totals, strict=True) if not math.isnan(total)}
    if "abs_credit" in mean:
        mean["credit_to_cost"] = mean.pop("abs_credit") / mean["cost"] if mean["cost"] > 0 else math.nan
    return mean
