"""Which plan computes a call, and in chunks of how many rows: pure functions that can say why.

One lm_head product costs 2 N V D floating-point operations; a plan is named by what it keeps:

    plan                  products  extra memory beyond inputs and their gradients
    stats_only                2     logits chunk (nothing with back end `triton`)
    gradient_in_forward       4     logits chunk + ring + dW accumulator
    frozen_head               3     logits chunk + ring
    kept_gradient             4     K N V b gradients of the logits + logits chunk (K = 2: or ring + dW accumulator)
    recompute                 6     logits chunk + ring + dW accumulator

    logits chunk      = 2 R V a     R rows of student and teacher logits
    ring              = Q V b       Q rows of the logits' gradient that wait for one dh and one dW product
    K                 = 1, or 2 where gradients may come through the log-prob as well as the cost
    dW accumulator    = V D a       a = 4 bytes (8 for float64), b = 2 for half precision on a GPU and for bfloat16
                                    where the CPU multiplies it, else a; none where the ring holds all N rows (but
                                    for float16), nor where dW itself is as wide

A call of few rows for its hidden size keeps all of them in a ring, which is less memory than the dW accumulator that it
makes needless: N b <= D a + Q b with Q the ring of a longer call; on a GPU also where it all stays below 4 GiB. Its one
product is the last of the call, and dW takes the memory of the logits, which are done with: such a call needs the ring
and by how much the chunk is larger than dW. `kept_gradient` has no logits when dW comes either.

On the CPU a ring is for bfloat16 only; elsewhere the gradient of the logits overwrites the student's logits and the
products follow at once. Where they add to bfloat16 (`gemm.adds_to_bf16`) half of the rows do in the place of all where
those would take more memory, since two roundings of dW cost little more than one (.22 for .19 % of error at SmolLM2's
shape); for more the accumulator is a bfloat16 matrix of what they lose, V D b. On a GPU adding to a float32 dW moves
8 V D bytes, 1.6 ms for V D = 152k * 4096 on an H100: at one product per small chunk that is more than everything but
the products themselves, at one per 4096 rows a few per cent (docs/performance.md has the sum).

Chunk and ring come from memory budgets; a `Plan` passed as `plan=` to the public ops brings its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from distil_kernels.engine.gemm import accumulation_dtype, adds_to_bf16, operand_dtype, reads_head_in_place

PLANS = ("gradient_in_forward", "kept_gradient", "recompute", "frozen_head", "stats_only")

LOGITS_CHUNK_BYTES = {"cpu": 320 * 2**20, "cuda": 640 * 2**20}
"""Default memory for the logits of a chunk: 256 rows of 152k on the CPU, 512 on a GPU (not yet timed)."""

_EXTRA_BYTES = 4 * 2**30
"""On a GPU the chunk is twice that where all of the call's extra memory then stays below this. Every chunk reads both
heads: at D = 4096 a product of 512 rows takes two thirds of its arithmetic's time for memory, of 1024 two fifths."""


class _Enough(NamedTuple):
    """What a chunk on the CPU is, where its memory allows: `rows`, or more that take no more than `num_bytes`."""

    rows: int
    num_bytes: int


_ENOUGH = _Enough(256, 48 * 2**20)
"""A larger chunk on the CPU wins nothing: at N = 1024, V = 49k, D = 576 the whole operation took 1.15, 1.16, 1.11,
1.14, 1.10 times its bare products with 128, 192, 256, 384, 512 rows (one Zen 4 thread), and memory grows with them. A
smaller one costs: every chunk packs all of W for its products (N = 512, V = 152k, D = 1024: 1.20 times at 128 rows,
1.07 at 256), and adds to all of dW."""

_PANEL_ROWS = 48
"""Rows that a product which reads W in place multiplies at once: 112 are two such panels and a third of which a third
is used."""


class _InPlace(NamedTuple):
    """Rows of a chunk where W is read in place, so that a row costs the same whatever its chunk's size."""

    enough: _Enough
    least: int
    """Where enough rows take more than `most_bytes`."""
    most_bytes: int


