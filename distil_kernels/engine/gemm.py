"""The three matrix products of an lm_head, with float32 results from operands of any precision.

Rounding logits to bfloat16 costs 2 to 20 % of the gradient once teacher and student are close, so no product here
rounds its result. float32 and float64 operands go to the vendor library, but for float32 on a CPU with AVX-512 of
another maker than Intel, where that library runs its AVX2 code (half of our rate on a Zen 5 core): there our own
product takes them (csrc/cpu/gemm_avx512.cpp). Half precision on a GPU asks the library for a float32 result; on the
CPU, where torch has no such product, bfloat16 goes to our own where the processor has the instructions (the same file,
or gemm_amx.cpp; the gradient of the logits is rounded to bfloat16 after the subtraction that needs float32) and is
widened block by block of the vocabulary elsewhere, as float16 is (on processors without bfloat16 instructions that is
also about six times faster than torch's own).

What torch has for half precision on a GPU: `mm` with a float32 result since 2.8, `addmm` that adds to a float32 matrix
since 2.10. Without the second, dW takes one more pass over a block of it; without the first, operands are widened on
the GPU too, which is several times slower and is said once. The GPU routes are not yet run on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from distil_kernels.backends.cpu import _C
from distil_kernels.engine.gpu_products import exact_if_half, float32_precision, has_float32_result

_WIDEN_BLOCK = 4096
"""Vocabulary entries widened at a time: 4096 x 576 floats are 9 MiB, and a product of that size runs at full speed."""

_MEAN_ROWS = 1024
"""Rows of W whose mean represents the mean of all rows: what all have in common is in any sample."""

_ROUND_BLOCK = 1024
"""Vocabulary entries whose dW is formed in float32 before it is rounded: 1024 x 1024 floats stay in a cache."""

_ADD_BLOCK = 16384
"""Vocabulary entries whose dW goes through a temporary where addmm cannot add to float32: 256 MiB at D = 4096."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of logits, statistics and sums: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def operand_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """Returns the dtype in which the gradient of the logits enters its products: that of the hidden states, if the
    device multiplies it to a float32 result."""
    if device_type == "cpu" and not (dtype == torch.bfloat16 and has_bf16_product()):
        return accumulation_dtype(dtype)
    return dtype


@cache
def _has_wide_addmm() -> bool:
    """Returns whether torch also adds such a product to a float32 matrix (older versions: to a half-precision one)."""
    major, minor = torch.__version__.split(".")[:2]
    return (int(major), int(minor)) >= (2, 10)


def _is_half_on_gpu(*operands: Tensor) -> bool:
    dtype = operands[0].dtype
    return (
        operands[0].device.type != "cpu"
        and dtype in (torch.bfloat16, torch.float16)
        and all(operand.dtype == dtype for operand in operands)
        and has_float32_result(operands[0].device)
    )


# Read once, at import: torch.compile takes a constant as it is, and cannot trace into the extension.
UNITS: tuple[str, ...] = (
    tuple(name for name in ("tiles", "vector") if _C.cpu_supports_gemm(getattr(_C.GemmUnit, name))) if _C else ()
)
"""Units of this processor that run our own products: "tiles" (AMX, bfloat16 only), "vector" (AVX-512 with BF16)."""

_IS_INTEL = _C is not None and _C.cpu_is_intel()


def has_bf16_product() -> bool:
    """Returns whether this processor multiplies bfloat16 matrices to a float32 result."""
    return bool(UNITS)


def has_float32_product() -> bool:
    """Returns whether our own product of float32 matrices is preferred to the vendor library's."""
    return "vector" in UNITS and not _IS_INTEL


def reads_head_in_place(dtype: torch.dtype) -> bool:
    """Returns whether a row of logits costs the same in a chunk of any size, because W is not packed for it (CPU)."""
    return (dtype == torch.bfloat16 and UNITS == ("vector",)) or (dtype == torch.float32 and has_float32_product())


def adds_to_bf16(dtype: torch.dtype, device_type: str) -> bool:
    """Returns whether `add_grad_weight` takes a dW of bfloat16, rounded once per product, with a residual if given."""
    return device_type == "cpu" and dtype == torch.bfloat16 and UNITS == ("vector",)


