"""Sizes of the buffers of a call: rows of a logits chunk, rows of the staging buffer, and the memory of each part.

    logits chunk      = 2 R V a     R rows of student and teacher logits
    staging buffer    = Q V b       Q rows of logit gradients that wait for one dh and one dW product
    stored gradients  = K N V b     K logit gradients of every row (plan `kept_gradient`): K = 1, or 2 if gradients
                                    may come through the log-prob as well as the cost
    dW accumulator    = V D a       none if the staging buffer holds all N rows (except in float16), nor if dW itself
                                    is as wide

    a = 4 bytes (8 for float64); b = 2 for half precision on a GPU and for bfloat16 where the CPU multiplies it, else a

Staging on a GPU. Adding to a float32 dW moves 8 V D bytes: 1.6 ms for V D = 152k * 4096 on an H100. Once per small
chunk that costs more than everything but the products themselves; once per 4096 rows it costs a few per cent
(docs/performance.md has the sum).

Staging on a CPU. Only bfloat16 is staged. For other dtypes the gradient overwrites the student's logits, and the
products follow at once. Where products add to bfloat16 (`gemm.adds_to_bf16`), a buffer of half the rows serves calls
whose full buffer would need more memory than an accumulator: two roundings of dW cost little more than one (.22 instead
of .19 % of error at SmolLM2's shape). With more roundings the accumulator is a bfloat16 matrix of residuals, V D b.

One product. A call with few rows for its hidden size stages all of them. That takes less memory than the dW accumulator
which it makes unnecessary: N b <= D a + Q b, with Q the staging rows of a longer call. On a GPU all rows are also
staged if everything stays below 4 GiB. The one product runs last, when the logits are freed, and dW takes their memory:
the call needs the staging buffer, and the difference if the chunk is larger than dW. Plan `kept_gradient` has no logits
either when dW is formed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from distil_kernels.engine.gemm import accumulation_dtype, adds_to_bf16, operand_dtype, reads_head_in_place

# Measured constants. CPU values were timed on one Zen 4 or Zen 5 thread (two where it says so); GPU values are computed
# and not yet timed. "V = 49k" stands for V = 49152, D = 576; "V = 152k" for V = 151936, D = 1024. Times are multiples
# of the bare products, or of the best value.
#
#   constant                   measured or computed
#   LOGITS_CHUNK_BYTES         256 rows of 152k on a CPU, 512 on a GPU.
#   _GPU_EXTRA_BYTES           Every chunk reads both heads: at D = 4096 a product of 512 rows spends two thirds of its
#                              arithmetic's time on memory, one of 1024 rows two fifths.
#   _PACKED_CHUNK              N = 1024, V = 49k: 1.15, 1.16, 1.11, 1.14, 1.10 with 128, 192, 256, 384, 512 rows.
#                              N = 512, V = 152k: 1.20 with 128 rows, 1.07 with 256. A small chunk packs all of W for
#                              its products and adds to all of dW; a large one gains nothing and takes memory.
#   _IN_PLACE_CHUNK float32    N = 512, V = 152k, two threads: 144 rows took .94 of the time of 96, but their 168 MiB
#                              are more than half of what the leanest loss without chunks takes. Each chunk adds to dW.
#   _IN_PLACE_CHUNK bfloat16   V = 12k: 1.06, 1.01, 1, 1 with 48, 96, 144, 480 rows. V = 49k: 1.02 with 48, 1 with 96.
#   _PANEL_ROWS                112 rows are two panels and a third one of which a third is used.
#   _STAGING_ROWS              N = 4096, V = 49k: 1.05, 1.03, 1.03, 1 with 288, 384, 576, 768 rows.
#   _ONE_PRODUCT_EXTRA_BYTES   N = 1024, V = 49k, two threads: one product takes .975 of the time of two.
#                              `kept_gradient` of two outputs stages as many rows: 1.18 and 288 MiB instead of 1.34
#                              and 265 MiB.
#   HIDDEN_STAGING_BYTES       D = 4096, tiles of 128 x 256, 132 processors: 512 rows make half a wave, 2048 nearly two.

LOGITS_CHUNK_BYTES = {"cpu": 320 * 2**20, "cuda": 640 * 2**20}
"""Default memory for the logits of a chunk."""

_GPU_EXTRA_BYTES = 4 * 2**30
"""The chunk of a GPU takes twice its default memory if all extra memory of the call stays below this."""


class _SufficientChunk(NamedTuple):
    """The chunk beyond which more rows gain nothing on a CPU: `rows`, or more rows within `num_bytes`."""

    rows: int
    num_bytes: int


_PACKED_CHUNK = _SufficientChunk(256, 48 * 2**20)
"""For products that pack W once per chunk."""

_PANEL_ROWS = 48
"""Rows that a product multiplies at once if it reads W in place."""


class _InPlaceChunk(NamedTuple):
    """Chunk sizes for products that read W in place, so that a row costs the same whatever the chunk's size."""

    sufficient: _SufficientChunk
    min_rows: int
    """Rows of a chunk where sufficient rows would take more than `max_bytes`."""
    max_bytes: int


