"""Chunks of logit gradients, multiplied into the gradients of hidden states, weight and bias.

The ring holds gradient rows of several chunks in the dtype of the products' operands: on a GPU small chunks of logits
would otherwise read and write the whole float32 dW too often (`plan` has the numbers). A ring with room for every row
of the call needs no float32 dW at all: one product makes dW in the weight's own precision (but for float16, which has
no room for sums over tokens). Nor does the CPU where its
product adds to bfloat16: up to two products round their sums to the result itself; of more, a second bfloat16 matrix
keeps what rounding loses.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from distil_kernels.engine import gemm, memory
from distil_kernels.engine.plan import ROUNDED_SUMS
from distil_kernels.engine.sparse import LargeEntries, large_entries

Rows = slice | Tensor
"""Which rows a chunk holds: a slice where they are consecutive (no copy), else int64 indices."""


class Gradients(NamedTuple):
    """Of the student's inputs; an input that needs none has an empty tensor."""

    hidden: Tensor  # [N, D] in the dtype of the hidden states
    weight: Tensor  # [V, D] in the dtype of `grad_weight_dtype`
    bias: Tensor  # [V] in the accumulation dtype


class Needs(NamedTuple):
    """Which gradients are wanted."""

    hidden: bool
    weight: bool
    bias: bool


NO_GRADIENTS = Needs(hidden=False, weight=False, bias=False)


class GradientSums:
    """Takes chunks of logit gradients to the gradients of hidden states, weight and bias.

    For each chunk: write its gradient to `room`, then `add` it. With a ring, rows wait there until it is full. Who has
    gradients in memory of their own gives up to `ring_rows` of them to `multiply`, and no ring is made.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, needs: Needs, ring_rows: int, gradient_threshold: float = 0.0
    ) -> None:
        dtype = gemm.accumulation_dtype(hidden.dtype)
        self._gradient_threshold = gradient_threshold
        self.dropped = hidden.new_zeros(hidden.shape[0], dtype=dtype)
        self._hidden, self._weight, self._needs = hidden, weight, needs
        self._grad_hidden = hidden.new_zeros(hidden.shape if needs.hidden else 0)
        self._grad_bias = weight.new_zeros(weight.shape[0] if needs.bias else 0, dtype=dtype)
        self._weight_dtype = grad_weight_dtype(weight, ring_rows, hidden.shape[0])
        self._grad_weight: Tensor | None = None  # there from the first product on
        self._rest: Tensor | None = None
        self._operand = gemm.operand_dtype(hidden.dtype, hidden.device.type)
        self._ring_rows = ring_rows
        self._ring: Tensor | None = None
        self._waiting: list[Rows] = []
        self._rounding: list[Tensor | None] = []
        self._num_waiting = 0

    def room(self, student_logits: Tensor) -> Tensor:
        """Where the gradient of the chunk's logits belongs."""
        if not self._ring_rows:
            if student_logits.device.type != "cpu" or self._gradient_threshold:
                return student_logits
            return student_logits.view(self._operand)[:, : student_logits.shape[1]]
        if self._ring is None:
            self._ring = new_rows(self._hidden, self._ring_rows, self._weight.shape[0], self._operand)
        num_rows = student_logits.shape[0]
        if self._num_waiting + num_rows > self._ring_rows:
            self._empty_ring()
        return self._ring[self._num_waiting : self._num_waiting + num_rows]

    def add(self, rows: Rows, grad_logits: Tensor, rounding: Tensor | None) -> None:
        """`rounding` as in `gemm.grad_hidden`."""
        if not self._ring_rows:
            self.multiply(rows, grad_logits, rounding=rounding)
        else:
            self._waiting.append(rows)
            self._rounding.append(rounding)
            self._num_waiting += grad_logits.shape[0]

    def multiply(
        self, rows: Rows, grad_logits: Tensor, upstream: Tensor | None = None, rounding: Tensor | None = None
    ) -> None:
        """The products. `upstream` [R] scales rows of grad_logits that were formed before it was known."""
        kept = self._large_entries(rows, grad_logits)
        if self._needs.hidden:
            self._grad_hidden[rows] = self._grad_hidden_of(grad_logits, kept, upstream, rounding)
        if self._needs.weight:
            hidden = self._hidden[rows]
            if upstream is not None:
                hidden = (hidden.to(upstream.dtype) * upstream[:, None]).to(grad_logits.dtype)
            if kept is not None:
                kept.transposed().add_product(hidden, out=self._grad_weight_so_far())
            elif self._grad_weight is not None:
                gemm.add_grad_weight(grad_logits, hidden, out=self._grad_weight, rest=self._rest)
            else:
                gemm.grad_weight(grad_logits, hidden, out=self._new_grad_weight(), rest=self._rest)
        if self._needs.bias:
            gemm.add_grad_bias(grad_logits, upstream, out=self._grad_bias)

    def _grad_hidden_of(
        self, grad_logits: Tensor, kept: LargeEntries | None, upstream: Tensor | None, rounding: Tensor | None
    ) -> Tensor:
        """[R, D], rounded: where R is the ring's, the float32 of it is gone before dW is there."""
        if kept is None:
            grad = gemm.grad_hidden(grad_logits, self._weight, rounding)
        else:
            grad = self._hidden.new_zeros(grad_logits.shape[0], self._hidden.shape[1], dtype=grad_logits.dtype)
            kept.add_product(self._weight, out=grad)
        return (grad if upstream is None else grad * upstream[:, None]).to(self._hidden.dtype)

    def _large_entries(self, rows: Rows, grad_logits: Tensor) -> LargeEntries | None:
        """What the products may do with alone, or None for all."""
        if not self._gradient_threshold:
            return None
        kept, self.dropped[rows] = large_entries(grad_logits, self._gradient_threshold)
        return kept

    def result(self) -> Gradients:
        self._empty_ring()
        if self._needs.weight:
            weight = self._grad_weight_so_far()
        else:
            weight = self._weight.new_empty(0, dtype=self._weight_dtype)
        return Gradients(self._grad_hidden, weight, self._grad_bias)

    def _new_grad_weight(self) -> Tensor:
        """For the first product, which writes all of it: zeros would be a pass over it."""
        like, dtype = self._weight, self._weight_dtype
        keeps_rest = dtype != self._grad_bias.dtype and self._hidden.shape[0] > ROUNDED_SUMS * self._ring_rows
        self._rest = memory.empty(*like.shape, like=like, dtype=dtype) if keeps_rest else None
        self._grad_weight = memory.empty(*like.shape, like=like, dtype=dtype)
        return self._grad_weight

    def _grad_weight_so_far(self) -> Tensor:
        return self._new_grad_weight().zero_() if self._grad_weight is None else self._grad_weight

    def _empty_ring(self) -> None:
        if self._waiting:
            assert self._ring is not None
            rounding = [each for each in self._rounding if each is not None]
            self.multiply(
                _joined(self._waiting),
                self._ring[: self._num_waiting],
                rounding=torch.cat(rounding) if rounding else None,
            )
            self._waiting, self._rounding, self._num_waiting = [], [], 0