_IN_PLACE = {
    torch.float32: _InPlace(_Enough(3 * _PANEL_ROWS, 48 * 2**20), 2 * _PANEL_ROWS, 128 * 2**20),
    torch.bfloat16: _InPlace(_Enough(2 * _PANEL_ROWS, 8 * 2**20), _PANEL_ROWS, 64 * 2**20),
}
"""In float32 every chunk adds to dW: at N = 512, V = 152k, D = 1024 144 rows took .94 of the time of 96 (two Zen 5
threads), but their 168 MiB are more than half of what the leanest loss without chunks takes there. In bfloat16 dW waits
for the ring: 48, 96, 144, 480 rows took 1.06, 1.01, 1, 1 times as long at V = 12k, and 48 1.02 times 96 at V = 49k."""

_RING_ROWS = 576
"""Rows of the ring where products add to bfloat16: at N = 4096, V = 49k, D = 576 288, 384, 576, 768 took 1.05, 1.03,
1.03, 1 times as long (one Zen 5 thread)."""

ROUNDED_SUMS = 2
"""Products whose sums are rounded to a bfloat16 dW one after the other without keeping what that loses."""

_FOR_ONE_PRODUCT_BYTES = 8 * 2**20
"""By so much may one product take more memory than two: it takes .975 of the time (N = 1024, V = 49k, D = 576 on two
Zen 5 threads) and rounds dW once. `kept_gradient` of two takes the same ring though its logits are gone by then: 1.18
for 1.34 times the bare products, 288 for 265 MiB."""

RING_BYTES = 1152 * 2**20
"""Default memory for the ring on a GPU: 3584 bfloat16 rows of a 152k vocabulary."""

HIDDEN_RING_BYTES = 640 * 2**20
"""The same where only dh is formed. Its product has R x D results, few tiles for a GPU's processors where R is a chunk:
at D = 4096, tiles of 128 x 256 and 132 processors 512 rows make half a wave, 2048 nearly two."""

_ROW_MULTIPLE = {"cpu": 16, "cuda": 128}
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
    """R, rows of a chunk of logits."""
    ring_rows: int
    """Q, rows of the ring, at least R; 0 for none: the gradient overwrites the student's logits."""
    reason: str = "asked for by name"


def logits_chunk_bytes(shape: Shape, chunk_rows: int) -> int:
    return 2 * chunk_rows * shape.vocab_size * accumulation_dtype(shape.dtype).itemsize


def ring_bytes(shape: Shape, ring_rows: int) -> int:
    return ring_rows * shape.vocab_size * operand_dtype(shape.dtype, shape.device_type).itemsize


def extra_bytes(shape: Shape, plan: Plan) -> int:
    """Peak of a call beyond its inputs and their gradients, by the formulas above."""
    chunk, ring = logits_chunk_bytes(shape, plan.chunk_rows), ring_bytes(shape, plan.ring_rows)
    if plan.name == "stats_only":
        return chunk
    if plan.name == "kept_gradient":
        ring, ring_rows = (ring, plan.ring_rows) if shape.logprob_grad else (0, shape.num_rows)
        later = ring + _accumulator_bytes(shape, ring_rows)
        return _kept_bytes(shape) + max(chunk - _head_bytes(shape), later)
    if plan.ring_rows >= shape.num_rows:
        return _one_product_bytes(shape, chunk)
    return chunk + ring + _accumulator_bytes(shape, plan.ring_rows)


