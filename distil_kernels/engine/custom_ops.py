"""The custom ops that autograd and torch.compile see, each with its shapes (fake) and gradient.

    scalar_loss      forward: loss and, unless two passes are needed, its gradients; backward: `scaled_gradients`
    topk_loss        the same to a teacher of which some tokens' log-probs are known
    policy_loss      forward: loss and its gradients; backward: `scaled_gradients`
    row_statistics   forward: statistics per row; backward: rows_backward (logits again), kept_backward, or a row scale
    rows_backward, kept_backward have no gradient of their own: differentiating twice is an error, which `anchor`
    (`scaled_gradients.anchor_of`) brings about

An op takes its tensors, one `Spec` as text (under torch.compile without its numbers, which are `numbers`), the size of
the vocabulary (the heads may have more rows), and the rows of a chunk and of the staging buffer. Its arguments have
been checked by the public op. Gradients that are not needed are tensors of size 0.
"""

from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from distil_kernels.backends import NUM_STATISTICS, Statistic
from distil_kernels.engine import driver
from distil_kernels.engine.gemm import accumulation_dtype, operand_dtype
from distil_kernels.engine.gradients import Gradients, grad_weight_dtype, row_stride
from distil_kernels.engine.kept_gradient import KeptGradient, backward_of_kept, count_kept
from distil_kernels.engine.scaled_gradients import differentiable_once, input_gradients, scaled_gradients
from distil_kernels.engine.spec import Spec
from distil_kernels.engine.terms import NUM_TERMS, TermTensors
from distil_kernels.engine.topk import TopKInputs
from distil_kernels.engine.vocab_shards import Same, agree

# torch reads the annotations of a custom op at run time and knows Optional[Tensor], not Tensor | None.
# ruff: noqa: UP045

# A token_mask or a cu_seqlens on a GPU is read by the host inside the op, so torch.compile(mode="reduce-overhead") must
# not capture it in a CUDA graph. Older versions of torch have no such tag.
_OPTIONS: dict[str, Any] = {"tags": (torch.Tag.cudagraph_unsafe,)} if hasattr(torch.Tag, "cudagraph_unsafe") else {}


@torch.library.custom_op("distil_kernels::scalar_loss", mutates_args=(), **_OPTIONS)
def scalar_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Optional[Tensor],
    teacher_hidden: Optional[Tensor],
    teacher_weight: Optional[Tensor],
    teacher_bias: Optional[Tensor],
    tokens: Optional[Tensor],
    counted: Optional[Tensor],
    row_weight: Optional[Tensor],
    denominator: Optional[Tensor],
    cu_seqlens: Optional[Tensor],
    baseline_values: Optional[Tensor],
    behaviour_logprobs: Optional[Tensor],
    distil_weight: Optional[Tensor],
    advantages: Optional[Tensor],
    old_logprobs: Optional[Tensor],
    labels: Optional[Tensor],
    reference_logprobs: Optional[Tensor],
    numbers: Optional[Tensor],
    anchor: Optional[Tensor],
    *,
    spec: str,
    vocab_size: int,
    chunk_rows: int,
    staging_rows: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of `ScalarLoss`, then gradients of hidden, weight and bias."""
    record = Spec.decode(spec, numbers)
    inputs = driver.Inputs.of(
        record, record.plan_of(chunk_rows, staging_rows), vocab_size, student_hidden, student_weight, student_bias,
        teacher_hidden, teacher_weight, teacher_bias,
        tokens, counted, row_weight=row_weight, denominator=denominator, cu_seqlens=cu_seqlens,
        baseline_values=baseline_values, behaviour_logprobs=behaviour_logprobs,
        term_tensors=TermTensors(distil_weight, advantages, old_logprobs, labels, reference_logprobs),
    )  # fmt: skip
    result = driver.scalar_loss(inputs, inputs.plan)
    gradients = _declared(result.gradients, student_hidden, student_weight, staging_rows)
    return (result.loss, result.statistics, result.credit, result.dropped, result.terms, *gradients)


class ScalarLoss(NamedTuple):
    """First outputs of `scalar_loss` and `topk_loss`."""

    total: Tensor
    """[], sum of weighted costs over the denominator."""
    statistics: Tensor
    """[NUM_STATISTICS, N]."""
    credit: Tensor
    """[2, N], the weights a_t and the costs-to-go G_t."""
    dropped: Tensor
    """[N], share of each row's absolute gradient below the threshold."""
    terms: Tensor
    """[NUM_TERMS, N] values of the terms; [0, N] where the loss has none."""


