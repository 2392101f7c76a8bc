"""Losses per token between a teacher's and a student's whole distribution, without [tokens, vocab] logits.

    fused_forward_ce   H(T, S) = logsumexp(s) - sum_v T_v s_v      what DistIL minimises
    fused_forward_kl   KL(T || S) = H(T, S) - H(T)                 the same gradient, 0 where the models agree
    fused_reverse_kl   KL(S || T)                                  SDPO
    fused_jsd          b KL(T || M) + (1 - b) KL(S || M),  M = b T + (1 - b) S          OPSD

s, t are the logits (hidden @ weight^T + bias, softcapped, over temperature), T = softmax(t), S = softmax(s). A reduced
loss has its gradient formed in the forward pass; a loss per token keeps it, or forms the logits again (`plan`). The
sequence-level forms are in `distil`, the formulas in docs/mathematics.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict, overload

from torch import Tensor
from typing_extensions import Unpack  # comes with torch

from distil_kernels.backends import FORWARD_CE, Cost, Statistic
from distil_kernels.engine.call import Call
from distil_kernels.engine.checks import ArgumentChecks
from distil_kernels.engine.placements import on_many_devices
from distil_kernels.engine.plan import Plan

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

REDUCTIONS = ("mean", "sum", "none")


class ForwardCE(NamedTuple):
    """Result of `fused_forward_ce` with `return_dropped=True`."""

    loss: Tensor
    """Scalar."""
    dropped: Tensor
    """[...], detached: share of the sum of magnitudes of the row's logit gradient that `gradient_threshold` left out.
    """


class LossOptions(TypedDict, total=False):
    """Options of a loss per token: those of `fused_forward_ce`."""

    student_bias: Tensor | None
    teacher_bias: Tensor | None
    vocab_size: int | None
    vocab_group: ProcessGroup | None
    sequence_parallel: bool
    token_mask: Tensor | None
    token_weight: Tensor | None
    temperature: float
    teacher_temperature: float | None
    logit_softcap: float | None
    teacher_logit_softcap: float | None
    student_logit_scale: float
    teacher_logit_scale: float | None
    reduction: str
    normalizer: float | Tensor | None
    gradient_threshold: float
    return_dropped: bool
    detach_hidden: bool
    backend: str
    plan: str | Plan


@overload
def fused_forward_ce(*args: Any, return_dropped: Literal[True], **options: Any) -> ForwardCE: ...
@overload
def fused_forward_ce(*args: Any, return_dropped: Literal[False] = False, **options: Any) -> Tensor: ...
@on_many_devices  # type: ignore[misc]  # the overloads leave the other arguments to this signature
def fused_forward_ce(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    vocab_size: int | None = None,
    vocab_group: ProcessGroup | None = None,
    sequence_parallel: bool = False,
    token_mask: Tensor | None = None,
    token_weight: Tensor | None = None,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    logit_softcap: float | None = None,
    teacher_logit_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    gradient_threshold: float = 0.0,
    return_dropped: bool = False,
    detach_hidden: bool = False,
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
        vocab_size: V where the heads have more rows, also different numbers of them: rows from V on are padding that is
            not read, with a gradient of 0, and so are entries of their biases. Nothing is copied for it.
        vocab_group: process group whose members hold the heads in shards, rows in the order of their ranks (any numbers
            of them; padding comes last, and `vocab_size` is that of the whole). Hidden states, tokens, masks and
            options are the same in all members; one that differs, or an error in one, is an error in all. The teacher's
            head is cut as the student's, cut elsewhere (then its rows are exchanged in every call), or whole in each
            member. All get the same loss and statistics and the whole gradient of the hidden states, each that of its
            shard. Not with `gradient_threshold`.
        sequence_parallel: each member gives its own rows of the hidden states, as many as the others (in the order of
            the ranks), and gets the gradient of those. What else has a row per token stays whole.
        token_mask: [...] bool or integer; True or 1 counts. Other rows are not read: they may hold anything, and
            tokens of no vocabulary.
        token_weight: [...] float, multiplies each token's cross-entropy. It gets no gradient.
        temperature: divides both models' logits, after bias and softcap; from 1e-12 to 1e12, as the softcap. There is
            no temperature-squared factor.
        teacher_temperature: the teacher's own temperature; default `temperature`.
        logit_softcap: logits become softcap * tanh(logits / softcap) first, in both models; None or math.inf: they do
            not.
        teacher_logit_softcap: the teacher's own softcap; default `logit_softcap`. math.inf: the teacher has none.
        student_logit_scale: multiplies the student's logits before the softcap, bias included; from 1e-12 to 1e12.
        teacher_logit_scale: the teacher's own scale; default `student_logit_scale`.
        reduction: "none" gives [...]; "sum" the weighted sum; "mean" the weighted sum over `normalizer`.
        normalizer: denominator of "mean", a number of any type or a tensor with one element; default the sum of
            counted weights (1 where that is 0). Pass one global value when accumulating gradients over micro-batches;
            it may be 0 where nothing counts.
        gradient_threshold: entries of a row's logit gradient below this share of its largest magnitude, from 0 (off)
            to 1 (excluded), are left out of the gradients of hidden states and weight; the value and the gradient of
            the bias stay exact. The error is bounded in docs/mathematics.md. For float32 and bfloat16 on the CPU
            back end, with a scalar loss whose gradient is formed in the forward pass. It saves time where the model is
            sure of most tokens, and may take more memory than it saves (docs/performance.md).
        return_dropped: also return how much each row lost; for reductions "mean" and "sum".
        detach_hidden: the head alone learns. Without it, hidden states that need no gradient beside a head that does
            are an error: mostly they have lost it.
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
    return _token_loss(
        "fused_forward_ce", FORWARD_CE, student_hidden, student_weight, teacher_hidden, teacher_weight,
        student_bias=student_bias, teacher_bias=teacher_bias, vocab_size=vocab_size, token_mask=token_mask,
        token_weight=token_weight, temperature=temperature, teacher_temperature=teacher_temperature,
        logit_softcap=logit_softcap, teacher_logit_softcap=teacher_logit_softcap,
        student_logit_scale=student_logit_scale, teacher_logit_scale=teacher_logit_scale, reduction=reduction,
        normalizer=normalizer, gradient_threshold=gradient_threshold, return_dropped=return_dropped,
        vocab_group=vocab_group, sequence_parallel=sequence_parallel, detach_hidden=detach_hidden, backend=backend,
        plan=plan,
    )  # fmt: skip


@on_many_devices
def fused_forward_kl(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor | None = None,
    **options: Unpack[LossOptions],
) -> Any:
    """Forward KL divergence KL(T || S) of teacher and student, as exact as `TokenStats.kl`: 0 where they agree.

    Its gradient is that of the forward cross-entropy; the value lacks the teacher's entropy.

    Arguments, options, what is returned and raised: as `fused_forward_ce`.
    """
    heads = student_hidden, student_weight, teacher_hidden, teacher_weight
    return _token_loss("fused_forward_kl", Cost(Statistic.FORWARD_KL), *heads, **options)


@on_many_devices
def fused_reverse_kl(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor | None = None,
    **options: Unpack[LossOptions],
) -> Any:
    """Reverse KL divergence KL(S || T) of student and teacher, as exact as `TokenStats.kl`.

    Where the teacher's logit is -inf and the student's is not, the value is huge (about 1e30 times the student's
    probability there) and finite.

    Arguments, options, what is returned and raised: as `fused_forward_ce`.
    """
    heads = student_hidden, student_weight, teacher_hidden, teacher_weight
    return _token_loss("fused_reverse_kl", Cost(Statistic.REVERSE_KL), *heads, **options)


@on_many_devices
def fused_jsd(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor | None = None,
    *,
    jsd_weight: float = 0.5,
    **options: Unpack[LossOptions],
) -> Any:
    """Generalised Jensen-Shannon divergence b KL(T || M) + (1 - b) KL(S || M) with M = b T + (1 - b) S.

    Args:
        jsd_weight: b, above 0 and below 1. It goes to 0 with b (1 - b): the KL divergences are not its ends, they are
            `fused_forward_kl` and `fused_reverse_kl`.
        Others, what is returned and raised: as `fused_forward_ce`.
    """
    ArgumentChecks("fused_jsd").share("jsd_weight", jsd_weight)
    heads = student_hidden, student_weight, teacher_hidden, teacher_weight
    return _token_loss("fused_jsd", Cost(Statistic.JSD, jsd_weight), *heads, **options)


def _token_loss(
    function: str,
    cost: Cost,
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    vocab_size: int | None = None,
    vocab_group: ProcessGroup | None = None,
    sequence_parallel: bool = False,
    token_mask: Tensor | None = None,
    token_weight: Tensor | None = None,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    logit_softcap: float | None = None,
    teacher_logit_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    gradient_threshold: float = 0.0,
    return_dropped: bool = False,
    detach_hidden: bool = False,
    backend: str = "auto",
    plan: str | Plan = "auto",
) -> Any:
    """Computes `fused_forward_ce` for any cost; `function` begins the error messages."""
    checks = ArgumentChecks(function)
    checks.one_of("reduction", reduction, REDUCTIONS)
    if normalizer is not None and reduction != "mean":
        checks.value_error(f"normalizer is given with reduction={reduction!r}, expected reduction='mean'")
    checks.threshold("gradient_threshold", gradient_threshold)
    checks.flag("return_dropped", return_dropped)
    if reduction == "none" and (gradient_threshold or return_dropped):
        checks.value_error(
            f"gradient_threshold is {gradient_threshold} and return_dropped {return_dropped} with reduction='none', "
            "expected 'mean' or 'sum': the gradient of a row must be formed in the forward pass"
        )
    scalings = checks.scalings(
        temperature, logit_softcap, student_logit_scale, teacher_temperature, teacher_logit_softcap, teacher_logit_scale
    )
    call = Call(
        checks, scalings, backend, student_hidden, student_weight, teacher_hidden, teacher_weight,
        student_bias=student_bias, teacher_bias=teacher_bias, token_mask=token_mask, token_weight=token_weight,
        vocab_size=vocab_size, vocab_group=vocab_group, sequence_parallel=sequence_parallel,
        detach_hidden=detach_hidden,
    )  # fmt: skip

    # A loss per token: its upstream gradients come later.
    if reduction == "none":
        costs = call.differentiable_statistics(None, cost, plan)[cost.statistic]
        weights = call.row_weight()
        return (costs if weights is None else costs * weights).reshape(student_hidden.shape[:-1])

    # A reduced loss: its gradient is formed now.
    denominator = None if reduction == "sum" else call.denominator(checks.normalizer(normalizer, student_hidden))
    result = call.scalar_loss(cost, denominator, gradient_threshold=gradient_threshold, plan=plan)
    return (
        ForwardCE(result.total, result.dropped.reshape(student_hidden.shape[:-1])) if return_dropped else result.total
    )
