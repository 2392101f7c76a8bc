"""The three matrix products of an lm_head, with float32 results from operands of any precision.

Rounding logits to bfloat16 costs 2 to 20 % of the gradient once teacher and student are close, so no product here
rounds its result: float32 and float64 operands go to the vendor library as they are; half precision on CUDA asks it
for a float32 result; half precision on the CPU, where torch has no such product, is widened block by block of the
vocabulary (on processors without bfloat16 instructions that is also about six times faster than torch's own).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_WIDEN_BLOCK = 4096
"""Vocabulary entries widened at a time: 4096 x 576 floats are 9 MiB, and a product of that size runs at full speed."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def lm_head(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    """out [R, V] = hidden [R, D] @ weight [V, D]^T."""
    if hidden.dtype == weight.dtype == out.dtype:
        torch.mm(hidden, weight.t(), out=out)
    elif hidden.device.type == "cpu":
        wide = hidden.to(out.dtype)
        for block, weight_block in _widened(weight, out.dtype):
            torch.mm(wide, weight_block.t(), out=out[:, block])
    else:
        torch.mm(hidden, weight.t(), out_dtype=out.dtype, out=out)


def grad_hidden(grad_logits: Tensor, weight: Tensor) -> Tensor:
    """grad_logits [R, V] @ weight [V, D], in the accumulation dtype."""
    if grad_logits.dtype == weight.dtype == accumulation_dtype(weight.dtype):
        return grad_logits @ weight
    dtype = accumulation_dtype(weight.dtype)
    if grad_logits.device.type != "cpu":
        return torch.mm(grad_logits.to(weight.dtype), weight, out_dtype=dtype)
    out = grad_logits.new_zeros(grad_logits.shape[0], weight.shape[1], dtype=dtype)
    for block, weight_block in _widened(weight, dtype):
        out.addmm_(grad_logits[:, block], weight_block)
    return out


def add_grad_weight(grad_logits: Tensor, hidden: Tensor, out: Tensor) -> None:
    """out [V, D] += grad_logits [R, V]^T @ hidden [R, D], out in the accumulation dtype."""
    if out.device.type != "cpu" and grad_logits.dtype == hidden.dtype != out.dtype:
        torch.addmm(out, grad_logits.t(), hidden, out_dtype=out.dtype, out=out)
    else:
        out.addmm_(grad_logits.t().to(out.dtype), hidden.to(out.dtype))


def _widened(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    for begin in range(0, weight.shape[0], _WIDEN_BLOCK):
        block = slice(begin, begin + _WIDEN_BLOCK)
        yield block, weight[block].to(dtype)
