"""Gradients of the logits for unit upstream, stored until the upstream gradients are known (plan `kept_gradient`).

With one output per row, its upstream gradient scales the results of the products: dh row by row, dW through the hidden
states. With two outputs, their stored gradients are mixed first, chunk by chunk, into the operand of the same products.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from distil_kernels.engine import allocation, gemm
from distil_kernels.engine.gradients import Gradients, GradientSums, Needs, new_rows, row_stride
from distil_kernels.engine.plan import Plan
from distil_kernels.engine.vocab_shards import VocabShards

_MIX_BYTES = {"cpu": 6 * 2**20, "cuda": 128 * 2**20}
"""Size of the float32 scratch in which two stored gradients are mixed. On a CPU it should fit in cache: 32 rows of 49k
took 13 ms of 300, all rows at once took 111; on a GPU (not yet timed) a larger one needs few launches."""


class KeptGradient(NamedTuple):
    """Logit gradients for unit upstream of the cost and, with tokens, of the log-prob: K is 1 or 2 (0: other plans)."""

    rows: Tensor  # [K, N, row_stride of V] in the dtype of the products' operands
    residual: Tensor  # [K, N], what the sum of each row lost to rounding


def count_kept(plan: Plan, tokens: Tensor | None) -> int:
    """Returns K of `KeptGradient`."""
    if not plan.keeps_gradient:
        return 0
    return 1 if tokens is None else 2


def new_kept(hidden: Tensor, vocab_size: int, num_kept: int, counted: Tensor | None, num_columns: int) -> KeptGradient:
    """Allocates the gradients of every row; rows that do not count are zeros.

    Args:
        num_columns: V or more, of which the others are zeros.
    """
    dtype = gemm.operand_dtype(hidden.dtype, hidden.device.type)
    stride = row_stride(num_columns, dtype, hidden.device.type)
    rows = allocation.empty(num_kept, hidden.shape[0], stride, like=hidden, dtype=dtype)
    rows[:, :, vocab_size:] = 0
    if counted is not None:
        rows.zero_()
    residual = hidden.new_zeros(num_kept, hidden.shape[0], dtype=gemm.accumulation_dtype(hidden.dtype))
    return KeptGradient(rows, residual)


def backward_of_kept(
    student_hidden: Tensor,
    student_weight: Tensor,
    vocab_size: int,
    plan: Plan,
    needs: Needs,
    kept: KeptGradient,
    upstream: Tensor,
    shards: VocabShards | None = None,
) -> Gradients:
    """Returns the gradients of sum_k sum_n upstream [K, N] output [K, N] from the stored gradients of the outputs."""
    num_rows = student_hidden.shape[0]
    rows = kept.rows[:, :, :vocab_size]

    # One output: its stored rows are the operand of one product.
    if len(rows) == 1:
        sums = GradientSums(student_hidden, student_weight, vocab_size, needs, staging_rows=num_rows, shards=shards)
        sums.multiply(slice(0, num_rows), rows[0], upstream[0], kept.residual[0])
        return sums.result()

    # Two outputs: each chunk is mixed into the staging buffer, or into a scratch that is multiplied at once.
    sums = GradientSums(student_hidden, student_weight, vocab_size, needs, plan.staging_rows, shards=shards)
    scratch = new_rows(student_hidden, 0 if plan.staging_rows else plan.chunk_rows, vocab_size, upstream.dtype)
    for begin in range(0, num_rows, plan.chunk_rows):
        chunk = slice(begin, min(begin + plan.chunk_rows, num_rows))
        part = rows[:, chunk]
        out = sums.output_buffer(part[0] if plan.staging_rows else scratch[: part.shape[1]])
        sums.add(chunk, out, _mix(KeptGradient(part, kept.residual[:, chunk]), upstream[:, chunk], out))
    return sums.result()


def _mix(kept: KeptGradient, upstream: Tensor, out: Tensor) -> Tensor:
    """Computes out [R, V] = sum_k upstream [K, R] kept [K, R, V], and returns the residual [R] of its rows."""
    residual = (upstream * kept.residual).sum(0)
    num_bytes = _MIX_BYTES.get(out.device.type, _MIX_BYTES["cuda"])
    step = max(1, num_bytes // (out.shape[1] * upstream.itemsize))
    for begin in range(0, out.shape[0], step):
        part = slice(begin, begin + step)
        first, second = kept.rows[:, part]
        exact = first * upstream[0, part, None]
        exact.addcmul_(second.to(exact.dtype), upstream[1, part, None])
        part_residual = gemm.round_rows(exact, out[part])
        if part_residual is not None:
            residual[part] += part_residual
    return residual
