"""What a step of each objective would do to the reward, to first order, on the rollouts of one batch.

    r = d(policy-gradient loss) / d(hidden states)         its descent raises the expected reward
    g = d(objective) / d(hidden states)
    alignment = <g, r> / (|g| |r|)                         above 0: a descent step of the objective raises it too

Taken at the hidden states that predict the completions' tokens, where every objective has its rows: what the body
below makes of them is not in it. Three products with the head for each objective, no more memory than the loss.
Inner products over rows add up over micro-batches and processes.
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
from distil_kernels.train.objective import fused_loss, policy_loss, token_mask
from distil_kernels.train.teachers.local import Teacher
from distil_kernels.train.teachers.remote import RemoteTeacher, TopK

LOCAL, CREDITED = "forward_ce", "forward_ce_credit"
NAMES = (LOCAL, CREDITED, "reverse_kl", "jsd")
"""The objectives; all but CREDITED without credit for later costs."""


def inner_products(
    student: CausalLM,
    student_hidden: Tensor,
    teacher: Teacher | RemoteTeacher,
    taught: Tensor | TopK,
    completions: Sequence[list[int]],
    scores: Sequence[float],
    config: Config,
    average: PositionAverage,
    counts: Sequence[Sequence[bool]],
) -> Tensor:
    """[len(NAMES) + 1, 3] float64: <g, r>, <g, g>, <r, r> of each, and <c, r>, <c, c>, <r, r> of the credit alone.

    Arguments as in `objective.distil_loss`; scores are [B]. NaN for what the teacher cannot tell.
    """
    leaf = student_hidden.detach().requires_grad_()
    bias = None if student.bias is None else student.bias.detach()
    still = dataclasses.replace(student, weight=student.weight.detach(), bias=bias)

    def gradient(loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, leaf)[0].to(torch.float64)

    plain = dataclasses.replace(config, normalize_advantages=False, plan="auto")
    reward = gradient(policy_loss(still, leaf, completions, scores, plain, 1.0, counts)[0])
    mask = token_mask(counts, leaf.device)
    span = "future" if config.credit_span == "none" else config.credit_span
    found = {}
    for name in NAMES:
        if isinstance(taught, TopK) and name in ("reverse_kl", "jsd"):
            found[name] = torch.full_like(reward, math.nan)
            continue
        objective: Any = LOCAL if name == CREDITED else name
        asked = dataclasses.replace(plain, objective=objective, credit_span=span if name == CREDITED else "none")
        loss = fused_loss(
            still, leaf, teacher, taught, completions, asked, average, token_mask=mask, normalizer=1.0
        ).loss  # fmt: skip
        found[name] = gradient(loss)
    gradients = torch.stack([*found.values(), found[CREDITED] - found[LOCAL]]).flatten(1)
    reward = reward.flatten()
    return torch.stack([gradients @ reward, gradients.square().sum(1), reward.square().sum().expand(len(gradients))], 1)


def figures(products: Sequence[Tensor | None]) -> dict[str, float | None]:
    """What a record shows of all micro-batches' inner products: nothing where there are none, None where the reward or
    the teacher says nothing."""
    known = [each for each in products if each is not None]
    if not known:
        return {}
    total = torch.stack(known).sum(0)
    shown: dict[str, float | None] = {}
    for name, (both, own, reward) in zip(NAMES, total.tolist(), strict=False):
        size = math.sqrt(own * reward) if own * reward > 0 else 0.0
        shown[f"align_{name}"] = both / size if size > 0 else None
    local, credit = total[NAMES.index(LOCAL), 1].item(), total[-1, 1].item()
    shown["credit_to_local"] = math.sqrt(credit / local) if local > 0 else None
    return shown