_IN_PLACE_CHUNK = {
    torch.float32: _InPlaceChunk(_SufficientChunk(3 * _PANEL_ROWS, 48 * 2**20), 2 * _PANEL_ROWS, 128 * 2**20),
    torch.bfloat16: _InPlaceChunk(_SufficientChunk(2 * _PANEL_ROWS, 8 * 2**20), _PANEL_ROWS, 64 * 2**20),
}

_ROW_MULTIPLE = {"cpu": 16, "cuda": 128}
"""Chunks are whole tiles of the matrix products, unless the call itself is smaller."""

_STAGING_ROWS = 576
"""Staging rows where products add to bfloat16."""

ROUNDED_SUMS = 2
"""Number of products that may round their sums to a bfloat16 dW, one after the other, without storing the residual."""

_ONE_PRODUCT_EXTRA_BYTES = 8 * 2**20
"""Extra memory allowed for a single dW product instead of two, which also rounds dW once."""

STAGING_BYTES = 1152 * 2**20
"""Default memory for the staging buffer on a GPU: 3584 bfloat16 rows of a 152k vocabulary."""

HIDDEN_STAGING_BYTES = 640 * 2**20
"""The same if only dh is formed, whose product has R x D results: few tiles for a GPU if R is one chunk."""


@dataclass(frozen=True)
class Shape:
    """Sizes and properties of a call that its plan and its buffers depend on."""

    num_rows: int
    vocab_size: int
    hidden_size: int
    dtype: torch.dtype
    device_type: str
    scalar: bool
    """True for one scalar loss whose row weights are known; False for per-row outputs with any upstream gradients."""
    logprob_grad: bool = False
    """Whether gradients may come through the log-prob as well as the cost (per-row outputs)."""
    grad_hidden: bool = False
    """Whether the student's hidden states need a gradient."""
    grad_head: bool = False
    """Whether the student's weight or bias needs a gradient."""