def choose_chunk_rows(shape: Shape, chunk_bytes: int | None = None) -> int:
    """As many rows as the memory for a chunk of logits holds, at least one; no more than make chunks of equal size."""
    budget = chunk_bytes or _chunk_budget(shape)
    rows = budget // logits_chunk_bytes(shape, 1)
    multiple = _ROW_MULTIPLE.get(shape.device_type, _ROW_MULTIPLE["cuda"])
    if chunk_bytes is None and shape.device_type == "cpu":
        enough = _ENOUGH
        if reads_head_in_place(shape.dtype):
            enough, least, most_bytes = _IN_PLACE[shape.dtype]
            multiple = _PANEL_ROWS
            rows = min(rows, max(least, most_bytes // logits_chunk_bytes(shape, 1)))
        rows = min(rows, max(enough.rows, enough.num_bytes // logits_chunk_bytes(shape, 1)))
    if rows > multiple:
        rows -= rows % multiple
    rows = max(1, min(rows, shape.num_rows))
    num_chunks = -(-shape.num_rows // rows) or 1
    if shape.num_rows > rows > multiple:
        rows = min(rows, -(-shape.num_rows // (num_chunks * multiple)) * multiple)
    return rows


def _chunk_budget(shape: Shape) -> int:
    budget = LOGITS_CHUNK_BYTES.get(shape.device_type, LOGITS_CHUNK_BYTES["cuda"])
    if shape.device_type == "cpu" or not shape.grad_head:
        return budget
    several = 2 * budget + RING_BYTES + _wide_head_bytes(shape)
    return 2 * budget if min(_one_product_bytes(shape, 2 * budget), several) <= _EXTRA_BYTES else budget


def choose_ring_rows(shape: Shape, chunk_rows: int) -> int:
    """As many as spare the dW accumulator where that takes no more memory (on a GPU also where it fits _EXTRA_BYTES);
    else as many whole chunks as the ring's memory holds; 0 for in place."""
    if shape.device_type == "cpu":
        return _ring_rows_on_cpu(shape, chunk_rows)
    budget = RING_BYTES if shape.grad_head else HIDDEN_RING_BYTES
    chunks = min(max(1, budget // ring_bytes(shape, chunk_rows)), -(-shape.num_rows // chunk_rows) or 1)
    affordable = _one_product_bytes(shape, logits_chunk_bytes(shape, chunk_rows)) <= _EXTRA_BYTES
    if shape.grad_head and (affordable or _spares_accumulator(shape, chunks * chunk_rows)):
        return max(shape.num_rows, chunk_rows)
    return chunk_rows * chunks


def _ring_rows_on_cpu(shape: Shape, chunk_rows: int) -> int:
    """Rows wait only if they are rounded, and spare the accumulator or are added to bfloat16."""
    if operand_dtype(shape.dtype, "cpu") == accumulation_dtype(shape.dtype):
        return 0
    adds = adds_to_bf16(shape.dtype, "cpu")
    if shape.grad_head and _spares_accumulator(shape, _RING_ROWS if adds else _ENOUGH.rows):
        rows = max(-(-_sparing_rows(shape) // chunk_rows), 3) * chunk_rows  # a product of few is mostly reading W
        chunk = logits_chunk_bytes(shape, chunk_rows)
        if _one_product_bytes(shape, chunk) <= chunk + ring_bytes(shape, rows) + _FOR_ONE_PRODUCT_BYTES:
            rows = shape.num_rows
    elif adds:
        rows = _RING_ROWS
    else:
        return 0
    return max(chunk_rows, min(shape.num_rows, -(-rows // chunk_rows) * chunk_rows))


def _spares_accumulator(shape: Shape, ring_rows: int) -> bool:
    """Whether a ring that needs no dW accumulator takes no more memory than one of `ring_rows` beside it."""
    if shape.dtype == torch.float16:
        return False
    adds = adds_to_bf16(shape.dtype, shape.device_type)
    accumulator = _head_bytes(shape) if adds else _wide_head_bytes(shape)
    return ring_bytes(shape, _sparing_rows(shape)) <= ring_bytes(shape, ring_rows) + accumulator


def _sparing_rows(shape: Shape) -> int:
    return -(-shape.num_rows // ROUNDED_SUMS) if adds_to_bf16(shape.dtype, shape.device_type) else shape.num_rows


def _one_product_bytes(shape: Shape, chunk: int) -> int:
    """Of a ring for all rows and `chunk` bytes of logits, whose place dW (in float16 what it is summed in) takes."""
    ring = ring_bytes(shape, shape.num_rows)
    if shape.dtype == torch.float16:
        return ring + max(chunk, _accumulator_bytes(shape, shape.num_rows))
    return ring + max(0, chunk - _head_bytes(shape))


def _accumulator_bytes(shape: Shape, ring_rows: int) -> int:
    """Beside dW itself."""
    if not shape.grad_head or shape.dtype == accumulation_dtype(shape.dtype):
        return 0
    adds = ring_rows > 0 and adds_to_bf16(shape.dtype, shape.device_type)
    if shape.dtype != torch.float16 and shape.num_rows <= ring_rows * (ROUNDED_SUMS if adds else 1):
        return 0
    return _head_bytes(shape) if adds else _wide_head_bytes(shape)


def _head_bytes(shape: Shape) -> int:
    """Of dW."""
    return shape.vocab_size * shape.hidden_size * shape.dtype.itemsize if shape.grad_head else 0


def _wide_head_bytes(shape: Shape) -> int:
    return shape.vocab_size * shape.hidden_size * accumulation_dtype(shape.dtype).itemsize


def choose_plan(shape: Shape, requested: str | Plan = "auto", *, credit_in_one_pass: bool = True) -> Plan:
    """The plan for a call, and the reason.

    Args:
        requested: "auto", a name of PLANS, or a Plan with sizes of its own.
        credit_in_one_pass: every row's weight is known when its chunk comes up in reverse-time order.

    Raises:
        ValueError: `requested` is no plan's name, or cannot compute this call; the message says why.
    """
    name = requested.name if isinstance(requested, Plan) else requested
    if name != "auto" and name not in PLANS:
        raise ValueError(f"plan must be 'auto' or one of {list(PLANS)}, got {name!r}")
    why_not = None if name == "auto" else _why_not(name, shape, credit_in_one_pass)
    if why_not is not None:
        raise ValueError(f"plan={name!r} cannot compute this call: {why_not}")
    if isinstance(requested, Plan):
        if requested.chunk_rows < 1 or not (requested.ring_rows == 0 or requested.ring_rows >= requested.chunk_rows):
            raise ValueError(f"chunk_rows must be positive and ring_rows 0 or at least as many, got {requested}")
        return requested
    reason = "asked for by name"
    if name == "auto":
        name, reason = _prefer(shape, credit_in_one_pass)
    chunk_rows = choose_chunk_rows(shape)
    return Plan(name, chunk_rows, choose_ring_rows(shape, chunk_rows), reason)


def _kept_bytes(shape: Shape) -> int:
    return (2 if shape.logprob_grad else 1) * ring_bytes(shape, shape.num_rows)


def _prefer(shape: Shape, credit_in_one_pass: bool) -> tuple[str, str]:
    if not (shape.grad_hidden or shape.grad_head):
        return "stats_only", "nothing needs a gradient"
    if _why_not("frozen_head", shape, credit_in_one_pass) is None:
        return "frozen_head", "the student's head needs no gradient"
    if _why_not("gradient_in_forward", shape, credit_in_one_pass) is None:
        return "gradient_in_forward", "a scalar loss whose row weights are known in order"
    may_keep = _why_not("kept_gradient", shape, credit_in_one_pass) is None
    if may_keep and _kept_bytes(shape) <= 2 * _wide_head_bytes(shape):
        return "kept_gradient", "what it keeps is no larger than two float32 dW"
    if shape.scalar:
        return "recompute", "row weights depend on rows of other chunks"
    return "recompute", "per-row outputs, their upstream gradients come later"


def _why_not(name: str, shape: Shape, credit_in_one_pass: bool) -> str | None:
    needs_grad = shape.grad_hidden or shape.grad_head
    if name == "stats_only":
        return "an input needs a gradient" if needs_grad else None
    if name == "recompute":
        return None
    if name == "kept_gradient":
        return "a scalar loss keeps nothing; use 'gradient_in_forward'" if shape.scalar else None
    if name == "frozen_head" and shape.grad_head:
        return "student_weight or student_bias needs a gradient"
    if shape.scalar:
        return None if credit_in_one_pass else "row weights depend on rows of other chunks; use 'recompute'"
    if name == "gradient_in_forward":
        return "per-row outputs have upstream gradients that come later; use 'kept_gradient' or 'recompute'"
    return "the log-prob has an upstream gradient of its own; use 'recompute'" if shape.logprob_grad else None
