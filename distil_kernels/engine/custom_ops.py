"""The custom ops that autograd and torch.compile see, each with its shapes (fake) and gradient.

    scalar_loss      forward: loss and, unless two passes are needed, its gradients; backward: `scaling`
    row_statistics   forward: statistics per row; backward: rows_backward (logits again), kept_backward, or a row scale
    policy_loss      forward: loss and its gradients; backward: `scaling`
    rows_backward, kept_backward have no gradient of their own: differentiating twice is an error

Arguments arrive checked, from the public ops. Gradients that nobody wants are tensors of size 0.
"""

from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from distil_kernels.backends import FORWARD_CE, NUM_STATISTICS, Cost, LogitTransform, Statistic
from distil_kernels.backends.dispatch import BACKENDS
from distil_kernels.engine import driver
from distil_kernels.engine.backward import input_gradients, scaled_gradients
from distil_kernels.engine.checks import check_tokens, sequence_lengths
from distil_kernels.engine.credit import Credit
from distil_kernels.engine.gemm import accumulation_dtype, operand_dtype
from distil_kernels.engine.gradients import Needs, grad_weight_dtype, row_stride
from distil_kernels.engine.kept_gradient import Kept, backward_of_kept, count_kept
from distil_kernels.engine.plan import Plan

# torch reads the annotations of a custom op at run time and knows Optional[Tensor], not Tensor | None.
# ruff: noqa: UP045


@torch.library.custom_op("distil_kernels::scalar_loss", mutates_args=())
def scalar_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Optional[Tensor],
    teacher_hidden: Tensor,
    teacher_weight: Optional[Tensor],
    teacher_bias: Optional[Tensor],
    tokens: Optional[Tensor],
    counted: Optional[Tensor],
    row_weight: Optional[Tensor],
    denominator: Optional[Tensor],
    cu_seqlens: Optional[Tensor],
    baseline_values: Optional[Tensor],
    behaviour_logprobs: Optional[Tensor],
    temperature: float,
    teacher_temperature: float,
    logit_softcap: Optional[float],
    cost: int,
    jsd_weight: float,
    credit_span: str,
    baseline: str,
    group_size: int,
    credit_numbers: list[float],
    gradient_threshold: float,
    backend: str,
    plan: str,
    chunk_rows: int,
    ring_rows: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss [], statistics [NUM_STATISTICS, N], credit [2, N], dropped [N], gradients of hidden, weight and bias)."""
    problem = make_problem(
        student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias,
        tokens, counted, temperature, teacher_temperature, logit_softcap, backend,
        Cost(Statistic(cost), jsd_weight), gradient_threshold, denominator,
    )  # fmt: skip
    if row_weight is None:
        row_weight = student_hidden.new_ones(problem.num_rows, dtype=problem.dtype)
    lengths = torch.tensor([problem.num_rows])
    if cu_seqlens is not None:
        lengths = sequence_lengths(cu_seqlens, problem.num_rows, group_size)
    result = driver.scalar_loss(
        problem,
        Plan(plan, chunk_rows, ring_rows),
        Needs(*needs),
        row_weight,
        Credit(credit_span, baseline_values if baseline == "values" else baseline or None, group_size,
               behaviour_logprobs, *credit_numbers),
        lengths,
    )  # fmt: skip
    return (result.loss, result.statistics, result.credit, result.dropped, *result.gradients)


@scalar_loss.register_fake
def _(student_hidden: Tensor, student_weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    dtype = accumulation_dtype(student_hidden.dtype)
    num_rows = student_hidden.shape[0]
    return (
        student_hidden.new_empty((), dtype=dtype),
        student_hidden.new_empty(NUM_STATISTICS, num_rows, dtype=dtype),
        student_hidden.new_empty(2, num_rows, dtype=dtype),
        student_hidden.new_empty(num_rows, dtype=dtype),
        *fake_gradients(student_hidden, student_weight, rest[-1], rest[-2]),
    )


def _scalar_loss_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    _, statistics, credit, dropped, *gradients = output
    ctx.mark_non_differentiable(statistics, credit, dropped, *gradients)
    ctx.set_materialize_grads(False)  # else backward begins with zeros of the size of dW
    ctx.save_for_backward(*gradients)
    ctx.weight_dtype, ctx.needs, ctx.num_inputs = inputs[1].dtype, inputs[-1], len(inputs)


scalar_loss.register_autograd(scaled_gradients, setup_context=_scalar_loss_context)


class PolicyLoss(NamedTuple):
    """The first outputs of `policy_loss`."""

    total: Tensor  # []
    statistics: Tensor  # [NUM_STATISTICS, N]
    surrogate: Tensor  # [N]
    clipped: Tensor  # [N] bool


@torch.library.custom_op("distil_kernels::policy_loss", mutates_args=())
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
    clip_low: Optional[float],
    clip_high: Optional[float],
    entropy_weight: float,
    temperature: float,
    logit_softcap: Optional[float],
    backend: str,
    plan: str,
    chunk_rows: int,
    ring_rows: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of PolicyLoss, then gradients of hidden, weight and bias."""
    problem = make_problem(
        student_hidden, student_weight, student_bias, None, None, None, tokens, counted, temperature, temperature,
        logit_softcap, backend, Cost(Statistic.ENTROPY), denominator=denominator,
    )  # fmt: skip
    if row_weight is None:
        row_weight = student_hidden.new_ones(problem.num_rows, dtype=problem.dtype)
    policy = driver.Policy(advantages, old_logprobs, clip_low, clip_high, entropy_weight)
    result = driver.policy_loss(
        problem, Plan(plan, chunk_rows, ring_rows), Needs(*needs), row_weight, policy
    )  # fmt: skip
    return (result.loss, result.statistics, result.surrogate, result.clipped, *result.gradients)


