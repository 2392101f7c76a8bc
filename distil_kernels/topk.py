"""Losses to a teacher of which only some tokens' log-probs are known: a remote expert, a saved file.

    fused_topk_ce            forward cross-entropy to K named tokens and one bucket of all others
    fused_topk_distil_loss   the sequence-level loss of `distil` to such a teacher

Everything that the teacher did not name is one bucket, so no mass is lost and nothing is claimed about its inside. The
formulas and the arithmetic of a row are in `engine.topk`; chunks, plans and credit are those of the other losses. The
rows are plain torch on every device. Left out: a loss per token with its own gradient, and other back ends.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distil_kernels.backends import Cost
from distil_kernels.backends.dispatch import BackendChoice
from distil_kernels.distil import COSTS, DistilLoss, distil_result
from distil_kernels.engine.call import Call
from distil_kernels.engine.checks import ArgumentChecks
from distil_kernels.engine.placements import on_many_devices
from distil_kernels.engine.term_checks import CLIP, checked_terms

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_PLAIN_TORCH = BackendChoice("reference", "losses to named tokens are plain torch on every device")


@on_many_devices
def fused_topk_ce(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    *,
    student_bias: Tensor | None = None,
    vocab_size: int | None = None,
    vocab_group: ProcessGroup | None = None,
    sequence_parallel: bool = False,
    token_mask: Tensor | None = None,
    token_weight: Tensor | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    detach_hidden: bool = False,
) -> Tensor:
    """Forward cross-entropy to the K tokens that a teacher named, and to one bucket of all others.

    Args:
        student_hidden: [..., D] last hidden states; float32, bfloat16, float16 or float64.
        student_weight: [V, D] lm_head, same dtype.
        teacher_ids: [..., K] int64, different tokens of the student's vocabulary; -1 where fewer are known.
        teacher_logprobs: [..., K] float, their natural log-probs under the teacher (what stands beside -1 is not read).
            Samples of a black box are such a distribution too: each token's share. A row's probabilities may sum to
            more than 1 by the rounding of two decimals (.5 %) and of their own dtype; they are not renormalised, and
            nothing is left for the other tokens.
        student_bias: [V].
        vocab_size, detach_hidden: as in `fused_forward_ce`.
        token_mask: [...] bool or integer; True or 1 counts. Other rows are not read: they may hold anything, and
            tokens of no vocabulary.
        token_weight: [...] float, multiplies each token's cross-entropy. It gets no gradient.
        temperature, logit_softcap, student_logit_scale: of the student, as in `fused_forward_ce`; the teacher's
            log-probs stay as they are.
        reduction: "sum" the weighted sum; "mean" the weighted sum over `normalizer`.
        normalizer: denominator of "mean", as in `fused_forward_ce`.

    Returns:
        [] float32 (float64 for float64 inputs), with gradients for hidden states, weight and bias.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it. Ids outside the vocabulary, a token that is
            named twice and log-probs of no distribution are refused on every device: on an NVIDIA GPU by an assertion
            there (`torch._assert_async`), for which nothing waits and after which the process has to end.
    """
    checks = ArgumentChecks("fused_topk_ce")
    checks.one_of("reduction", reduction, ("mean", "sum"))
    if normalizer is not None and reduction != "mean":
        checks.value_error(f"normalizer is given with reduction={reduction!r}, expected reduction='mean'")
    scalings = checks.scalings(temperature, logit_softcap, student_logit_scale)
    call = Call(
        checks, scalings, _PLAIN_TORCH, student_hidden, student_weight, student_bias=student_bias,
        token_mask=token_mask, token_weight=token_weight, vocab_size=vocab_size, vocab_group=vocab_group,
        sequence_parallel=sequence_parallel, detach_hidden=detach_hidden, has_teacher=False,
    )  # fmt: skip
    checks.named_tokens(student_hidden, teacher_ids, teacher_logprobs)
    denominator = None if reduction == "sum" else call.denominator(checks.normalizer(normalizer, student_hidden))
    return call.topk_loss(teacher_ids, teacher_logprobs, Cost(COSTS["ce"]), denominator).total


@on_many_devices
def fused_topk_distil_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    *,
    tokens: Tensor,
    cu_seqlens: Tensor,
    student_bias: Tensor | None = None,
    vocab_size: int | None = None,
    vocab_group: ProcessGroup | None = None,
    sequence_parallel: bool = False,
    token_mask: Tensor | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    cost: str = "ce",
    credit_span: str = "future",
    discount: float = 1.0,
    horizon: int | None = None,
    normalize_by_remaining: bool = False,
    baseline: str | Tensor | None = None,
    group_size: int | None = None,
    teacher_ratio_clip: float | None = None,
    credit_clip: float | None = None,
    credit_scale: float = 1.0,
    behaviour_logprobs: Tensor | None = None,
    importance_clip: float | None = None,
    distil_weight: float | Tensor = 1.0,
    advantages: Tensor | None = None,
    policy_weight: float | None = None,
    old_logprobs: Tensor | None = None,
    clip_low: float | None = CLIP,
    clip_high: float | None = CLIP,
    labels: Tensor | None = None,
    label_weight: float | None = None,
    label_smoothing: float = 0.0,
    z_loss_weight: float = 0.0,
    entropy_weight: float = 0.0,
    reference_logprobs: Tensor | None = None,
    reference_weight: float | None = None,
    normalizer: float | Tensor | None = None,
    detach_hidden: bool = False,
) -> DistilLoss:
    """`fused_distil_loss` for a teacher as `fused_topk_ce` knows it: K tokens and one bucket of all others.

    Args:
        student_hidden: [N, D] packed rows, the hidden states that predict `tokens`.
        teacher_ids, teacher_logprobs: [N, K] as in `fused_topk_ce`.
        cost: "ce", or "kl": that less the entropy of the teacher's K + 1 buckets.
        Others: as in `fused_distil_loss`.

    Returns:
        DistilLoss. In `stats` what K tokens do not tell is NaN: `reverse_kl`, `teacher_lse`, and `teacher_logprob` of
        a token that is not among them; `kl` and `teacher_entropy` are those of the buckets; `agree` is whether the
        likeliest named token is the student's likeliest.

    Raises:
        As `fused_topk_ce` and `fused_distil_loss`.
    """
    checks = ArgumentChecks("fused_topk_distil_loss")
    scalings = checks.scalings(temperature, logit_softcap, student_logit_scale)
    call = Call(
        checks, scalings, _PLAIN_TORCH, student_hidden, student_weight, student_bias=student_bias,
        token_mask=token_mask, vocab_size=vocab_size, vocab_group=vocab_group, sequence_parallel=sequence_parallel,
        detach_hidden=detach_hidden, has_teacher=False,
    )  # fmt: skip
    checks.one_of("cost", cost, ("ce", "kl"))
    normalizer = checks.normalizer(normalizer, student_hidden)
    checks.packed(student_hidden, cu_seqlens)
    checks.rows("tokens", tokens, student_hidden, "int64", optional=False)
    credit = checks.credit(
        student_hidden, credit_span, baseline, group_size, discount, horizon, normalize_by_remaining,
        teacher_ratio_clip, credit_clip, credit_scale, importance_clip, behaviour_logprobs,
    )  # fmt: skip
    terms = checked_terms(
        checks, student_hidden, tokens, cu_seqlens, distil_weight=distil_weight, advantages=advantages,
        policy_weight=policy_weight, old_logprobs=old_logprobs, clip_low=clip_low, clip_high=clip_high, labels=labels,
        label_weight=label_weight, label_smoothing=label_smoothing, z_loss_weight=z_loss_weight,
        entropy_weight=entropy_weight, reference_logprobs=reference_logprobs, reference_weight=reference_weight,
    )  # fmt: skip
    checks.named_tokens(student_hidden, teacher_ids, teacher_logprobs)
    denominator = call.denominator(normalizer, cu_seqlens.numel() - 1)
    result = call.topk_loss(
        teacher_ids, teacher_logprobs, Cost(COSTS[cost]), denominator, tokens=tokens, cu_seqlens=cu_seqlens,
        credit=credit, terms=terms,
    )  # fmt: skip
    distil = distil_result(result, COSTS[cost], terms)
    unknown = torch.full_like(distil.cost, torch.nan)
    return distil._replace(stats=distil.stats._replace(reverse_kl=unknown, teacher_lse=unknown))
