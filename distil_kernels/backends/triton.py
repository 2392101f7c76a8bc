"""Back end `triton`: row kernels for any GPU that Triton knows. Not yet run on a GPU.

    row_stats   row_partials over (row, block of 4096 columns), then merge_partials over rows
    row_grad    one elementwise kernel over (row, block)
    head_stats  head_partials over (tile of rows, split of the vocabulary), then merge_partials: no logits in memory
    cost_to_go  one kernel over (position, sequence)

The kernels and their mathematics are in `triton_kernels`, those of the last one in `triton_cost_to_go`. They are
checked in Triton's interpreter (TRITON_INTERPRET=1, where they take CPU tensors) and compiled ahead of time.
float32 logits only, so float32, bfloat16 and float16 inputs; float64 belongs to `reference`.

Triton is imported at the first use: the package works without it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distil_kernels.backends import (
    NUM_STATISTICS,
    Cost,
    LogitPair,
    LogitTransform,
    RowTerms,
    Statistic,
    constant_to_dynamo,
)

_MAX_BLOCK = 4096
"""Columns of one program: 16 per thread and model. One program for a row of 150k would leave most of the GPU idle."""

_MAX_POSITIONS = 256
"""Positions that a program of `cost_to_go` adds up at once: eight float64 per thread."""


@cache
def _import_kernels() -> ModuleType | str:
    """Returns the module of kernels, or the reason why it cannot be imported."""
    try:
        from distil_kernels.backends import triton_kernels
    except ImportError as error:
        return f"triton cannot be imported ({error}); run pip install triton"
    return triton_kernels


def _kernels() -> ModuleType:
    module = _import_kernels()
    assert isinstance(module, ModuleType)
    return module


def interprets() -> bool:
    """Returns whether Triton was imported with TRITON_INTERPRET=1: kernels then run on the CPU, for tests."""
    import triton

    return not isinstance(_kernels().row_grad, triton.JITFunction)


@constant_to_dynamo  # torch.compile cannot trace the import
def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    if dtype == torch.float64:
        return "its kernels keep float32 logits, float64 needs backend='reference'"
    kernels = _import_kernels()
    if isinstance(kernels, str):
        return kernels
    if device.type == "cpu" and not interprets():
        return "it runs on GPU tensors, these are on cpu (TRITON_INTERPRET=1 lets it run there, slowly, for tests)"
    return None


def row_stats(
    logits: LogitPair, student: LogitTransform, teacher: LogitTransform, tokens: Tensor | None, cost: Cost
) -> Tensor:
    num_rows, vocab_size = logits.student.shape
    block, num_splits = _blocks(vocab_size)
    new = logits.student.new_empty
    partials, token_logits = new(num_rows, num_splits, _kernels().NUM_PARTIALS), _token_logits(new, num_rows, tokens)
    _launch(
        _kernels().row_partials, num_rows * num_splits, *_logit_arguments(logits, student, teacher), tokens,
        token_logits, partials, num_rows, vocab_size, num_splits, *_transform_flags(student, teacher),
        HAS_TOKENS=tokens is not None, BLOCK=block, num_warps=_num_warps(block),
    )  # fmt: skip
    statistics = _merge(partials, token_logits)
    if cost.statistic == Statistic.JSD:
        row_mixture(logits, student, teacher, statistics, cost)
    return statistics


def row_mixture(
    logits: LogitPair, student: LogitTransform, teacher: LogitTransform, statistics: Tensor, cost: Cost
) -> None:
    num_rows, vocab_size = logits.student.shape
    block, num_splits = _blocks(vocab_size)
    mixture = logits.student.new_empty(2, num_rows, num_splits)
    _launch(
        _kernels().mixture_partials, num_rows * num_splits, *_logit_arguments(logits, student, teacher),
        statistics, mixture, mixture.stride(0), cost.jsd_weight, num_rows, vocab_size, num_splits,
        *_transform_flags(student, teacher), BLOCK=block, num_warps=_num_warps(block),
    )  # fmt: skip
    student_kl, teacher_kl = mixture.sum(-1)
    statistics[Statistic.JSD] = cost.jsd_weight * teacher_kl + (1.0 - cost.jsd_weight) * student_kl
    statistics[Statistic.STUDENT_MIXTURE_KL] = student_kl


def row_grad(
    logits: LogitPair,
    student: LogitTransform,
    teacher: LogitTransform,
    tokens: Tensor | None,
    statistics: Tensor,
    cost: Cost,
    cost_weight: Tensor,
    logprob_weight: Tensor | None,
    out: Tensor,
    terms: RowTerms | None = None,
) -> Tensor | None:
    num_rows, vocab_size = logits.student.shape
    block, num_splits = _blocks(vocab_size)
    residual = None if out.dtype == torch.float32 else logits.student.new_empty(num_rows, num_splits)
    weights, labels = (None, None) if terms is None else terms
    _launch(
        _kernels().row_grad, num_rows * num_splits, *_logit_arguments(logits, student, teacher), tokens, statistics,
        cost_weight, logprob_weight, weights, labels, cost.jsd_weight, out, out.stride(0), residual, num_rows,
        vocab_size, num_splits, *_transform_flags(student, teacher), HAS_LOGPROB=logprob_weight is not None,
        HAS_TERMS=weights is not None, HAS_LABELS=labels is not None, ROUNDS=residual is not None,
        COST=int(cost.statistic), BLOCK=block, num_warps=_num_warps(block),
    )  # fmt: skip
    return None if residual is None else residual.sum(-1)


def head_stats(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    student: LogitTransform,
    teacher: LogitTransform,
    tokens: Tensor | None,
) -> Tensor:
    """Returns the statistics of hidden [R, D] @ weight [V, D]^T; its scratch takes 40 bytes per row and split."""
    num_rows, vocab_size = student_hidden.shape[0], student_weight.shape[0]
    widest = torch.promote_types(student_hidden.dtype, teacher_hidden.dtype)
    gpu = _gpu(student_hidden.device)
    tile = choose_tile(gpu, widest)
    split_size, num_splits = choose_splits(num_rows, vocab_size, tile, gpu.num_processors)
    operands = [_operand(each) for each in (student_hidden, student_weight, teacher_hidden, teacher_weight)]

    def new(*shape: int) -> Tensor:
        return student_hidden.new_empty(shape, dtype=torch.float32)

    partials, token_logits = new(num_rows, num_splits, _kernels().NUM_PARTIALS), _token_logits(new, num_rows, tokens)
    _launch(
        _kernels().head_partials, -(-num_rows // tile.rows) * num_splits, *operands,
        *(each.stride(0) for each in operands), student.bias, teacher.bias, *_transform_arguments(student, teacher),
        tokens, token_logits, partials, num_rows, vocab_size, num_splits, split_size, student_hidden.shape[1],
        teacher_hidden.shape[1], *_transform_flags(student, teacher), HAS_TOKENS=tokens is not None,
        WIDEN=student_hidden.device.type == "cpu", ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return _merge(partials, token_logits)


def cost_to_go(
    costs: Tensor, slots: Tensor, later: Tensor | None, discount: float, horizon: int | None
) -> tuple[Tensor, Tensor]:
    from distil_kernels.backends import triton_cost_to_go

    num_positions, num_sequences = slots.shape
    if later is None:
        later = costs.new_zeros(horizon or 1, num_sequences, dtype=torch.float64)
    to_go, next_later = costs.new_empty(slots.shape), torch.empty_like(later)
    num_later = later.shape[0]
    rounded = float(torch.tensor(discount, dtype=torch.float32))
    _launch(
        triton_cost_to_go.cost_to_go, max(num_positions + 1, num_later) * num_sequences, costs, slots, later, to_go,
        next_later, rounded, discount - rounded, horizon or 0, num_positions, num_sequences, num_later,
        HAS_HORIZON=horizon is not None,
        BLOCK=min(_MAX_POSITIONS, _power_of_two(min(num_positions + num_later, horizon or num_positions + 1))),
        num_warps=1,
    )  # fmt: skip
    return to_go, next_later


class Gpu(NamedTuple):
    """The properties of a GPU that the choice of a tile depends on."""

    vendor: str
    """One of "cuda", "hip" and "interpreter"."""
    capability: tuple[int, int]
    num_processors: int


class Tile(NamedTuple):
    """Sizes of one program's part of the product in `head_stats`."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


