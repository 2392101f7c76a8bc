"""The public ops: what users call. (The custom ops behind them, with their gradients, are in `ops`.)

    fused_forward_ce   H(T, S) of each token, reduced                     gradients in the forward pass, or kept
    token_stats        everything per token; ce and logprob differentiable    gradients kept, or logits computed again
    fused_distil_loss  sequences with credit for future disagreement      gradients in the forward pass, reverse time

What costs other than H(T, S) add is in `losses`, the loss without a teacher in `policy`.

H(T, S) = logsumexp(s) - sum_v T_v s_v with s, t the logits (hidden @ weight^T + bias, softcapped, over temperature),
T = softmax(t), S = softmax(s). The mathematics is in docs/mathematics.md, the plans in `plan`, the loop in `driver`.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypedDict, overload

import torch
from torch import Tensor

from distil_kernels.backends import FORWARD_CE, Cost, Statistic
from distil_kernels.call import Call
from distil_kernels.checks import Door
from distil_kernels.credit import Credit
from distil_kernels.plan import Plan

REDUCTIONS = ("mean", "sum", "none")
COSTS = {
    "ce": Statistic.FORWARD_CE,
    "kl": Statistic.FORWARD_KL,
    "reverse_kl": Statistic.REVERSE_KL,
    "jsd": Statistic.JSD,
}


class TokenStats(NamedTuple):
    """Per token, in nats; float32 (float64 for float64 inputs). S is the student, T the teacher, y the token.

    Rows that a mask leaves out hold 0 (False in `agree`).
    """

    ce: Tensor
    """H(T, S)."""
    kl: Tensor
    """KL(T || S), summed as a difference of logits: exact to rounding of its own size."""
    reverse_kl: Tensor
    """KL(S || T)."""
    logprob: Tensor
    """log S[y]."""
    teacher_logprob: Tensor
    """log T[y]."""
    entropy: Tensor
    """H(S)."""
    teacher_entropy: Tensor
    """H(T)."""
    lse: Tensor
    """logsumexp of the student's logits."""
    teacher_lse: Tensor
    """logsumexp of the teacher's logits."""
    agree: Tensor
    """bool: both have their largest logit at the same index."""


class DistilLoss(NamedTuple):
    """What `fused_distil_loss` returns."""

    loss: Tensor
    """Scalar; its gradient is the sequence-level gradient."""
    stats: TokenStats
    """Per token [N], detached."""
    cost: Tensor
    """[N], detached: what each token costs, without its weight."""
    credit: Tensor
    """[N], detached: the weight a_t that grad log S[y_t] got (before the division by `normalizer`)."""
    cost_to_go: Tensor
    """[N], detached: G_t, from which baselines for later batches can be made; 0 with span "none"."""
    dropped: Tensor
    """[N], detached: share of the sum of magnitudes of the row's logit gradient that `gradient_threshold` left out."""


class ForwardCE(NamedTuple):
    """What `fused_forward_ce` returns where it is asked for `return_dropped`."""

    loss: Tensor
    """Scalar."""
    dropped: Tensor
    """[...], detached: share of the sum of magnitudes of the row's logit gradient that `gradient_threshold` left out.
    """


