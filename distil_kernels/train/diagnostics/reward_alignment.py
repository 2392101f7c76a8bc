"""The effect that a step of each objective would have on the reward, to first order, on the rollouts of one batch.

    r = d(policy-gradient loss) / d(hidden states)         its descent raises the expected reward
    g = d(objective) / d(hidden states)
    alignment = <g, r> / (|g| |r|)                         above 0: a descent step of the objective raises it too

The gradients are taken at the hidden states that predict the completions' tokens, which all objectives share; the body
below them is left out. Each objective costs three products with the head, and no more memory than the loss. Inner
products over rows add up over micro-batches and processes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from distil_kernels.hf import CausalLM
from distil_kernels.train.baseline import PositionAverage
from distil_kernels.train.config import Config
from distil_kernels.train.objective import fused_loss, policy_loss
from distil_kernels.train.rollouts.packed_batch import PackedBatch
from distil_kernels.train.teachers.base import Target, TopKTarget

LOCAL, CREDITED = "forward_ce", "forward_ce_credit"
NAMES = (LOCAL, CREDITED, "reverse_kl", "jsd")
"""The objectives. CREDITED alone has credit for later costs."""


def inner_products(
    student: CausalLM,
    student_hidden: Tensor,
    target: Target,
    batch: PackedBatch,
    config: Config,
    average: PositionAverage,
) -> Tensor:
    """[len(NAMES) + 1, 3] float64: <g, r>, <g, g>, <r, r> of each objective, and <c, r>, <c, c>, <r, r> of the credit.

    NaN for an objective that this target does not have. Arguments as of `objective.distil_loss`.
    """
    leaf = student_hidden.detach().requires_grad_()
    bias = None if student.bias is None else student.bias.detach()
    frozen_head_student = dataclasses.replace(student, weight=student.weight.detach(), bias=bias)
    # The student counts as the policy that sampled, also for rollouts of a server.
    batch = dataclasses.replace(batch, behaviour_logprobs=None)

    def gradient(loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, leaf)[0].to(torch.float64)

    plain = dataclasses.replace(config, normalize_advantages=False, plan="auto")
    reward = gradient(policy_loss(frozen_head_student, leaf, batch, plain, 1.0)[0])
    span = "future" if config.credit_span == "none" else config.credit_span
    by_name = {}
    for name in NAMES:
        if isinstance(target, TopKTarget) and name in ("reverse_kl", "jsd"):
            by_name[name] = torch.full_like(reward, math.nan)
            continue
        objective: Any = LOCAL if name == CREDITED else name
        settings = dataclasses.replace(plain, objective=objective, credit_span=span if name == CREDITED else "none")
        out = fused_loss(
            frozen_head_student, leaf, target, batch, settings, average, token_mask=batch.learns.values, normalizer=1.0
        )
        by_name[name] = gradient(out.loss)
    gradients = torch.stack([*by_name.values(), by_name[CREDITED] - by_name[LOCAL]]).flatten(1)
    reward = reward.flatten()
    return torch.stack([gradients @ reward, gradients.square().sum(1), reward.square().sum().expand(len(gradients))], 1)


def alignment_metrics(products: Sequence[Tensor | None]) -> dict[str, float | None]:
    """The metrics of a step from the inner products of all its micro-batches; none if they were not computed.

    An alignment is None if all rollouts have the same reward, or if the teacher does not have the objective.
    """
    known = [part for part in products if part is not None]
    if not known:
        return {}
    total = torch.stack(known).sum(0)
    metrics: dict[str, float | None] = {}
    for name, (with_reward, squared, reward_squared) in zip(NAMES, total.tolist(), strict=False):
        size = math.sqrt(squared * reward_squared) if squared * reward_squared > 0 else 0.0
        metrics[f"align_{name}"] = with_reward / size if size > 0 else None
    local, credit = total[NAMES.index(LOCAL), 1].item(), total[-1, 1].item()
    metrics["credit_to_local"] = math.sqrt(credit / local) if local > 0 else None
    return metrics
