"""Checks of the arguments of the terms that a loss has besides its cost (`terms`)."""

from __future__ import annotations

import math

from torch import Tensor

from distil_kernels.engine.checks import ArgumentChecks
from distil_kernels.engine.gemm import accumulation_dtype
from distil_kernels.engine.policy import Policy
from distil_kernels.engine.terms import TermInputs, Terms, TermTensors

CLIP = 0.2
"""Default of both clips."""


def checked_terms(
    checks: ArgumentChecks,
    student_hidden: Tensor,
    tokens: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    distil_weight: float | Tensor,
    advantages: Tensor | None,
    policy_weight: float | None,
    old_logprobs: Tensor | None,
    clip_low: float | None,
    clip_high: float | None,
    labels: Tensor | None,
    label_weight: float | None,
    label_smoothing: float,
    z_loss_weight: float,
    entropy_weight: float,
    reference_logprobs: Tensor | None,
    reference_weight: float | None,
) -> TermInputs:
    """Checks the arguments by their names, and returns the terms with their tensors."""
    checks.rows("old_logprobs", old_logprobs, student_hidden, "float")
    checks.rows("labels", labels, student_hidden, "int64")
    checks.rows("reference_logprobs", reference_logprobs, student_hidden, "float")
    checks.rows("advantages", advantages, student_hidden, "float", num_sequences=_num_sequences(cu_seqlens))
    for name, value in (("clip_low", clip_low), ("clip_high", clip_high)):
        if value is not None:
            checks.between(name, value, 0.0, 1.0 if name == "clip_low" else math.inf)
    weights = {"policy_weight": policy_weight, "label_weight": label_weight, "reference_weight": reference_weight}
    given = {name: value for name, value in weights.items() if value is not None}
    for name, value in (given | {"z_loss_weight": z_loss_weight, "entropy_weight": entropy_weight}).items():
        checks.between(name, value, -math.inf, math.inf)
    checks.between("label_smoothing", label_smoothing, 0.0, 1.0)

    # What belongs together, and what needs tokens.
    for owner, tensor, others in (
        ("advantages", advantages, {
            "policy_weight": policy_weight is not None, "old_logprobs": old_logprobs is not None,
            "clip_low": clip_low != CLIP, "clip_high": clip_high != CLIP,
        }),
        ("labels", labels, {"label_weight": label_weight is not None, "label_smoothing": label_smoothing != 0.0}),
        ("reference_logprobs", reference_logprobs, {"reference_weight": reference_weight is not None}),
    ):  # fmt: skip
        for name, is_given in others.items():
            if is_given and tensor is None:
                checks.value_error(f"{name} is given and {owner} is None, expected both")
        if tensor is not None and tokens is None and owner != "labels":
            checks.value_error(f"{owner} is given and tokens is None, expected the tokens that these belong to")

    weight = _distil_weight(checks, distil_weight, student_hidden, cu_seqlens)
    tensors = TermTensors(weight, *map(_detached, (advantages, old_logprobs, labels, reference_logprobs)))
    has_tensors = advantages is not None or labels is not None or reference_logprobs is not None
    if not has_tensors and z_loss_weight == 0.0 and entropy_weight == 0.0:
        return TermInputs(None, tensors)
    settings = Terms(
        policy=Policy(
            None if clip_low is None else float(clip_low),
            None if clip_high is None else float(clip_high),
            float(entropy_weight),
        ),
        policy_weight=1.0 if policy_weight is None else float(policy_weight),
        reference_weight=1.0 if reference_weight is None else float(reference_weight),
        label_weight=1.0 if label_weight is None else float(label_weight),
        label_smoothing=float(label_smoothing),
        z_loss_weight=float(z_loss_weight),
    )
    return TermInputs(settings, tensors)


def _distil_weight(
    checks: ArgumentChecks, value: float | Tensor, student_hidden: Tensor, cu_seqlens: Tensor | None
) -> Tensor | None:
    """Checks the weight of the cost, and returns it as [1], [B] or [N]; None for 1."""
    if isinstance(value, Tensor):
        if value.dim() == 0:
            checks.rows("distil_weight", value.expand(student_hidden.shape[:-1]), student_hidden, "float")
            return value.detach().reshape(1)
        checks.rows("distil_weight", value, student_hidden, "float", num_sequences=_num_sequences(cu_seqlens))
        return value.detach()
    checks.between("distil_weight", value, -math.inf, math.inf)
    if value == 1.0:
        return None
    return student_hidden.new_ones(1, dtype=accumulation_dtype(student_hidden.dtype)) * value


def _num_sequences(cu_seqlens: Tensor | None) -> int:
    return 1 if cu_seqlens is None else cu_seqlens.numel() - 1


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()
