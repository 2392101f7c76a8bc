"""The public ops: what users call. (The custom ops behind them, with their gradients, are in `ops`.)

    fused_forward_ce   H(T, S) of each token, reduced                     gradients in the forward pass, or kept
    token_stats        everything per token; ce and logprob differentiable    logits computed again in backward
    fused_distil_loss  sequences with credit for future disagreement      gradients in the forward pass, reverse time

H(T, S) = logsumexp(s) - sum_v T_v s_v with s, t the logits (hidden @ weight^T + bias, softcapped, over temperature),
T = softmax(t), S = softmax(s). The mathematics is in docs/mathematics.md, the plans in `plan`, the loop in `driver`.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from distil_kernels import ops
from distil_kernels.backends import Statistic
from distil_kernels.backends.dispatch import choose_backend
from distil_kernels.checks import Door
from distil_kernels.credit import Credit, known_in_order
from distil_kernels.gemm import accumulation_dtype
from distil_kernels.plan import Plan, Shape, choose_chunk_rows, choose_plan

REDUCTIONS = ("mean", "sum", "none")
COSTS = {"ce": Statistic.FORWARD_CE, "kl": Statistic.FORWARD_KL}


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
            back end, with a scalar loss whose gradient is formed in the forward pass.
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
    door = Door("fused_forward_ce")
    door.one_of("reduction", reduction, REDUCTIONS)
    door.normalizer(normalizer, student_hidden)
    if normalizer is not None and reduction != "mean":
        door.value_error(f"normalizer is given with reduction={reduction!r}, expected reduction='mean'")
    door.threshold("gradient_threshold", gradient_threshold)
    if reduction == "none" and (gradient_threshold or return_dropped):
        door.value_error(
            f"gradient_threshold is {gradient_threshold} and return_dropped {return_dropped} with reduction='none', "
            "expected 'mean' or 'sum': the gradient of a row must be formed in the forward pass"
        )
    call = _Call(door, student_hidden, student_weight, teacher_hidden, teacher_weight, student_bias, teacher_bias,
                 token_mask, token_weight, temperature, teacher_temperature, logit_softcap, backend)  # fmt: skip
    if reduction == "none":
        ce = call.differentiable_statistics(None, plan, logprob_grad=False)[Statistic.FORWARD_CE]
        weights = call.row_weight()
        return (ce if weights is None else ce * weights).reshape(student_hidden.shape[:-1])
    found = call.scalar_loss(None, None, Statistic.FORWARD_CE, Credit(span="none"), plan, gradient_threshold)
    loss = found.total if reduction == "sum" else found.total / call.denominator(normalizer)
    return ForwardCE(loss, found.dropped.reshape(student_hidden.shape[:-1])) if return_dropped else loss


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
        (backward computes the logits again: plan "recompute"); the other fields are detached.

    Raises:
        As `fused_forward_ce`; ValueError for token ids outside the vocabulary (checked on the CPU).
    """
    door = Door("token_stats")
    call = _Call(door, student_hidden, student_weight, teacher_hidden, teacher_weight, student_bias, teacher_bias,
                 token_mask, None, temperature, teacher_temperature, logit_softcap, backend)  # fmt: skip
    door.rows("tokens", tokens, student_hidden, "int64")
    statistics = call.differentiable_statistics(tokens.reshape(-1), plan, logprob_grad=True)
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
        cost: "ce" for H(T, S) (the paper) or "kl" for KL(T || S): the same local gradient, another credit.
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
    call = _Call(door, student_hidden, student_weight, teacher_hidden, teacher_weight, student_bias, teacher_bias,
                 token_mask, token_weight, temperature, teacher_temperature, logit_softcap, backend)  # fmt: skip
    door.packed(student_hidden, cu_seqlens)
    door.rows("tokens", tokens, student_hidden, "int64")
    door.one_of("cost", cost, tuple(COSTS))
    door.normalizer(normalizer, student_hidden)
    door.threshold("gradient_threshold", gradient_threshold)
    credit = door.credit(
        student_hidden, credit_span, baseline, group_size, discount, horizon, normalize_by_remaining, credit_clip,
        credit_scale, importance_clip, behaviour_logprobs,
    )  # fmt: skip
    found = call.scalar_loss(tokens, cu_seqlens, COSTS[cost], credit, plan, gradient_threshold)
    denominator = cu_seqlens.numel() - 1 if normalizer is None else normalizer
    stats = _token_stats(found.statistics.detach(), student_hidden.shape[:-1])
    weights, cost_to_go = found.credit.detach().unbind()
    return DistilLoss(found.total / denominator, stats, weights, cost_to_go, found.dropped)


class _ScalarLoss(NamedTuple):
    """Sum of weighted costs [], statistics [NUM_STATISTICS, N], credit and cost-to-go [2, N], dropped [N]."""

    total: Tensor
    statistics: Tensor
    credit: Tensor
    dropped: Tensor


