"""Gradients of the logits for unit upstream, kept until the upstream gradients are known (plan `kept_gradient`).

One output per row scales the results of its products: dh row by row, dW through the hidden states. Two outputs are
mixed first, chunk by chunk, into the operand of the same two products.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from distil_kernels.engine import gemm, memory
from distil_kernels.engine.gradients import Gradients, GradientSums, Needs, new_rows, row_stride
from distil_kernels.engine.plan import Plan

_MIX_BYTES = {"cpu": 6 * 2**20, "cuda": 128 * 2**20}
"""Of float32 between two kept gradients and their sum. On the CPU it stays in a cache: 32 rows of 49k took 13 ms of 300
where all rows took 111; on a GPU (not yet timed) it is what makes few launches."""


class Kept(NamedTuple):
    """Gradients of the logits for unit upstream of the cost and, with tokens, of the log-prob: K is 1 or 2, and 0 where
    the plan is not `kept_gradient`."""

    rows: Tensor  # [K, N, row_stride of V] in the dtype of the products' operands
    rounding: Tensor  # [K, N], what the sum of each row lost to it


def count_kept(plan_name: str, tokens: Tensor | None) -> int:
    """K of `Kept`."""
    if plan_name != "kept_gradient":
        return 0
    return 1 if tokens is None else 2


def new_kept(hidden: Tensor, vocab_size: int, num_kept: int, counted: Tensor | None) -> Kept:
    """Room for those of every row; rows that do not count are zeros."""
    dtype = gemm.operand_dtype(hidden.dtype, hidden.device.type)
    stride = row_stride(vocab_size, dtype, hidden.device.type)
    rows = memory.empty(num_kept, hidden.shape[0], stride, like=hidden, dtype=dtype)
    rows[:, :, vocab_size:] = 0
    if counted is not None:
        rows.zero_()
    return Kept(rows, hidden.new_zeros(num_kept, hidden.shape[0], dtype=gemm.accumulation_dtype(hidden.dtype)))


def backward_of_kept(
    student_hidden: Tensor, student_weight: Tensor, plan: Plan, needs: Needs, kept: Kept, upstream: Tensor
) -> Gradients:
    """Gradients of the sum over K and N of upstream [K, N] times what was kept."""
    num_rows, vocab_size = student_hidden.shape[0], student_weight.shape[0]
    rows = kept.rows[:, :, :vocab_size]
    if len(rows) == 1:
        sums = GradientSums(student_hidden, student_weight, needs, ring_rows=num_rows)
        sums.multiply(slice(0, num_rows), rows[0], upstream[0], kept.rounding[0])
        return sums.result()
    sums = GradientSums(student_hidden, student_weight, needs, plan.ring_rows)
    in_place = new_rows(student_hidden, 0 if plan.ring_rows else plan.chunk_rows, vocab_size, upstream.dtype)
    for begin in range(0, num_rows, plan.chunk_rows):
        chunk = slice(begin, min(begin + plan.chunk_rows, num_rows))
        part = rows[:, chunk]
        out = sums.room(part[0] if plan.ring_rows else in_place[: part.shape[1]])
        sums.add(chunk, out, _mix(Kept(part, kept.rounding[:, chunk]), upstream[:, chunk], out))
    return sums.result()


def _mix(kept: Kept, upstream: Tensor, out: Tensor) -> Tensor:
    """out [R, V] = the sum over K of upstream [K, R] times what was kept; returns what its rows lost to it, [R]."""
    rounding = (upstream * kept.rounding).sum(0)
    num_bytes = _MIX_BYTES.get(out.device.type, _MIX_BYTES["cuda"])
    step = max(1, num_bytes // (out.shape[1] * upstream.itemsize))
    for begin in range(0, out.shape[0], step):
        part = slice(begin, begin + step)
        first, second = kept.rows[:, part]
        exact = first * upstream[0, part, None]
        exact.addcmul_(second.to(exact.dtype), upstream[1, part, None])
        lost = gemm.round_rows(exact, out[part])
        if lost is not None:
            rounding[part] += lost
    return rounding