def _is_ours(left: Tensor, right: Tensor, out_dtype: torch.dtype) -> bool:
    """Returns whether our own product runs. A float32 `left` with a bfloat16 `right` is rounded while it is read."""
    if left.device.type != "cpu" or left.dtype not in (torch.bfloat16, torch.float32):
        return False
    if right.dtype == torch.bfloat16:
        rounds_once = out_dtype == torch.bfloat16 and "tiles" not in UNITS
        return has_bf16_product() and (out_dtype == torch.float32 or rounds_once)
    return left.dtype == right.dtype == out_dtype == torch.float32 and has_float32_product()


def _product(
    left: Tensor,
    right: Tensor,
    out: Tensor,
    *,
    residual: Tensor | None = None,
    accumulate: bool = False,
    unit: str = "best",
) -> None:
    """Computes out = left @ right, or out += left @ right with `accumulate`.

    Args:
        left, right: [M, K] and [K, N].
        out: [M, N] float32 or bfloat16.
        residual: bfloat16 with the strides of a bfloat16 `out`: what `out` lost to rounding. It is written, and is part
            of the sum with `accumulate`.
    """
    if out.numel() == 0 or left.shape[1] == 0:  # the C++ kernels do not accept empty matrices
        for matrix in (out, residual):
            if matrix is not None and not accumulate:
                matrix.zero_()
        return

    def c_matrix(operand: Tensor) -> _C.Matrix:
        return _C.Matrix(operand.data_ptr(), operand.stride(0), operand.stride(1), operand.dtype == torch.bfloat16)

    left, right = (x if 1 in x.stride() else x.contiguous() for x in (left, right))
    _C.cpu_gemm(
        c_matrix(left), c_matrix(right), out.shape[0], out.shape[1], left.shape[1],
        _C.Product(
            out.data_ptr(), out.stride(0), out.dtype == torch.bfloat16, 0 if residual is None else residual.data_ptr()
        ),
        accumulate, torch.get_num_threads(), getattr(_C.GemmUnit, unit),
    )  # fmt: skip


def _rounding_residual(matrix: Tensor) -> Tensor:
    """Returns what the sum of each row loses [R] when float32 entries [R, V] are rounded to bfloat16."""
    residual = matrix.new_empty(matrix.shape[0])
    _C.cpu_rounding_residual(
        matrix.data_ptr(),
        matrix.stride(0),
        matrix.shape[0],
        matrix.shape[1],
        residual.data_ptr(),
        torch.get_num_threads(),
    )
    return residual


def round_rows(exact: Tensor, out: Tensor) -> Tensor | None:
    """Copies `exact` [R, V], float32 or wider, to `out` in the dtype of an operand.

    Returns the residual for `grad_hidden`, or None if nothing is rounded.
    """
    out.copy_(exact)
    if out.dtype == exact.dtype:
        return None
    return _rounding_residual(exact) if out.device.type == "cpu" else (exact - out).sum(-1)