def choose_chunk_rows(shape: Shape, chunk_bytes: int | None = None) -> int:
    """Returns the rows of a logits chunk: as many as its memory holds, at least one, in chunks of equal size."""
    budget = chunk_bytes or _chunk_budget(shape)
    rows = budget // logits_chunk_bytes(shape, 1)
    multiple = _ROW_MULTIPLE.get(shape.device_type, _ROW_MULTIPLE["cuda"])

    # On a CPU a chunk that suffices is not made larger.
    if chunk_bytes is None and shape.device_type == "cpu":
        sufficient = _PACKED_CHUNK
        if reads_head_in_place(shape.dtype):
            sufficient, min_rows, max_bytes = _IN_PLACE_CHUNK[shape.dtype]
            multiple = _PANEL_ROWS
            rows = min(rows, max(min_rows, max_bytes // logits_chunk_bytes(shape, 1)))
        rows = min(rows, max(sufficient.rows, sufficient.num_bytes // logits_chunk_bytes(shape, 1)))

    # Whole tiles, and no small last chunk: 300 rows are 2 x 160, not 256 and 44.
    if rows > multiple:
        rows -= rows % multiple
    rows = max(1, min(rows, shape.num_rows))
    num_chunks = -(-shape.num_rows // rows) or 1
    if shape.num_rows > rows > multiple:
        rows = min(rows, -(-shape.num_rows // (num_chunks * multiple)) * multiple)
    return rows


def choose_staging_rows(shape: Shape, chunk_rows: int) -> int:
    """Returns the rows of the staging buffer, 0 for none.

    All rows, if that makes the dW accumulator unnecessary and takes no more memory (on a GPU also if it fits
    `_GPU_EXTRA_BYTES`); else as many whole chunks as the staging memory holds.
    """
    if shape.device_type == "cpu":
        return _staging_rows_on_cpu(shape, chunk_rows)
    budget = STAGING_BYTES if shape.grad_head else HIDDEN_STAGING_BYTES
    chunks = min(max(1, budget // staging_bytes(shape, chunk_rows)), -(-shape.num_rows // chunk_rows) or 1)
    affordable = one_product_bytes(shape, logits_chunk_bytes(shape, chunk_rows)) <= _GPU_EXTRA_BYTES
    if shape.grad_head and (affordable or _saves_accumulator(shape, chunks * chunk_rows)):
        return max(shape.num_rows, chunk_rows)
    return chunk_rows * chunks


def _staging_rows_on_cpu(shape: Shape, chunk_rows: int) -> int:
    """Rows are staged only if they are rounded, and make the accumulator unnecessary or are added to bfloat16."""
    if operand_dtype(shape.dtype, "cpu") == accumulation_dtype(shape.dtype):
        return 0
    adds = adds_to_bf16(shape.dtype, "cpu")
    if shape.grad_head and _saves_accumulator(shape, _STAGING_ROWS if adds else _PACKED_CHUNK.rows):
        # A product of few rows is mostly reading W: at least three chunks.
        rows = max(-(-_rows_without_accumulator(shape) // chunk_rows), 3) * chunk_rows
        chunk = logits_chunk_bytes(shape, chunk_rows)
        if one_product_bytes(shape, chunk) <= chunk + staging_bytes(shape, rows) + _ONE_PRODUCT_EXTRA_BYTES:
            rows = shape.num_rows
    elif adds:
        rows = _STAGING_ROWS
    else:
        return 0
    return max(chunk_rows, min(shape.num_rows, -(-rows // chunk_rows) * chunk_rows))


def logits_chunk_bytes(shape: Shape, chunk_rows: int, num_models: int = 2) -> int:
    """Returns the memory of a logits chunk; calls without a teacher have one model."""
    return num_models * chunk_rows * shape.vocab_size * accumulation_dtype(shape.dtype).itemsize


def staging_bytes(shape: Shape, staging_rows: int) -> int:
    """Returns the memory of `staging_rows` logit gradients in the dtype of the products' operands."""
    return staging_rows * shape.vocab_size * operand_dtype(shape.dtype, shape.device_type).itemsize


def stored_gradient_bytes(shape: Shape) -> int:
    """Returns the memory of the logit gradients that plan `kept_gradient` stores."""
    return (2 if shape.logprob_grad else 1) * staging_bytes(shape, shape.num_rows)


def accumulator_bytes(shape: Shape, staging_rows: int) -> int:
    """Returns the memory of the dW accumulator (or of its bfloat16 residuals) in addition to dW itself."""
    if not shape.grad_head or shape.dtype == accumulation_dtype(shape.dtype):
        return 0
    adds = staging_rows > 0 and adds_to_bf16(shape.dtype, shape.device_type)
    if shape.dtype != torch.float16 and shape.num_rows <= staging_rows * (ROUNDED_SUMS if adds else 1):
        return 0
    return head_bytes(shape) if adds else wide_head_bytes(shape)


def one_product_bytes(shape: Shape, chunk: int) -> int:
    """Returns the peak memory of a call that stages all rows, with `chunk` bytes of logits.

    dW takes the memory of the logits; in float16 its float32 accumulator does.
    """
    staging = staging_bytes(shape, shape.num_rows)
    if shape.dtype == torch.float16:
        return staging + max(chunk, accumulator_bytes(shape, shape.num_rows))
    return staging + max(0, chunk - head_bytes(shape))


def head_bytes(shape: Shape) -> int:
    """Returns the memory of dW, 0 if it is not needed."""
    return shape.vocab_size * shape.hidden_size * shape.dtype.itemsize if shape.grad_head else 0


def wide_head_bytes(shape: Shape) -> int:
    """Returns the memory of dW in the accumulation dtype."""
    return shape.vocab_size * shape.hidden_size * accumulation_dtype(shape.dtype).itemsize


def _chunk_budget(shape: Shape) -> int:
    budget = LOGITS_CHUNK_BYTES.get(shape.device_type, LOGITS_CHUNK_BYTES["cuda"])
    if shape.device_type == "cpu" or not shape.grad_head:
        return budget
    several_products = 2 * budget + STAGING_BYTES + wide_head_bytes(shape)
    fits = min(one_product_bytes(shape, 2 * budget), several_products) <= _GPU_EXTRA_BYTES
    return 2 * budget if fits else budget


def _saves_accumulator(shape: Shape, staging_rows: int) -> bool:
    """Returns whether staging without a dW accumulator takes no more memory than `staging_rows` rows with one."""
    if shape.dtype == torch.float16:
        return False
    adds = adds_to_bf16(shape.dtype, shape.device_type)
    accumulator = head_bytes(shape) if adds else wide_head_bytes(shape)
    return staging_bytes(shape, _rows_without_accumulator(shape)) <= staging_bytes(shape, staging_rows) + accumulator


def _rows_without_accumulator(shape: Shape) -> int:
    """Returns the fewest staging rows that need no dW accumulator."""
    return -(-shape.num_rows // ROUNDED_SUMS) if adds_to_bf16(shape.dtype, shape.device_type) else shape.num_rows