def choose_tile(gpu: Gpu, dtype: torch.dtype) -> Tile:
    """Returns the largest tile whose two accumulators stay in registers (compiled for each; not yet timed).

    On AMD's GPUs the loads have two stages, which is what Triton's pipeliner is made for there. The capability does not
    tell them apart: that of an MI300 is (9, 4).
    """
    if gpu.vendor == "interpreter":
        return Tile(rows=16, columns=64, depth=32, num_warps=4, num_stages=1)
    if dtype.itemsize > 2:
        return Tile(rows=64, columns=64, depth=32, num_warps=8, num_stages=2)
    if gpu.vendor == "hip":
        return Tile(rows=128, columns=64, depth=64, num_warps=8, num_stages=2)
    if gpu.capability >= (9, 0):
        return Tile(rows=128, columns=64, depth=64, num_warps=8, num_stages=3)
    return Tile(rows=64, columns=128, depth=32, num_warps=8, num_stages=3)


def choose_splits(num_rows: int, vocab_size: int, tile: Tile, num_processors: int) -> tuple[int, int]:
    """Returns the columns of a split, a multiple of the tile's, and the number of splits.

    There are at least four programs per processor if the sizes allow it.
    """
    row_tiles = -(-num_rows // tile.rows) or 1
    column_tiles = -(-vocab_size // tile.columns)
    wanted = max(1, min(column_tiles, -(-4 * num_processors // row_tiles)))
    split_size = column_tiles // wanted * tile.columns
    return split_size, -(-vocab_size // split_size)


def _gpu(device: torch.device) -> Gpu:
    if device.type != "cuda":
        return Gpu("interpreter", (0, 0), 1)
    vendor = "cuda" if torch.version.hip is None else "hip"
    num_processors = torch.cuda.get_device_properties(device).multi_processor_count
    return Gpu(vendor, torch.cuda.get_device_capability(device), num_processors)


def _operand(matrix: Tensor) -> Tensor:
    """Returns the matrix with contiguous rows, which the kernel reads along."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _merge(partials: Tensor, token_logits: Tensor | None) -> Tensor:
    """Returns statistics [NUM_STATISTICS, R] from partials [R, splits, NUM_PARTIALS]."""
    num_rows, num_splits, _ = partials.shape
    statistics = partials.new_empty(NUM_STATISTICS, num_rows)
    _launch(
        _kernels().merge_partials, num_rows, partials, token_logits, statistics, num_rows, num_splits,
        HAS_TOKENS=token_logits is not None, SPLITS=_power_of_two(num_splits), num_warps=1,
    )  # fmt: skip
    return statistics


def _launch(kernel: Any, num_programs: int, *arguments: Any, **constants: Any) -> None:
    """Launches a kernel on the device of its first argument; Triton itself takes the current device."""
    device = arguments[0].device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        if num_programs > 0:
            kernel[(num_programs,)](*arguments, **constants)


def _token_logits(new: Callable[..., Tensor], num_rows: int, tokens: Tensor | None) -> Tensor | None:
    """Allocates both models' logits of the tokens [2, R]: NaN remains for an id outside the vocabulary."""
    return None if tokens is None else new(2, num_rows).fill_(float("nan"))


def _logit_arguments(logits: LogitPair, student: LogitTransform, teacher: LogitTransform) -> tuple:
    return (
        logits.student, logits.teacher, logits.student.stride(0), logits.teacher.stride(0), student.bias, teacher.bias,
        *_transform_arguments(student, teacher),
    )  # fmt: skip


def _transform_arguments(student: LogitTransform, teacher: LogitTransform) -> tuple[float, ...]:
    return student.softcap or 1.0, teacher.softcap or 1.0, 1.0 / student.temperature, 1.0 / teacher.temperature


def _transform_flags(student: LogitTransform, teacher: LogitTransform) -> tuple[bool, ...]:
    return (
        student.bias is not None, teacher.bias is not None, student.softcap is not None, teacher.softcap is not None,
    )  # fmt: skip


def _blocks(vocab_size: int) -> tuple[int, int]:
    """Returns the columns of a program, and the programs of a row."""
    block = min(_MAX_BLOCK, _power_of_two(vocab_size))
    return block, -(-vocab_size // block)


def _power_of_two(size: int) -> int:
    """Returns the smallest power of two that is not less than `size`."""
    return 1 << (size - 1).bit_length()


def _num_warps(block: int) -> int:
    """Returns the warps of a program: sixteen columns per thread, one to eight warps."""
    return max(1, min(8, block // 512))
