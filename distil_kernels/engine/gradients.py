"""Chunks of logit gradients, multiplied into the gradients of hidden states, weight and bias.

The staging buffer holds gradient rows of several chunks in the dtype of the products' operands: on a GPU small chunks
of logits would otherwise read and write the whole float32 dW too often (`sizes` has the numbers). If it holds every row
of the call, no float32 dW is needed: one product makes dW in the weight's own precision (not in float16, which
overflows in sums over tokens). On the CPU, products that add to bfloat16 need none either: up to two of them round
their sums to the result itself; of more, a second bfloat16 matrix stores the residual.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from distil_kernels.engine import allocation, gemm
from distil_kernels.engine.gradient_threshold import LargeEntries, large_entries
from distil_kernels.engine.sizes import ROUNDED_SUMS
from distil_kernels.engine.vocab_shards import VocabShards

Rows = slice | Tensor
"""Which rows a chunk holds: a slice if they are consecutive (no copy), else int64 indices."""


class Gradients(NamedTuple):
    """Gradients of the student's tensors; empty for a tensor that needs none."""

    hidden: Tensor  # [N, D] in the dtype of the hidden states
    weight: Tensor  # as the weight, padding rows included, in the dtype of `grad_weight_dtype`
    bias: Tensor  # [V] and padding, in the accumulation dtype


class Needs(NamedTuple):
    """Which of the student's tensors need a gradient."""

    hidden: bool
    weight: bool
    bias: bool


NO_GRADIENTS = Needs(hidden=False, weight=False, bias=False)


class GradientSums:
    """Sums the gradients of hidden states, weight and bias over chunks of logit gradients.

    For each chunk, the caller writes its logit gradient to `output_buffer` and then calls `add`. With a staging buffer,
    rows wait there until it is full. A caller that already stores its logit gradients passes up to `staging_rows` of
    them to `multiply` directly; then no staging buffer is allocated.

    Args:
        hidden: [N, D] of the student.
        weight: of the student, [V, D] or more rows: the gradient of those is 0.
        vocab_size: V.
        staging_rows: rows of the staging buffer; 0 for none.
        gradient_threshold: smaller entries of a row, relative to its largest, are left out of dh and dW.
        shards: processes that hold the rest of the vocabulary: dh is a sum over them.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        vocab_size: int,
        needs: Needs,
        staging_rows: int,
        gradient_threshold: float = 0.0,
        shards: VocabShards | None = None,
    ) -> None:
        dtype = gemm.accumulation_dtype(hidden.dtype)
        self._gradient_threshold = gradient_threshold
        self.dropped = hidden.new_zeros(hidden.shape[0], dtype=dtype)
        self._hidden, self._weight, self._needs = hidden, weight[:vocab_size], needs
        self._shards = shards
        self._scatters = shards is not None and shards.sequence_parallel and needs.hidden
        self._grad_hidden = hidden.new_zeros(
            hidden.shape if needs.hidden else 0, dtype=dtype if self._scatters else hidden.dtype
        )
        self._grad_bias = weight.new_zeros(weight.shape[0] if needs.bias else 0, dtype=dtype)
        self._weight_dtype = grad_weight_dtype(weight, staging_rows, hidden.shape[0])
        self._grad_weight: Tensor | None = None  # [V, D], allocated by the first product
        self._num_padding = weight.shape[0] - vocab_size
        self._weight_residual: Tensor | None = None
        self._operand_dtype = gemm.operand_dtype(hidden.dtype, hidden.device.type)
        self._staging_rows = staging_rows
        self._staging: Tensor | None = None
        self._staged: list[Rows] = []
        self._staged_residuals: list[Tensor] = []
        self._num_staged = 0

    def output_buffer(self, student_logits: Tensor) -> Tensor:
        """Returns the memory [R, V] for the gradient of the chunk's logits [R, V]."""
        # Without staging, the gradient overwrites the logits: in a narrower dtype the first half of each row.
        if not self._staging_rows:
            if student_logits.device.type != "cpu" or self._gradient_threshold:
                return student_logits
            return student_logits.view(self._operand_dtype)[:, : student_logits.shape[1]]
        if self._staging is None:
            self._staging = new_rows(self._hidden, self._staging_rows, self._weight.shape[0], self._operand_dtype)
        num_rows = student_logits.shape[0]
        if self._num_staged + num_rows > self._staging_rows:
            self._flush()
        return self._staging[self._num_staged : self._num_staged + num_rows]

    def add(self, rows: Rows, grad_logits: Tensor, residual: Tensor | None) -> None:
        """Adds a chunk whose gradient stands in its output buffer; `residual` as in `gemm.grad_hidden`."""
        if not self._staging_rows:
            self.multiply(rows, grad_logits, residual=residual)
        else:
            self._staged.append(rows)
            if residual is not None:
                self._staged_residuals.append(residual)
            self._num_staged += grad_logits.shape[0]

    def multiply(
        self, rows: Rows, grad_logits: Tensor, upstream: Tensor | None = None, residual: Tensor | None = None
    ) -> None:
        """Computes the products of some rows and adds them to the sums.

        Args:
            grad_logits: [R, V].
            upstream: [R] factors of the rows, if they were not known when grad_logits was formed.
            residual: as in `gemm.grad_hidden`.
        """
        large = self._large_entries(rows, grad_logits)
        if self._needs.hidden:
            self._grad_hidden[rows] = self._grad_hidden_of(grad_logits, large, upstream, residual)
        if self._needs.weight:
            hidden = self._hidden[rows]
            if upstream is not None:
                hidden = (hidden.to(upstream.dtype) * upstream[:, None]).to(grad_logits.dtype)
            if large is not None:
                large.transposed().add_product(hidden, out=self._grad_weight_so_far())
            elif self._grad_weight is not None:
                gemm.add_grad_weight(grad_logits, hidden, out=self._grad_weight, residual=self._weight_residual)
            else:
                out = self._new_grad_weight()
                gemm.grad_weight(grad_logits, hidden, out=out, residual=self._weight_residual)
        if self._needs.bias:
            gemm.add_grad_bias(grad_logits, upstream, out=self._grad_bias[: self._weight.shape[0]])

    def result(self) -> Gradients:
        """Multiplies what is still staged, and returns the sums."""
        self._flush()
        if self._needs.weight:
            self._grad_weight_so_far()
            weight = self._padded_grad_weight
        else:
            weight = self._weight.new_empty(0, dtype=self._weight_dtype)
        hidden = self._grad_hidden
        if self._scatters:
            assert self._shards is not None
            hidden = self._shards.own_rows(hidden, self._hidden.dtype)
        return Gradients(hidden, weight, self._grad_bias)

    def _grad_hidden_of(
        self, grad_logits: Tensor, large: LargeEntries | None, upstream: Tensor | None, residual: Tensor | None
    ) -> Tensor:
        """Returns dh [R, D], rounded: with all rows staged, its float32 version is freed before dW is allocated."""
        if not len(self._weight):  # a shard of the vocabulary without entries
            grad = self._hidden.new_zeros(grad_logits.shape[0], self._hidden.shape[1], dtype=self._grad_bias.dtype)
        elif large is None:
            grad = gemm.grad_hidden(grad_logits, self._weight, residual)
        else:
            grad = self._hidden.new_zeros(grad_logits.shape[0], self._hidden.shape[1], dtype=grad_logits.dtype)
            large.add_product(self._weight, out=grad)
        grad = grad if upstream is None else grad * upstream[:, None]
        if self._shards is not None and not self._scatters:
            grad = self._shards.add_hidden(grad)
        return grad.to(self._grad_hidden.dtype)

    def _large_entries(self, rows: Rows, grad_logits: Tensor) -> LargeEntries | None:
        """Returns the entries that the products read, or None if they read all."""
        if not self._gradient_threshold:
            return None
        large, self.dropped[rows] = large_entries(grad_logits, self._gradient_threshold)
        return large

    def _new_grad_weight(self) -> Tensor:
        """Allocates dW for the first product, which writes all of it: zeros would be one more pass over it."""
        like, dtype = self._weight, self._weight_dtype
        stores_residual = dtype != self._grad_bias.dtype and self._hidden.shape[0] > ROUNDED_SUMS * self._staging_rows
        self._weight_residual = allocation.empty(*like.shape, like=like, dtype=dtype) if stores_residual else None
        num_rows, hidden_size = like.shape
        whole = allocation.empty(num_rows + self._num_padding, hidden_size, like=like, dtype=dtype)
        whole[num_rows:] = 0
        self._padded_grad_weight, self._grad_weight = whole, whole[:num_rows]
        return self._grad_weight

    def _grad_weight_so_far(self) -> Tensor:
        return self._new_grad_weight().zero_() if self._grad_weight is None else self._grad_weight

    def _flush(self) -> None:
        """Multiplies the staged rows, and empties the staging buffer."""
        if self._staged:
            assert self._staging is not None
            residuals = self._staged_residuals
            self.multiply(
                _joined(self._staged),
                self._staging[: self._num_staged],
                residual=torch.cat(residuals) if residuals else None,
            )
            self._staged, self._staged_residuals, self._num_staged = [], [], 0