class _Call:
    """Checked arguments of one call, rows flattened to [N]; autocast applied."""

    def __init__(
        self,
        door: Door,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor | None,
        student_bias: Tensor | None,
        teacher_bias: Tensor | None,
        token_mask: Tensor | None,
        token_weight: Tensor | None,
        temperature: float,
        teacher_temperature: float | None,
        logit_softcap: float | None,
        backend: str,
    ) -> None:
        self._door = door
        door.positive("temperature", temperature, optional=False)
        door.positive("teacher_temperature", teacher_temperature)
        door.positive("logit_softcap", logit_softcap)
        if isinstance(student_hidden, Tensor) and torch.is_autocast_enabled(student_hidden.device.type):
            # As for a linear layer: the products run in the autocast dtype; results stay float32.
            dtype = torch.get_autocast_dtype(student_hidden.device.type)
            student_hidden, student_weight = _cast(student_hidden, dtype), _cast(student_weight, dtype)
            teacher_hidden = _cast(teacher_hidden, dtype)
            teacher_weight = None if teacher_weight is None else _cast(teacher_weight, dtype)
        door.heads(student_hidden, student_weight, teacher_hidden, teacher_weight, student_bias, teacher_bias)
        door.rows("token_mask", token_mask, student_hidden, "bool")
        door.rows("token_weight", token_weight, student_hidden, "float")
        if teacher_weight is None and teacher_bias is None:
            teacher_bias = student_bias
        self._accumulation_dtype = accumulation_dtype(student_hidden.dtype)
        self._tensors = (
            student_hidden.reshape(-1, student_hidden.shape[-1]),
            student_weight,
            student_bias,
            teacher_hidden.detach().reshape(-1, teacher_hidden.shape[-1]),
            None if teacher_weight is None else teacher_weight.detach(),
            None if teacher_bias is None else teacher_bias.detach(),
        )
        self._counted = None if token_mask is None else token_mask.reshape(-1)
        self._token_weight = None if token_weight is None else token_weight.detach().reshape(-1)
        self._transform = (
            float(temperature),
            float(temperature if teacher_temperature is None else teacher_temperature),
            logit_softcap,
        )
        self._backend = choose_backend(backend, student_hidden.device, student_hidden.dtype).name
        grad_enabled = torch.is_grad_enabled()
        self._needs = [
            grad_enabled and tensor is not None and tensor.requires_grad
            for tensor in (student_hidden, student_weight, student_bias)
        ]

    def row_weight(self) -> Tensor | None:
        """[N] mask times weight, or None where every row counts once."""
        if self._token_weight is None:
            return None if self._counted is None else self._counted.to(self._accumulation_dtype)
        weight = self._token_weight.to(self._accumulation_dtype)
        return weight if self._counted is None else torch.where(self._counted, weight, 0.0)

    def denominator(self, normalizer: float | Tensor | None) -> float | Tensor:
        if normalizer is not None:
            return normalizer
        weight = self.row_weight()
        if weight is None:
            return max(self._tensors[0].shape[0], 1)
        total = weight.sum()
        return torch.where(total == 0, 1.0, total)

    def scalar_loss(
        self, tokens: Tensor | None, cu_seqlens: Tensor | None, cost: Statistic, credit: Credit, plan: str | Plan,
        gradient_threshold: float,
    ) -> _ScalarLoss:  # fmt: skip
        shape = self._shape(scalar=True, logprob_grad=credit.span != "none")
        in_order = True
        if cu_seqlens is not None:
            num_sequences = cu_seqlens.numel() - 1
            max_rows = plan.chunk_rows if isinstance(plan, Plan) else choose_chunk_rows(shape)
            in_order = known_in_order(credit, num_sequences, shape.num_rows, max_rows)
        chosen = choose_plan(shape, plan, credit_in_one_pass=in_order)
        if gradient_threshold:
            self._door.sparse_gradient(gradient_threshold, self._backend, shape.dtype, chosen.name)
        values = isinstance(credit.baseline, Tensor)
        total, statistics, weights, dropped, *_ = ops.scalar_loss(
            *self._tensors, tokens, self._counted, self.row_weight(), cu_seqlens,
            credit.baseline if values else None, credit.behaviour_logprobs, *self._transform, int(cost), credit.span,
            "values" if values else (credit.baseline or ""), credit.group_size, credit.numbers, gradient_threshold,
            self._backend, chosen.name, chosen.chunk_rows, chosen.ring_rows, self._needs,
        )  # fmt: skip
        return _ScalarLoss(total, statistics, weights, dropped)

    def differentiable_statistics(self, tokens: Tensor | None, plan: str | Plan, *, logprob_grad: bool) -> Tensor:
        """[NUM_STATISTICS, N]; gradients flow through FORWARD_CE and LOGPROB."""
        chosen = choose_plan(self._shape(scalar=False, logprob_grad=logprob_grad), plan)
        statistics, _, _ = ops.row_statistics(
            *self._tensors, tokens, self._counted, *self._transform,
            self._backend, chosen.name, chosen.chunk_rows, chosen.ring_rows, self._needs,
        )  # fmt: skip
        return statistics

    def _shape(self, *, scalar: bool, logprob_grad: bool) -> Shape:
        hidden, weight = self._tensors[:2]
        return Shape(
            hidden.shape[0], weight.shape[0], weight.shape[1], hidden.dtype, hidden.device.type, scalar, logprob_grad,
            grad_hidden=self._needs[0], grad_head=self._needs[1] or self._needs[2],
        )  # fmt: skip


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """As autocast does: float64 stays as it is."""
    if not isinstance(tensor, Tensor) or tensor.dtype == torch.float64 or not tensor.is_floating_point():
        return tensor
    return tensor.to(dtype)


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
