"""The last two products with the large entries of the logits' gradient only (`gradient_threshold`, CPU).

A row of S - T has a few hundred entries that matter and tens of thousands that do not. Those whose magnitude is at
least `threshold` times the row's largest are listed, rows and columns, from the dense gradient:

    dh[r]  = sum over large v of ds[r, v] W[v]         lists of rows
    dW[v] += sum over large r of ds[r, v] h[r]         the same lists by column

Work and memory are proportional to the number of large entries, 16 bytes each. A chunk in which more than MAX_SHARE of
the entries are large goes to the dense products, which is exact. The error is bounded in docs/mathematics.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distil_kernels.backends.cpu import _C

MAX_SHARE = 0.25
"""Largest share of large entries: with more, their lists would take more memory than the gradient itself."""


class LargeEntries:
    """Lists of the large entries of a matrix [R, V], by row."""

    def __init__(self, num_rows: int, num_columns: int, num_entries: int) -> None:
        self.shape = num_rows, num_columns
        self.offsets = torch.empty(num_rows + 1, dtype=torch.int64)
        self.index = torch.empty(num_entries, dtype=torch.int32)
        self.value = torch.empty(num_entries, dtype=torch.float32)

    def transposed(self) -> LargeEntries:
        """Returns the same entries, by column."""
        out = LargeEntries(self.shape[1], self.shape[0], self.index.numel())
        position = torch.empty(out.shape[0], dtype=torch.int64)
        _C.cpu_sparse_transpose(self._rows(), out._rows(), position.data_ptr(), *_threads_and_instructions())
        return out

    def add_product(self, dense: Tensor, out: Tensor) -> None:
        """Computes out [R, D] float32 += self @ dense [V, D] float32 or bfloat16."""
        if dense.stride(1) != 1:
            dense = dense.contiguous()
        num_rows, num_columns = dense.shape
        is_bfloat16 = dense.dtype == torch.bfloat16
        rows = _C.DenseRows(dense.data_ptr(), dense.stride(0), num_rows, num_columns, is_bfloat16)
        position = torch.empty(self.shape[0], dtype=torch.int64)
        _C.cpu_sparse_product(self._rows(), rows, out.data_ptr(), position.data_ptr(), *_threads_and_instructions())

    def _rows(self) -> _C.SparseRows:
        return _C.SparseRows(
            self.offsets.data_ptr(), self.index.data_ptr(), self.value.data_ptr(), self.offsets.numel() - 1
        )


def large_entries(grad_logits: Tensor, threshold: float) -> tuple[LargeEntries | None, Tensor]:
    """Returns the entries of grad_logits [R, V] float32 of at least `threshold` times their row's largest magnitude.

    Returns:
        The entries, or None if there are too many; and the share of each row's absolute sum [R] that is not among them
        (0 if there are too many: the caller then uses all entries).
    """
    num_rows, num_columns = grad_logits.shape
    cutoff, dropped = torch.empty(2, num_rows, dtype=torch.float32)
    counts = torch.empty(num_rows, dtype=torch.int64)
    matrix = grad_logits.data_ptr(), grad_logits.stride(0)
    _C.cpu_sparse_count(
        *matrix,
        num_rows,
        num_columns,
        threshold,
        cutoff.data_ptr(),
        counts.data_ptr(),
        dropped.data_ptr(),
        *_threads_and_instructions(),
    )
    num_entries = int(counts.sum())
    if num_entries > MAX_SHARE * grad_logits.numel():
        return None, torch.zeros_like(dropped)
    large = LargeEntries(num_rows, num_columns, num_entries)
    large.offsets[0] = 0
    torch.cumsum(counts, 0, out=large.offsets[1:])
    _C.cpu_sparse_select(*matrix, num_columns, cutoff.data_ptr(), large._rows(), *_threads_and_instructions())
    return large, dropped


def _threads_and_instructions() -> tuple[int, _C.InstructionSet]:
    return torch.get_num_threads(), _C.InstructionSet.best