def grad_weight_dtype(weight: Tensor, staging_rows: int, num_rows: int) -> torch.dtype:
    """Returns the dtype of dW while it is summed.

    It is the weight's own if the staging buffer holds all rows, or if products add to bfloat16. float16 would overflow:
    dW is summed before the division by the denominator.
    """
    at_once = staging_rows >= num_rows > 0 and weight.dtype != torch.float16
    is_narrow = at_once or (staging_rows > 0 and gemm.adds_to_bf16(weight.dtype, weight.device.type))
    return weight.dtype if is_narrow else gemm.accumulation_dtype(weight.dtype)


def new_rows(like: Tensor, num_rows: int, vocab_size: int, dtype: torch.dtype) -> Tensor:
    """Returns uninitialised rows [num_rows, V] with the stride of `row_stride`, on the device of `like`."""
    stride = row_stride(vocab_size, dtype, like.device.type)
    return allocation.empty(num_rows, stride, like=like, dtype=dtype)[:, :vocab_size]


def row_stride(vocab_size: int, dtype: torch.dtype, device_type: str) -> int:
    """Returns the distance of two rows: a multiple of 64 bytes for any V, for wide loads and fast products.

    On a CPU it also avoids multiples of a page; otherwise rows would collide in the same cache sets.
    """
    line, page = 64 // dtype.itemsize, 4096 // dtype.itemsize
    stride = -(-vocab_size // line) * line
    return stride + line if device_type == "cpu" and stride % page == 0 else stride


def _joined(chunks: list[Rows]) -> Rows:
    """Returns the rows of consecutive chunks: a slice if they are neighbours in order, else indices."""
    first, last = chunks[0], chunks[-1]
    if isinstance(first, slice) and isinstance(last, slice):
        return slice(first.start, last.stop)
    return torch.cat([chunk for chunk in chunks if isinstance(chunk, Tensor)])
