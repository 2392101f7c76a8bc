"""The loss of one micro-batch: hidden states of both models at the completion tokens, into `fused_distil_loss`.

    L = (1 / normalizer) sum_t H(teacher_t, student_t),  differentiated as an expectation over the rollouts

Only completion rows are computed. The normalizer is the batch's number of rollouts, so that micro-batches add up to
the batch whatever their sizes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distil_kernels import fused_distil_loss
from distil_kernels.hf import CausalLM
from distil_kernels.train.config import Config
from distil_kernels.train.teacher import Teacher


class Sums(NamedTuple):
    """Sums over completion tokens, on the device, to be divided by `tokens` when logged."""

    tokens: int
    totals: Tensor
    """[len(SUMMED)] float64."""
    sequence_teacher_logprob: Tensor
    """[B], of each completion under the teacher."""


SUMMED = ("cost", "ce", "kl", "reverse_kl", "entropy", "teacher_entropy", "agree", "abs_credit")


def distil_loss(
    student: CausalLM,
    student_hidden: Tensor,
    teacher: Teacher,
    teacher_hidden: Tensor,
    completions: Sequence[list[int]],
    config: Config,
    normalizer: float,
) -> tuple[Tensor, Sums]:
    """Loss [] and what is logged of it; hidden states are [N, D], packed completion after completion."""
    tokens = torch.tensor([token for done in completions for token in done], device=student_hidden.device)
    cu_seqlens = torch.tensor([0, *map(len, completions)]).cumsum(0)
    teacher_weight, teacher_bias = teacher.head
    out = fused_distil_loss(
        student_hidden,
        student.weight,
        teacher_hidden.to(student_hidden.dtype),
        teacher_weight,
        student_bias=student.bias,
        teacher_bias=teacher_bias,
        temperature=config.temperature,
        teacher_temperature=config.teacher_temperature,
        logit_softcap=student.softcap,
        tokens=tokens,
        cu_seqlens=cu_seqlens,
        cost=config.cost,
        credit_span=config.credit_span,
        discount=config.discount,
        baseline=None if config.baseline == "none" or config.credit_span == "none" else config.baseline,
        group_size=config.rollouts_per_prompt,
        credit_scale=config.credit_scale,
        normalizer=normalizer,
        backend=config.backend,
        plan=config.plan,
    )
    stats = out.stats
    cost = stats.ce if config.cost == "ce" else stats.kl
    rows = (cost, *(getattr(stats, name) for name in SUMMED[1:-1]), out.credit.abs())
    totals = torch.stack([row.to(torch.float64).sum() for row in rows])
    index = torch.repeat_interleave(torch.arange(len(completions)), cu_seqlens.diff()).to(tokens.device)
    per_sequence = torch.zeros(len(completions), dtype=torch.float64, device=tokens.device)
    per_sequence.index_add_(0, index, stats.teacher_logprob.to(torch.float64))
    return out.loss, Sums(tokens.numel(), totals, per_sequence)


def means(sums: Sequence[Sums]) -> dict[str, float]:
    """Per-token means over micro-batches, and the weight of the credit beside the cost it stands for."""
    num_tokens = sum(part.tokens for part in sums)
    totals = torch.stack([part.totals for part in sums]).sum(0).tolist()
    mean = {name: total / num_tokens for name, total in zip(SUMMED, totals, strict=True)}
    mean["credit_to_cost"] = mean.pop("abs_credit") / mean["cost"] if mean["cost"] > 0 else math.nan
    return mean