def _fake_scalar_loss(
    student_hidden: Tensor, student_weight: Tensor, *_: Any, spec: str, staging_rows: int, **__: Any
) -> tuple[Tensor, ...]:
    dtype, record = accumulation_dtype(student_hidden.dtype), Spec.decode(spec)
    num_rows = student_hidden.shape[0]
    return (
        student_hidden.new_empty((), dtype=dtype),
        student_hidden.new_empty(NUM_STATISTICS, num_rows, dtype=dtype),
        student_hidden.new_empty(2, num_rows, dtype=dtype),
        student_hidden.new_empty(num_rows, dtype=dtype),
        student_hidden.new_empty(0 if record.terms is None else NUM_TERMS, num_rows, dtype=dtype),
        *_fake_gradients(student_hidden, student_weight, record, staging_rows),
    )


def _loss_context(ctx: Any, inputs: tuple, keyword_only_inputs: dict[str, Any], output: tuple) -> None:
    """Saves the gradients that the forward pass formed: the last three outputs; only the loss is differentiable."""
    _, *others = output
    *_, grad_hidden, grad_weight, grad_bias = output
    ctx.mark_non_differentiable(*others)
    ctx.set_materialize_grads(False)  # else backward begins with zeros of the size of dW
    _, student_weight, *_, anchor = inputs
    ctx.save_for_backward(grad_hidden, grad_weight, grad_bias, anchor)
    ctx.weight_dtype, ctx.num_inputs = student_weight.dtype, len(inputs)
    ctx.needs = Spec.decode(keyword_only_inputs["spec"]).needs


scalar_loss.register_fake(_fake_scalar_loss)
scalar_loss.register_autograd(scaled_gradients, setup_context=_loss_context)