@policy_loss.register_fake
def _(student_hidden: Tensor, student_weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    dtype, num_rows = accumulation_dtype(student_hidden.dtype), student_hidden.shape[0]
    return (
        student_hidden.new_empty((), dtype=dtype),
        student_hidden.new_empty(NUM_STATISTICS, num_rows, dtype=dtype),
        student_hidden.new_empty(num_rows, dtype=dtype),
        student_hidden.new_empty(num_rows, dtype=torch.bool),
        *fake_gradients(student_hidden, student_weight, rest[-1], rest[-2]),
    )


policy_loss.register_autograd(scaled_gradients, setup_context=_scalar_loss_context)


@torch.library.custom_op("distil_kernels::row_statistics", mutates_args=())
def row_statistics(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Optional[Tensor],
    teacher_hidden: Optional[Tensor],
    teacher_weight: Optional[Tensor],
    teacher_bias: Optional[Tensor],
    tokens: Optional[Tensor],
    counted: Optional[Tensor],
    temperature: float,
    teacher_temperature: float,
    logit_softcap: Optional[float],
    cost: int,
    jsd_weight: float,
    backend: str,
    plan: str,
    chunk_rows: int,
    ring_rows: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(statistics [NUM_STATISTICS, N], hidden gradient for unit upstream [N, D], the fields of `kept.Kept`)."""
    problem = make_problem(
        student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias,
        tokens, counted, temperature, teacher_temperature, logit_softcap, backend, Cost(Statistic(cost), jsd_weight),
    )  # fmt: skip
    result = driver.rows_statistics(problem, Plan(plan, chunk_rows, ring_rows))
    return result.statistics, result.base_hidden, *result.kept


@row_statistics.register_fake
def _(student_hidden: Tensor, student_weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    dtype, (num_rows, _) = accumulation_dtype(student_hidden.dtype), student_hidden.shape
    tokens, plan = rest[4], rest[-4]
    num_kept, device_type = count_kept(plan, tokens), student_hidden.device.type
    kept_dtype = operand_dtype(student_hidden.dtype, device_type)
    return (
        student_hidden.new_empty(NUM_STATISTICS, num_rows, dtype=dtype),
        student_hidden.new_empty(student_hidden.shape if plan == "frozen_head" else 0),
        student_hidden.new_empty(
            num_kept, num_rows, row_stride(student_weight.shape[0], kept_dtype, device_type), dtype=kept_dtype
        ),
        student_hidden.new_empty(num_kept, num_rows, dtype=dtype),
    )


def _row_statistics_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    statistics, base_hidden, *kept = output
    ctx.mark_non_differentiable(base_hidden, *kept)
    ctx.set_materialize_grads(False)  # else backward begins with zeros of the size of `kept`
    *rest, backend, plan, chunk_rows, ring_rows, needs = inputs
    tensors, ctx.settings = rest[:-5], rest[-5:]  # temperatures, softcap, cost and its weight
    # No more than backward reads: a teacher's states may be an inference tensor, or overwritten by then.
    num_read = {"kept_gradient": 2, "frozen_head": 0}.get(plan, len(tensors))
    ctx.save_for_backward(*tensors[:num_read], statistics, base_hidden, *kept)
    ctx.backend = backend
    ctx.plan, ctx.chunk_rows, ctx.ring_rows = plan, chunk_rows, ring_rows
    ctx.needs, ctx.num_inputs = needs, len(inputs)


def _row_statistics_backward(ctx: Any, grad_statistics: Tensor | None, *_: Tensor) -> tuple:
    if grad_statistics is None:
        return (None,) * ctx.num_inputs
    *tensors, statistics, base_hidden, kept, rounding = ctx.saved_tensors
    cost = ctx.settings[-2]
    cost_weight, logprob_weight = grad_statistics[cost], grad_statistics[Statistic.LOGPROB]
    if ctx.plan == "frozen_head":
        gradients = scale_rows(base_hidden, cost_weight), base_hidden, base_hidden
    elif ctx.plan == "kept_gradient":
        upstream = torch.stack([cost_weight, logprob_weight][: kept.shape[0]])
        gradients = kept_backward(*tensors[:2], kept, rounding, upstream, ctx.chunk_rows, ctx.ring_rows, ctx.needs)
    else:
        gradients = rows_backward(
            *tensors, statistics, cost_weight, logprob_weight, *ctx.settings, ctx.backend,
            ctx.chunk_rows, ctx.ring_rows, ctx.needs,
        )  # fmt: skip
    return input_gradients(gradients, ctx.needs, ctx.num_inputs)


row_statistics.register_autograd(_row_statistics_backward, setup_context=_row_statistics_context)


@torch.library.custom_op("distil_kernels::scale_rows", mutates_args=())
def scale_rows(grad_hidden: Tensor, scale: Tensor) -> Tensor:
    """[N, D] times [N], in the dtype of the first."""
    return torch.mul(grad_hidden, scale[:, None], out=torch.empty_like(grad_hidden))


@scale_rows.register_fake
def _(grad_hidden: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(grad_hidden)


@torch.library.custom_op("distil_kernels::rows_backward", mutates_args=())
def rows_backward(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Optional[Tensor],
    teacher_hidden: Optional[Tensor],
    teacher_weight: Optional[Tensor],
    teacher_bias: Optional[Tensor],
    tokens: Optional[Tensor],
    counted: Optional[Tensor],
    statistics: Tensor,
    cost_weight: Tensor,
    logprob_weight: Tensor,
    temperature: float,
    teacher_temperature: float,
    logit_softcap: Optional[float],
    cost: int,
    jsd_weight: float,
    backend: str,
    chunk_rows: int,
    ring_rows: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of sum(cost_weight * cost + logprob_weight * logprob), weights [N]."""
    problem = make_problem(
        student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias,
        tokens, counted, temperature, teacher_temperature, logit_softcap, backend, Cost(Statistic(cost), jsd_weight),
    )  # fmt: skip
    sums = driver.rows_backward(
        problem, Plan("recompute", chunk_rows, ring_rows), Needs(*needs), statistics, cost_weight.contiguous(),
        None if tokens is None else logprob_weight.contiguous(),
    )  # fmt: skip
    gradients = sums.result()
    return gradients.hidden, gradients.weight.to(student_weight.dtype), gradients.bias


@rows_backward.register_fake
def _(student_hidden: Tensor, student_weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, bias = fake_gradients(student_hidden, student_weight, rest[-1])
    return hidden, weight.to(student_weight.dtype), bias


@torch.library.custom_op("distil_kernels::kept_backward", mutates_args=())
def kept_backward(
    student_hidden: Tensor,
    student_weight: Tensor,
    kept: Tensor,
    rounding: Tensor,
    upstream: Tensor,
    chunk_rows: int,
    ring_rows: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the sum over K and N of upstream [K, N] times what was kept (`kept.Kept`)."""
    plan = Plan("kept_gradient", chunk_rows, ring_rows)
    gradients = backward_of_kept(student_hidden, student_weight, plan, Needs(*needs), Kept(kept, rounding), upstream)
    return gradients.hidden, gradients.weight.to(student_weight.dtype), gradients.bias


@kept_backward.register_fake
def _(student_hidden: Tensor, student_weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, bias = fake_gradients(student_hidden, student_weight, rest[-1])
    return hidden, weight.to(student_weight.dtype), bias


def make_problem(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    tokens: Tensor | None,
    counted: Tensor | None,
    temperature: float,
    teacher_temperature: float,
    logit_softcap: float | None,
    backend: str,
    cost: Cost = FORWARD_CE,
    gradient_threshold: float = 0.0,
    denominator: Tensor | None = None,
) -> driver.Problem:
    check_tokens(tokens, counted, student_weight.shape[0])
    dtype = accumulation_dtype(student_hidden.dtype)

    def transform(bias: Tensor | None, own_temperature: float) -> LogitTransform:
        return LogitTransform(None if bias is None else bias.to(dtype).contiguous(), logit_softcap, own_temperature)

    return driver.Problem(
        student_hidden,
        student_weight,
        teacher_hidden,
        teacher_weight,
        transform(student_bias, temperature),
        transform(teacher_bias, teacher_temperature),
        None if tokens is None else tokens.contiguous(),
        counted,
        BACKENDS[backend],
        cost,
        gradient_threshold,
        denominator,
    )


def fake_gradients(
    student_hidden: Tensor, student_weight: Tensor, needs: list[bool], ring_rows: int = 0
) -> tuple[Tensor, ...]:
    dtype = accumulation_dtype(student_weight.dtype)
    return (
        student_hidden.new_empty(student_hidden.shape if needs[0] else 0),
        student_weight.new_empty(
            student_weight.shape if needs[1] else 0,
            dtype=grad_weight_dtype(student_weight, ring_rows, student_hidden.shape[0]),
        ),
        student_weight.new_empty(student_weight.shape[0] if needs[2] else 0, dtype=dtype),
    )