@overload
def fused_forward_ce(*args: Any, return_dropped: Literal[True], **options: Any) -> ForwardCE: ...
@overload
def fused_forward_ce(*args: Any, return_dropped: Literal[False] = False, **options: Any) -> Tensor: ...
def fused_forward_ce(  # type: ignore[misc]  # the overloads leave the other arguments to this signature
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    token_mask: Tensor | None = None,
    token_weight: Tensor | None = None,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    logit_softcap: float | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    gradient_threshold: float = 0.0,
    return_dropped: bool = False,
    backend: str = "auto",
    plan: str | Plan = "auto",
) -> Tensor | ForwardCE:
    """Forward cross-entropy H(T, S) between teacher and student, without [tokens, vocab] logits for all tokens.

    Args:
        student_hidden: [..., D] last hidden states; float32, bfloat16, float16 or float64.
        student_weight: [V, D] lm_head of the student, same dtype.
        teacher_hidden: [..., D_T]; D_T and the dtype may differ from the student's.
        teacher_weight: [V, D_T]; None shares the student's head (and, without `teacher_bias`, its bias).
        student_bias, teacher_bias: [V].
        token_mask: [...] bool, True counts. Other rows are not read: they may hold anything.
        token_weight: [...] float, multiplies each token's cross-entropy. It gets no gradient.
        temperature: divides both models' logits, after bias and softcap. There is no temperature-squared factor.
        teacher_temperature: the teacher's own temperature; default `temperature`.
        logit_softcap: logits become softcap * tanh(logits / softcap) first, in both models.
        reduction: "none" gives [...]; "sum" the weighted sum; "mean" the weighted sum over `normalizer`.
        normalizer: denominator of "mean"; default the sum of counted weights (1 where that is 0). Pass one global
            value when accumulating gradients over micro-batches.
        gradient_threshold: entries of a row's logit gradient below this share of its largest magnitude, from 0 (off)
            to 1 (excluded), are left out of the gradients of hidden states and weight; the value and the gradient of
            the bias stay exact. The error is bounded in docs/mathematics.md. For float32 and bfloat16 on the CPU
            back end, with a scalar loss whose gradient is formed in the forward pass. It saves time where the model is
            sure of most tokens, and may take more memory than it saves (docs/performance.md).
        return_dropped: also return how much each row lost; for reductions "mean" and "sum".
        backend: "auto", "cuda", "triton", "cpu" or "reference".
        plan: "auto", a name of `distil_kernels.plan.PLANS`, or a `distil_kernels.plan.Plan` with sizes of its own.

    Returns:
        The loss, or ForwardCE with `return_dropped`.
        float32 (float64 for float64 inputs). Student tensors get gradients, teacher tensors never do. Without a
        counted token the value and the gradients are 0; without any token "none" is empty and the others are 0.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it.
        RuntimeError: `backend` was asked for by name and cannot run on these tensors.
    """
    return token_loss(
        "fused_forward_ce", FORWARD_CE, student_hidden, student_weight, teacher_hidden, teacher_weight,
        student_bias=student_bias, teacher_bias=teacher_bias, token_mask=token_mask, token_weight=token_weight,
        temperature=temperature, teacher_temperature=teacher_temperature, logit_softcap=logit_softcap,
        reduction=reduction, normalizer=normalizer, gradient_threshold=gradient_threshold,
        return_dropped=return_dropped, backend=backend, plan=plan,
    )  # fmt: skip


class LossOptions(TypedDict, total=False):
    """Options of a loss per token, as `fused_forward_ce` has them."""

    student_bias: Tensor | None
    teacher_bias: Tensor | None
    token_mask: Tensor | None
    token_weight: Tensor | None
    temperature: float
    teacher_temperature: float | None
    logit_softcap: float | None
    reduction: str
    normalizer: float | Tensor | None
    gradient_threshold: float
    return_dropped: bool
    backend: str
    plan: str | Plan


def token_loss(
    function: str,
    cost: Cost,
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    token_mask: Tensor | None = None,
    token_weight: Tensor | None = None,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    logit_softcap: float | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    gradient_threshold: float = 0.0,
    return_dropped: bool = False,
    backend: str = "auto",
    plan: str | Plan = "auto",
) -> Any:
    """`fused_forward_ce` for any cost; `function` begins the messages of what is wrong."""
    door = Door(function)
    door.one_of("reduction", reduction, REDUCTIONS)
    if normalizer is not None and reduction != "mean":
        door.value_error(f"normalizer is given with reduction={reduction!r}, expected reduction='mean'")
    door.threshold("gradient_threshold", gradient_threshold)
    if reduction == "none" and (gradient_threshold or return_dropped):
        door.value_error(
            f"gradient_threshold is {gradient_threshold} and return_dropped {return_dropped} with reduction='none', "
            "expected 'mean' or 'sum': the gradient of a row must be formed in the forward pass"
        )
    call = Call(door, student_hidden, student_weight, teacher_hidden, teacher_weight, student_bias, teacher_bias,
                 token_mask, token_weight, temperature, teacher_temperature, logit_softcap, backend)  # fmt: skip
    if reduction == "none":
        costs = call.differentiable_statistics(None, cost, plan, logprob_grad=False)[cost.statistic]
        weights = call.row_weight()
        return (costs if weights is None else costs * weights).reshape(student_hidden.shape[:-1])
    denominator = None if reduction == "sum" else call.denominator(door.normalizer(normalizer, student_hidden))
    found = call.scalar_loss(None, None, cost, Credit(span="none"), plan, gradient_threshold, denominator)
    return ForwardCE(found.total, found.dropped.reshape(student_hidden.shape[:-1])) if return_dropped else found.total