@torch.library.custom_op("distil_kernels::topk_loss", mutates_args=(), **_OPTIONS)
def topk_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Optional[Tensor],
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    tokens: Optional[Tensor],
    counted: Optional[Tensor],
    row_weight: Optional[Tensor],
    denominator: Optional[Tensor],
    cu_seqlens: Optional[Tensor],
    baseline_values: Optional[Tensor],
    behaviour_logprobs: Optional[Tensor],
    distil_weight: Optional[Tensor],
    advantages: Optional[Tensor],
    old_logprobs: Optional[Tensor],
    labels: Optional[Tensor],
    reference_logprobs: Optional[Tensor],
    numbers: Optional[Tensor],
    anchor: Optional[Tensor],
    *,
    spec: str,
    vocab_size: int,
    chunk_rows: int,
    staging_rows: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of `ScalarLoss`, then gradients of hidden, weight and bias."""
    record = Spec.decode(spec, numbers)
    inputs = TopKInputs.of(
        record, record.plan_of(chunk_rows, staging_rows), vocab_size, student_hidden, student_weight, student_bias,
        None, None, None, tokens, counted,
        row_weight=row_weight, denominator=denominator, cu_seqlens=cu_seqlens, baseline_values=baseline_values,
        behaviour_logprobs=behaviour_logprobs, teacher_ids=teacher_ids, teacher_logprobs=teacher_logprobs,
        term_tensors=TermTensors(distil_weight, advantages, old_logprobs, labels, reference_logprobs),
    )  # fmt: skip
    result = driver.scalar_loss(inputs, inputs.plan)
    gradients = _declared(result.gradients, student_hidden, student_weight, staging_rows)
    return (result.loss, result.statistics, result.credit, result.dropped, result.terms, *gradients)


topk_loss.register_fake(_fake_scalar_loss)
topk_loss.register_autograd(scaled_gradients, setup_context=_loss_context)


@torch.library.custom_op("distil_kernels::policy_loss", mutates_args=(), **_OPTIONS)
def policy_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Optional[Tensor],
    tokens: Tensor,
    counted: Optional[Tensor],
    row_weight: Optional[Tensor],
    denominator: Optional[Tensor],
    advantages: Tensor,
    old_logprobs: Optional[Tensor],
    reference_logprobs: Optional[Tensor],
    numbers: Optional[Tensor],
    anchor: Optional[Tensor],
    *,
    spec: str,
    vocab_size: int,
    chunk_rows: int,
    staging_rows: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of `PolicyRows`, then gradients of hidden, weight and bias."""
    record = Spec.decode(spec, numbers)
    inputs = driver.Inputs.of(
        record, record.plan_of(chunk_rows, staging_rows), vocab_size, student_hidden, student_weight, student_bias,
        None, None, None, tokens, counted,
        row_weight=row_weight, denominator=denominator,
    )  # fmt: skip
    result = driver.policy_loss(inputs, inputs.plan, advantages, old_logprobs, reference_logprobs)
    gradients = _declared(result.gradients, student_hidden, student_weight, staging_rows)
    return (result.loss, result.statistics, result.surrogate, result.clipped, result.penalty, *gradients)


class PolicyRows(NamedTuple):
    """First outputs of `policy_loss`."""

    total: Tensor  # []
    statistics: Tensor  # [NUM_STATISTICS, N]
    surrogate: Tensor  # [N]
    clipped: Tensor  # [N] bool
    penalty: Tensor  # [N]


@policy_loss.register_fake
def _(
    student_hidden: Tensor, student_weight: Tensor, *_: Any, spec: str, staging_rows: int, **__: Any
) -> tuple[Tensor, ...]:
    dtype, num_rows = accumulation_dtype(student_hidden.dtype), student_hidden.shape[0]
    return (
        student_hidden.new_empty((), dtype=dtype),
        student_hidden.new_empty(NUM_STATISTICS, num_rows, dtype=dtype),
        student_hidden.new_empty(num_rows, dtype=dtype),
        student_hidden.new_empty(num_rows, dtype=torch.bool),
        student_hidden.new_empty(num_rows, dtype=dtype),
        *_fake_gradients(student_hidden, student_weight, Spec.decode(spec), staging_rows),
    )


policy_loss.register_autograd(scaled_gradients, setup_context=_loss_context)