def grad_weight_dtype(weight: Tensor, ring_rows: int, num_rows: int) -> torch.dtype:
    """Of dW while it is summed: the weight's own where the ring holds all rows, or where products add to bfloat16.

    float16 has no room for it: before the loss is divided by its normalizer dW is that many times larger.
    """
    at_once = ring_rows >= num_rows > 0 and weight.dtype != torch.float16
    own = at_once or (ring_rows > 0 and gemm.adds_to_bf16(weight.dtype, weight.device.type))
    return weight.dtype if own else gemm.accumulation_dtype(weight.dtype)


def new_rows(like: Tensor, num_rows: int, vocab_size: int, dtype: torch.dtype) -> Tensor:
    """[num_rows, V]; rows begin at multiples of 64 bytes whatever V, for wide loads and fast products.

    And on a CPU not at multiples of a page: what lies one below the other would share a few places of every cache.
    """
    stride = row_stride(vocab_size, dtype, like.device.type)
    return memory.empty(num_rows, stride, like=like, dtype=dtype)[:, :vocab_size]


def row_stride(vocab_size: int, dtype: torch.dtype, device_type: str) -> int:
    line, page = 64 // dtype.itemsize, 4096 // dtype.itemsize
    stride = -(-vocab_size // line) * line
    return stride + line if device_type == "cpu" and stride % page == 0 else stride


def _joined(chunks: list[Rows]) -> Rows:
    """The rows of consecutive chunks; still a slice where they are neighbours in order."""
    first, last = chunks[0], chunks[-1]
    if isinstance(first, slice) and isinstance(last, slice):
        return slice(first.start, last.stop)
    return torch.cat([chunk for chunk in chunks if isinstance(chunk, Tensor)])
