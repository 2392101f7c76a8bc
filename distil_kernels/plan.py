"""Which plan computes a call, and in chunks of how many rows: pure functions that can say why.

One lm_head product costs 2 N V D floating-point operations; a plan is named by what it keeps:

    plan                  products  extra memory beyond inputs and their gradients
    stats_only                2     logits chunk
    gradient_in_forward       4     logits chunk + dW accumulator
    frozen_head               3     logits chunk
    kept_gradient             4     logits chunk + N V gradient of the logits
    recompute                 6     logits chunk + dW accumulator

    logits chunk      = 2 R V a     R rows of student and teacher logits
    dW accumulator    = V D a       a = 4 bytes (8 for float64)

The gradient of the logits overwrites the student's logits, so the chunk is all there is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from distil_kernels.gemm import accumulation_dtype

PLANS = ("gradient_in_forward", "kept_gradient", "recompute", "frozen_head", "stats_only")

LOGITS_CHUNK_BYTES = {"cpu": 192 * 2**20, "cuda": 2 * 2**30}
"""Default memory for the logits of a chunk. On the CPU 300 to 600 rows of a 49k vocabulary: products of fewer rows
are slower, more rows fall out of the caches without being faster."""

_ROW_MULTIPLE = 16
"""Chunks are whole tiles of the matrix products, unless the call itself is smaller."""


@dataclass(frozen=True)
class Shape:
    """What the choice depends on."""

    num_rows: int
    vocab_size: int
    hidden_size: int
    dtype: torch.dtype
    device_type: str
    scalar: bool
    """One scalar loss whose row weights are known, against per-row outputs with upstream gradients of any kind."""
    logprob_grad: bool = False
    """Per-row outputs: gradients may come through the log-prob as well as the cross-entropy."""
    grad_hidden: bool = False
    grad_head: bool = False
    """Whether the student's weight or bias needs a gradient."""


class Plan(NamedTuple):
    name: str
    chunk_rows: int
    reason: str


def logits_chunk_bytes(shape: Shape, chunk_rows: int) -> int:
    return 2 * chunk_rows * shape.vocab_size * accumulation_dtype(shape.dtype).itemsize


def choose_chunk_rows(shape: Shape, chunk_bytes: int | None = None) -> int:
    """As many rows as the memory for a chunk of logits holds, at least one."""
    budget = chunk_bytes or LOGITS_CHUNK_BYTES.get(shape.device_type, LOGITS_CHUNK_BYTES["cuda"])
    rows = budget // logits_chunk_bytes(shape, 1)
    if rows > _ROW_MULTIPLE:
        rows -= rows % _ROW_MULTIPLE
    return max(1, min(rows, shape.num_rows))


def choose_plan(shape: Shape, requested: str = "auto", *, credit_in_one_pass: bool = True) -> Plan:
    """The plan for a call, and the reason.

    Args:
        credit_in_one_pass: every row's weight is known when its chunk comes up in reverse-time order.

    Raises:
        ValueError: `requested` is no plan's name, or cannot compute this call; the message says why.
    """
    chunk_rows = choose_chunk_rows(shape)
    if requested == "auto":
        return Plan(*_prefer(shape, chunk_rows, credit_in_one_pass))
    if requested not in PLANS:
        raise ValueError(f"plan must be 'auto' or one of {list(PLANS)}, got {requested!r}")
    why_not = _why_not(requested, shape, credit_in_one_pass)
    if why_not is not None:
        raise ValueError(f"plan={requested!r} cannot compute this call: {why_not}")
    return Plan(requested, chunk_rows, "asked for by name")


def _prefer(shape: Shape, chunk_rows: int, credit_in_one_pass: bool) -> tuple[str, int, str]:
    if not (shape.grad_hidden or shape.grad_head):
        return "stats_only", chunk_rows, "nothing needs a gradient"
    if _why_not("frozen_head", shape, credit_in_one_pass) is None:
        return "frozen_head", chunk_rows, "the student's head needs no gradient"
    if _why_not("gradient_in_forward", shape, credit_in_one_pass) is None:
        return "gradient_in_forward", chunk_rows, "a scalar loss whose row weights are known in order"
    if _why_not("kept_gradient", shape, credit_in_one_pass) is None and shape.num_rows <= 2 * shape.hidden_size:
        return "kept_gradient", chunk_rows, "N <= 2 D: the logits' gradient is no larger than two dW"
    if shape.scalar:
        return "recompute", chunk_rows, "row weights depend on rows of other chunks"
    return "recompute", chunk_rows, "per-row outputs, their upstream gradients come later"


def _why_not(name: str, shape: Shape, credit_in_one_pass: bool) -> str | None:
    needs_grad = shape.grad_hidden or shape.grad_head
    if name == "stats_only":
        return "an input needs a gradient" if needs_grad else None
    if name == "recompute":
        return None
    if name == "kept_gradient":
        if shape.scalar:
            return "a scalar loss keeps nothing; use 'gradient_in_forward'"
        return "the log-prob has an upstream gradient of its own; use 'recompute'" if shape.logprob_grad else None
    if name == "frozen_head" and shape.grad_head:
        return "student_weight or student_bias needs a gradient"
    if shape.scalar:
        return None if credit_in_one_pass else "row weights depend on rows of other chunks; use 'recompute'"
    if name == "gradient_in_forward":
        return "per-row outputs have upstream gradients that come later; use 'kept_gradient' or 'recompute'"
    return "the log-prob has an upstream gradient of its own; use 'recompute'" if shape.logprob_grad else None