@torch.library.custom_op("distil_kernels::row_statistics", mutates_args=(), **_OPTIONS)
def row_statistics(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Optional[Tensor],
    teacher_hidden: Optional[Tensor],
    teacher_weight: Optional[Tensor],
    teacher_bias: Optional[Tensor],
    tokens: Optional[Tensor],
    counted: Optional[Tensor],
    numbers: Optional[Tensor],
    anchor: Optional[Tensor],
    *,
    spec: str,
    vocab_size: int,
    chunk_rows: int,
    staging_rows: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(statistics [NUM_STATISTICS, N], hidden gradient for unit upstream [N, D], the fields of `KeptGradient`)."""
    record = Spec.decode(spec, numbers)
    inputs = driver.Inputs.of(
        record, record.plan_of(chunk_rows, staging_rows), vocab_size, student_hidden, student_weight, student_bias,
        teacher_hidden, teacher_weight, teacher_bias,
        tokens, counted,
    )  # fmt: skip
    result = driver.rows_statistics(inputs, inputs.plan)
    return result.statistics, result.base_hidden, *result.kept


@row_statistics.register_fake
def _(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    tokens: Tensor | None,
    counted: Tensor | None,
    numbers: Tensor | None,
    anchor: Tensor | None,
    *,
    spec: str,
    vocab_size: int,
    chunk_rows: int,
    staging_rows: int,
) -> tuple[Tensor, ...]:
    dtype, (num_rows, _) = accumulation_dtype(student_hidden.dtype), student_hidden.shape
    plan = Spec.decode(spec).plan_of(chunk_rows, staging_rows)
    num_kept, device_type = count_kept(plan, tokens), student_hidden.device.type
    kept_dtype = operand_dtype(student_hidden.dtype, device_type)
    return (
        student_hidden.new_empty(NUM_STATISTICS, num_rows, dtype=dtype),
        student_hidden.new_empty(student_hidden.shape if plan.is_frozen_head else 0),
        student_hidden.new_empty(num_kept, num_rows, row_stride(vocab_size, kept_dtype, device_type), dtype=kept_dtype),
        student_hidden.new_empty(num_kept, num_rows, dtype=dtype),
    )


def _row_statistics_context(ctx: Any, inputs: tuple, keyword_only_inputs: dict[str, Any], output: tuple) -> None:
    statistics, base_hidden, *kept = output
    ctx.mark_non_differentiable(base_hidden, *kept)
    ctx.set_materialize_grads(False)  # else backward begins with zeros of the size of `kept`
    ctx.spec, ctx.num_inputs = Spec.decode(keyword_only_inputs["spec"]), len(inputs)
    ctx.options = keyword_only_inputs
    ctx.plan = ctx.spec.plan_of(keyword_only_inputs["chunk_rows"], keyword_only_inputs["staging_rows"])

    # No more than backward reads: a teacher's states may be an inference tensor, or overwritten by then.
    *saved, anchor = inputs
    student_hidden, student_weight, *_, counted, _ = saved
    if ctx.plan.is_frozen_head:
        saved = []
    elif ctx.plan.keeps_gradient:
        saved = [student_hidden, student_weight, counted]
    ctx.save_for_backward(statistics, base_hidden, *kept, anchor, counted, *saved)


def _row_statistics_backward(ctx: Any, grad_statistics: Tensor | None, *_: Tensor) -> tuple:
    if grad_statistics is None:
        return (None,) * ctx.num_inputs
    statistics, base_hidden, kept_rows, residual, anchor, counted, *tensors = ctx.saved_tensors
    with torch.no_grad():
        upstream = torch.stack([grad_statistics[ctx.spec.cost.statistic], grad_statistics[Statistic.LOGPROB]])
        if counted is not None:  # other rows may hold anything
            upstream = torch.where(counted, upstream, 0.0)
        cost_weight, logprob_weight = upstream
        if ctx.plan.is_frozen_head:
            gradients = scale_rows(base_hidden, cost_weight), base_hidden, base_hidden
        elif ctx.plan.keeps_gradient:
            gradients = kept_backward(*tensors, kept_rows, residual, upstream[: kept_rows.shape[0]], **ctx.options)
        else:
            gradients = rows_backward(*tensors, statistics, cost_weight, logprob_weight, **ctx.options)
    once = differentiable_once(gradients, anchor, grad_statistics)
    return input_gradients(once, ctx.spec.needs, ctx.num_inputs)


row_statistics.register_autograd(_row_statistics_backward, setup_context=_row_statistics_context)


@torch.library.custom_op("distil_kernels::scale_rows", mutates_args=())
def scale_rows(grad_hidden: Tensor, scale: Tensor) -> Tensor:
    """[N, D] times [N], in the dtype of the first."""
    return torch.mul(grad_hidden, scale[:, None], out=torch.empty_like(grad_hidden))


@scale_rows.register_fake
def _(grad_hidden: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(grad_hidden)


@torch.library.custom_op("distil_kernels::rows_backward", mutates_args=(), **_OPTIONS)
def rows_backward(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Optional[Tensor],
    teacher_hidden: Optional[Tensor],
    teacher_weight: Optional[Tensor],
    teacher_bias: Optional[Tensor],
    tokens: Optional[Tensor],
    counted: Optional[Tensor],
    numbers: Optional[Tensor],
    statistics: Tensor,
    cost_weight: Tensor,
    logprob_weight: Tensor,
    *,
    spec: str,
    vocab_size: int,
    chunk_rows: int,
    staging_rows: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of sum(cost_weight * cost + logprob_weight * logprob), weights [N]."""
    record = Spec.decode(spec, numbers)
    inputs = driver.Inputs.of(
        record, record.plan_of(chunk_rows, staging_rows), vocab_size, student_hidden, student_weight, student_bias,
        teacher_hidden, teacher_weight, teacher_bias,
        tokens, counted,
    )  # fmt: skip
    sums = driver.rows_backward(
        inputs, inputs.plan, statistics, cost_weight.contiguous(),
        None if tokens is None else logprob_weight.contiguous(),
    )  # fmt: skip
    gradients = sums.result()
    return gradients.hidden, gradients.weight.to(student_weight.dtype), gradients.bias


@torch.library.custom_op("distil_kernels::kept_backward", mutates_args=(), **_OPTIONS)
def kept_backward(
    student_hidden: Tensor,
    student_weight: Tensor,
    counted: Optional[Tensor],
    kept_rows: Tensor,
    residual: Tensor,
    upstream: Tensor,
    *,
    spec: str,
    vocab_size: int,
    chunk_rows: int,
    staging_rows: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the sum over K and N of upstream [K, N] times the outputs whose gradients are kept."""
    record = Spec.decode(spec)
    plan, kept = record.plan_of(chunk_rows, staging_rows), KeptGradient(kept_rows, residual)
    if counted is not None:  # the products read every row: zeros of the kept gradients times what others may hold
        student_hidden = student_hidden.masked_fill(~counted[:, None], 0.0)
    shards = None
    if record.shards is not None:
        same: Same = {"the op": "kept_backward", "student_hidden": student_hidden, "the gradient of its rows": upstream}
        shards, plan, _ = agree(record.shards, plan, student_weight.shape[0], 0, same)
        vocab_size = shards.num_columns
    gradients = backward_of_kept(
        student_hidden, student_weight, vocab_size, plan, record.needs, kept, upstream, shards
    )  # fmt: skip
    return gradients.hidden, gradients.weight.to(student_weight.dtype), gradients.bias


@rows_backward.register_fake
@kept_backward.register_fake
def _(
    student_hidden: Tensor, student_weight: Tensor, *_: Any, spec: str, staging_rows: int, **__: Any
) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, bias = _fake_gradients(student_hidden, student_weight, Spec.decode(spec), staging_rows)
    return hidden, weight.to(student_weight.dtype), bias


def _declared(
    gradients: Gradients, student_hidden: Tensor, student_weight: Tensor, staging_rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns gradients in the dtypes of `_fake_gradients`: processes that share a vocabulary may agree on a smaller
    staging buffer than the one asked for, and then sum dW in another dtype."""
    hidden, weight, bias = gradients
    return hidden, weight.to(grad_weight_dtype(student_weight, staging_rows, student_hidden.shape[0])), bias


def _fake_gradients(
    student_hidden: Tensor, student_weight: Tensor, spec: Spec, staging_rows: int
) -> tuple[Tensor, ...]:
    """Returns tensors like the gradients that the driver sums."""
    dtype = accumulation_dtype(student_weight.dtype)
    return (
        student_hidden.new_empty(student_hidden.shape if spec.needs.hidden else 0),
        student_weight.new_empty(
            student_weight.shape if spec.needs.weight else 0,
            dtype=grad_weight_dtype(student_weight, staging_rows, student_hidden.shape[0]),
        ),
        student_weight.new_empty(student_weight.shape[0] if spec.needs.bias else 0, dtype=dtype),
    )