def lm_head(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    """Computes the logits out [R, V] = hidden [R, D] @ weight [V, D]^T."""
    if _is_ours(hidden, weight, out.dtype) and hidden.dtype == weight.dtype:
        _product(hidden, weight.t(), out)
    elif hidden.dtype == weight.dtype == out.dtype:
        with float32_precision(out.device, "ieee"):
            torch.mm(hidden, weight.t(), out=out)
    elif _is_half_on_gpu(hidden, weight):
        torch.mm(hidden, weight.t(), out_dtype=out.dtype, out=out)
    else:
        wide = hidden.to(out.dtype)
        with float32_precision(out.device, "ieee"), exact_if_half(hidden, weight):
            for block, weight_block in _widened(weight, out.dtype):
                torch.mm(wide, weight_block.t(), out=out[:, block])


def grad_hidden(grad_logits: Tensor, weight: Tensor, residual: Tensor | None = None) -> Tensor:
    """Returns dh = grad_logits [R, V] @ weight [V, D], in the accumulation dtype.

    Args:
        residual: [R], what the sum of each row of grad_logits lost when its entries were rounded. A row of S - T sums
            to 0, so what all rows of W have in common cancels. Rounded entries do not sum to 0: the residual times the
            mean row of W is added.
    """
    dtype = accumulation_dtype(weight.dtype)
    if _is_ours(grad_logits, weight, dtype):
        out = grad_logits.new_empty(grad_logits.shape[0], weight.shape[1], dtype=dtype)
        _product(grad_logits, weight, out)
        if grad_logits.dtype != weight.dtype:
            residual = _rounding_residual(grad_logits)
    elif grad_logits.dtype == weight.dtype == dtype:
        return grad_logits @ weight
    elif _is_half_on_gpu(grad_logits, weight):
        out = torch.mm(grad_logits, weight, out_dtype=dtype)
    else:
        out = grad_logits.new_zeros(grad_logits.shape[0], weight.shape[1], dtype=dtype)
        with exact_if_half(grad_logits, weight):
            for block, weight_block in _widened(weight, dtype):
                out.addmm_(grad_logits[:, block].to(dtype), weight_block)
    if residual is not None:
        out.addr_(residual, weight[:: -(-weight.shape[0] // _MEAN_ROWS)].mean(0, dtype=dtype))
    return out


def add_grad_weight(grad_logits: Tensor, hidden: Tensor, out: Tensor, residual: Tensor | None = None) -> None:
    """Computes out [V, D] += grad_logits [R, V]^T @ hidden [R, D].

    `out` has the accumulation dtype, or bfloat16 if `adds_to_bf16`; then out + residual is the sum that is added to.
    """
    if _is_ours(grad_logits, hidden, out.dtype):
        _product(grad_logits.t(), hidden, out, residual=residual, accumulate=True)
    elif not _is_half_on_gpu(grad_logits, hidden):
        with exact_if_half(grad_logits, hidden):
            out.addmm_(grad_logits.t().to(out.dtype), hidden.to(out.dtype))
    elif _has_wide_addmm():
        torch.addmm(out, grad_logits.t(), hidden, out_dtype=out.dtype, out=out)
    else:
        for begin in range(0, out.shape[0], _ADD_BLOCK):
            block = slice(begin, begin + _ADD_BLOCK)
            out[block] += torch.mm(grad_logits[:, block].t(), hidden, out_dtype=out.dtype)


def grad_weight(grad_logits: Tensor, hidden: Tensor, out: Tensor, residual: Tensor | None = None) -> None:
    """Computes out [V, D] = grad_logits [R, V]^T @ hidden [R, D], in the accumulation dtype or that of the weight.

    `residual` as in `add_grad_weight`.
    """
    if _is_ours(grad_logits, hidden, out.dtype):
        _product(grad_logits.t(), hidden, out, residual=residual)
        return
    if _is_half_on_gpu(grad_logits, hidden) and out.dtype != hidden.dtype:
        torch.mm(grad_logits.t(), hidden, out_dtype=out.dtype, out=out)
        return
    if grad_logits.dtype == hidden.dtype == out.dtype and not _is_ours(grad_logits, hidden, torch.float32):
        torch.mm(grad_logits.t(), hidden, out=out)
        return
    wide = out.new_empty(min(_ROUND_BLOCK, out.shape[0]), out.shape[1], dtype=accumulation_dtype(out.dtype))
    for begin in range(0, out.shape[0], _ROUND_BLOCK):
        rows = grad_logits[:, begin : begin + _ROUND_BLOCK].t()
        block = wide[: rows.shape[0]]
        if _is_ours(rows, hidden, wide.dtype):
            _product(rows, hidden, block)
        else:
            with exact_if_half(rows, hidden):
                torch.mm(rows.to(wide.dtype), hidden.to(wide.dtype), out=block)
        out[begin : begin + _ROUND_BLOCK].copy_(block)


def add_grad_bias(grad_logits: Tensor, upstream: Tensor | None, out: Tensor) -> None:
    """Computes out [V] += upstream [R] @ grad_logits [R, V], with ones if `upstream` is None; in the accumulation
    dtype."""
    if upstream is None:
        out.add_(grad_logits.sum(0, dtype=out.dtype))
    elif grad_logits.dtype == out.dtype:
        out.add_(upstream @ grad_logits)
    else:
        add_grad_weight(grad_logits, upstream[:, None].to(grad_logits.dtype), out[:, None])


def _widened(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yields blocks of rows of W in a wider dtype, one after the other in the same memory."""
    wide = weight.new_empty(min(_WIDEN_BLOCK, weight.shape[0]), weight.shape[1], dtype=dtype)
    for begin in range(0, weight.shape[0], _WIDEN_BLOCK):
        block = slice(begin, begin + _WIDEN_BLOCK)
        rows = weight[block]
        yield block, wide[: rows.shape[0]].copy_(rows)