def token_stats(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor | None = None,
    *,
    tokens: Tensor,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    token_mask: Tensor | None = None,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    logit_softcap: float | None = None,
    backend: str = "auto",
    plan: str | Plan = "auto",
) -> TokenStats:
    """Everything that reinforcement learning by distillation needs per token, from one pass over the vocabulary.

    Args:
        tokens: [...] int64, the sampled tokens that the rows predict.
        Others as in `fused_forward_ce`.

    Returns:
        TokenStats, each field [...]. `ce` and `logprob` are differentiable with independent upstream gradients
        (plan "kept_gradient", or "recompute" where that would keep too much); the other fields are detached.

    Raises:
        As `fused_forward_ce`; ValueError for token ids outside the vocabulary (checked on the CPU).
    """
    door = Door("token_stats")
    call = Call(door, student_hidden, student_weight, teacher_hidden, teacher_weight, student_bias, teacher_bias,
                 token_mask, None, temperature, teacher_temperature, logit_softcap, backend)  # fmt: skip
    door.rows("tokens", tokens, student_hidden, "int64")
    statistics = call.differentiable_statistics(tokens.reshape(-1), FORWARD_CE, plan, logprob_grad=True)
    return _token_stats(statistics, student_hidden.shape[:-1])


def fused_distil_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor | None = None,
    *,
    tokens: Tensor,
    cu_seqlens: Tensor,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    token_mask: Tensor | None = None,
    token_weight: Tensor | None = None,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    logit_softcap: float | None = None,
    cost: str = "ce",
    jsd_weight: float = 0.5,
    credit_span: str = "future",
    discount: float = 1.0,
    horizon: int | None = None,
    normalize_by_remaining: bool = False,
    baseline: str | Tensor | None = None,
    group_size: int | None = None,
    credit_clip: float | None = None,
    credit_scale: float = 1.0,
    behaviour_logprobs: Tensor | None = None,
    importance_clip: float | None = None,
    normalizer: float | Tensor | None = None,
    gradient_threshold: float = 0.0,
    backend: str = "auto",
    plan: str | Plan = "auto",
) -> DistilLoss:
    """DistIL's sequence-level loss on sampled sequences: sum of token costs, credited back to earlier tokens.

    The gradient is sum_t [ w_t grad cost_t + a_t grad log S[y_t] ] / normalizer with
    a_t = credit_scale * (G_t - b_t) and G_t the discounted cost-to-go (design: `distil_kernels.credit`). With the
    defaults it is the unbiased gradient of E_{y ~ S}[sum_t cost_t] when the teacher's feedback does not depend on y.

    Args:
        student_hidden: [N, D] packed rows, the hidden states that predict `tokens`; others as in `fused_forward_ce`.
        tokens: [N] int64, sampled from the student at `temperature` with nothing cut off.
        cu_seqlens: [B + 1] int32 or int64, borders of the sequences. Keep it on the CPU.
        token_mask: [N] bool. Other rows (a tool's output) have neither cost nor credit, but keep their position.
        token_weight: [N] float, w_t: multiplies the token's cost, in the sum and in the credit of earlier tokens.
        cost: "ce" for H(T, S) (the paper) or "kl" for KL(T || S): the same local gradient, another credit; "reverse_kl"
            for KL(S || T); "jsd" for b KL(T || M) + (1 - b) KL(S || M) with M = b T + (1 - b) S.
        jsd_weight: b, between 0 and 1; its ends are the costs "kl" and "reverse_kl" and not limits of "jsd".
        credit_span: "none" (token-wise gradient), "future" (i > t), or "sequence": the whole sequence's cost for
            every token, exact when the feedback was computed from the rollout itself.
        discount: of the cost-to-go per token, 0 to 1; below 1 is biased. "sequence" takes 1 only.
        horizon: costs more than this many tokens on do not count, at least 1; biased. Not with "sequence".
        normalize_by_remaining: divides the cost-to-go by the number of counted tokens that it sums over, discounted
            alike: a mean cost per token, which does not grow with the length; biased. Not with "sequence".
        baseline: None; "leave_one_out": mean over the group's other sequences at the same position (0 after their
            end), unbiased; "position_mean": mean over all sequences alive there, its own included (with n of
            them the expected credit is (n - 1) / n of what it should be); or [N] values, unbiased where they do not
            depend on the row's own rollout.
        group_size: rollouts per prompt, consecutive in the packing; needed by "leave_one_out" (at least 2).
        credit_clip: bound of |a_t|, after baseline and scale; biased.
        credit_scale: multiplies the credit; 1 is the exact gradient.
        behaviour_logprobs: [N] float, for rollouts older than the student: log-probs of `tokens` under the policy that
            sampled them, at its temperature. Both terms of row t in the gradient (and `credit`) are multiplied by
            rho_t = S[y_t] / behaviour[y_t], itself without gradient; costs inside G_t and the loss's value are not.
            That is exact for sequences of one token and, with "future", where the policies differ at the last token
            only. Otherwise it is biased: states are met as often as the older policy met them, and with "sequence"
            later tokens are drawn as it drew them. An exact weight is a product over the tokens up to each cost (the
            whole sequence with "sequence"), whose variance grows with the length.
        importance_clip: bound of rho_t; biased. Without `behaviour_logprobs` an error.
        normalizer: denominator of loss and gradient; default B.
        gradient_threshold: as in `fused_forward_ce`.

    Returns:
        DistilLoss. Only `loss` is differentiable; its value is sum_t w_t cost_t / normalizer.

    Raises:
        As `fused_forward_ce`; ValueError for token ids outside the vocabulary (checked on the CPU) or borders that
        do not cover the rows.
    """
    door = Door("fused_distil_loss")
    call = Call(door, student_hidden, student_weight, teacher_hidden, teacher_weight, student_bias, teacher_bias,
                 token_mask, token_weight, temperature, teacher_temperature, logit_softcap, backend)  # fmt: skip
    door.packed(student_hidden, cu_seqlens)
    door.rows("tokens", tokens, student_hidden, "int64")
    door.one_of("cost", cost, tuple(COSTS))
    door.share("jsd_weight", jsd_weight)
    normalizer = door.normalizer(normalizer, student_hidden)
    door.threshold("gradient_threshold", gradient_threshold)
    credit = door.credit(
        student_hidden, credit_span, baseline, group_size, discount, horizon, normalize_by_remaining, credit_clip,
        credit_scale, importance_clip, behaviour_logprobs,
    )  # fmt: skip
    denominator = cu_seqlens.numel() - 1 if normalizer is None else normalizer
    found = call.scalar_loss(
        tokens, cu_seqlens, Cost(COSTS[cost], jsd_weight), credit, plan, gradient_threshold, denominator
    )
    stats = _token_stats(found.statistics.detach(), student_hidden.shape[:-1])
    costs = found.statistics.detach()[COSTS[cost]]
    weights, cost_to_go = found.credit.detach().unbind()
    return DistilLoss(found.total, stats, costs, weights, cost_to_go, found.dropped)


def _token_stats(statistics: Tensor, shape: torch.Size) -> TokenStats:
    def row(statistic: Statistic, source: Tensor) -> Tensor:
        return source[statistic].reshape(shape)

    still = statistics.detach()
    return TokenStats(
        ce=row(Statistic.FORWARD_CE, statistics),
        kl=row(Statistic.FORWARD_KL, still),
        reverse_kl=row(Statistic.REVERSE_KL, still),
        logprob=row(Statistic.LOGPROB, statistics),
        teacher_logprob=row(Statistic.TEACHER_LOGPROB, still),
        entropy=row(Statistic.ENTROPY, still),
        teacher_entropy=row(Statistic.TEACHER_ENTROPY, still),
        lse=row(Statistic.MAX_LOGIT, still) + row(Statistic.LOG_NORMALIZER, still),
        teacher_lse=row(Statistic.TEACHER_MAX_LOGIT, still) + row(Statistic.TEACHER_LOG_NORMALIZER, still),
        agree=row(Statistic.AGREE, still) != 0,
    )
