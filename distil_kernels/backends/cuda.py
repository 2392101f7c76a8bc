"""Back end `cuda`: the C++ row kernels of csrc/cuda for NVIDIA GPUs from sm_80 on. Not yet run on a GPU.

    row_stats, row_grad    a block per row
    cost_to_go             a block per 512 positions of a sequence
    row_stats_grad         from compute capability 9.0 on a cluster of blocks may hold a row in shared memory and read
                           its logits once (`choose_row_kernel`); else the first two

float32 logits only, so float32, bfloat16 and float16 inputs; float64 belongs to `reference`. Kernels go to torch's
current stream and never wait.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

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
from distil_kernels.backends.row_task import grad_rows, row_task

try:
    from distil_kernels import _C
except ImportError as error:  # not built, or built for another Python
    _C = None  # type: ignore[assignment]
    _IMPORT_ERROR = str(error)

_CLUSTER_SIZES = (1, 2, 4, 8)


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return f"it runs on NVIDIA GPUs, these tensors are on {device}"
    if dtype == torch.float64:
        return "its kernels keep float32 logits, float64 needs backend='reference'"
    return _device_problem(device)


@constant_to_dynamo  # torch.compile cannot look into the extension
def _device_problem(device: torch.device) -> str | None:
    if torch.version.hip is not None:
        return "it runs on NVIDIA GPUs, this torch is built for AMD's"
    if _C is None:
        return f"the extension is not built ({_IMPORT_ERROR}); run pip install -e . in the repository"
    if not hasattr(_C, "cuda_row_stats"):
        return f"the extension has no CUDA kernels: {_C.cuda_missing}; then run pip install -e . again"
    error = _C.cuda_device_error()
    if error != 0:
        return f"the CUDA runtime finds no GPU: {_C.cuda_error_text(error)}"
    capability = device_limits(_index(device)).capability
    if capability < (8, 0):
        return f"it is compiled for compute capability 8.0 and later, this GPU has {capability[0]}.{capability[1]}"
    return None


class DeviceLimits(NamedTuple):
    """What the CUDA runtime says about a GPU."""

    capability: tuple[int, int]
    block_bytes: int
    """Shared memory that a kernel may ask for per block."""


@cache
def device_limits(index: int) -> DeviceLimits:
    limits = _C.DeviceLimits()
    _check(_C.cuda_device_limits(index, limits))
    return DeviceLimits((limits.capability_major, limits.capability_minor), limits.shared_bytes)


@cache
def cluster_fits(index: int, vocab_size: int, softcap: bool, cluster_size: int) -> bool:
    """False where the GPU cannot run one such cluster, as on a slice of it with too few multiprocessors."""
    with torch.cuda.device(index):
        error, num_clusters = _C.cuda_max_clusters(vocab_size, softcap, cluster_size)
    return error == 0 and num_clusters > 0


class RowKernel(NamedTuple):
    """How `row_stats_grad` runs."""

    cluster_size: int
    """Blocks that share a row; 0 for two kernels that each read the logits."""
    reason: str


TWO_KERNELS = 0


def cluster_bytes(vocab_size: int, cluster_size: int) -> int:
    """Shared memory of one block: its share of both models' row in whole vectors, and a reduction's scratch."""
    return 2 * 16 * -(-vocab_size // (4 * cluster_size)) + 2048


def choose_row_kernel(limits: DeviceLimits, vocab_size: int, aligned: bool) -> RowKernel:
    """Chooses the smallest cluster of which two blocks share a multiprocessor (one loads while the other computes),
    else two kernels. Not yet timed: bench/gpu/check.py `tune` times every choice.

    A cluster with one block to a multiprocessor, as for a vocabulary of more than 114,000 entries on an H100, loads,
    sums and writes one after another: by its instruction count it takes 8.3 to 9.9 ms for 8192 rows of 151,936, two
    kernels 6.0 to 6.5 ms. Compiled for 12.0, it takes more registers than two blocks have; for 9.0 and 10.0 a test
    holds it to theirs.

    Args:
        aligned: every row begins at a multiple of 16 bytes.
    """
    if limits.capability < (9, 0):
        return RowKernel(TWO_KERNELS, "compute capability {}.{} has no clusters".format(*limits.capability))
    if not aligned:
        return RowKernel(TWO_KERNELS, "rows do not all begin at multiples of 16 bytes")
    if limits.capability >= (12, 0):
        return RowKernel(TWO_KERNELS, "compute capability 12.0 has registers for one block to a multiprocessor")
    for size in _CLUSTER_SIZES:
        if 2 * cluster_bytes(vocab_size, size) <= limits.block_bytes:
            return RowKernel(size, "two blocks to a multiprocessor")
    needed = cluster_bytes(vocab_size, _CLUSTER_SIZES[-1])
    return RowKernel(
        TWO_KERNELS,
        f"a row takes {needed} bytes in each of {_CLUSTER_SIZES[-1]} blocks, a multiprocessor has {limits.block_bytes} "
        f"for two of them",
    )


def row_stats(
    logits: LogitPair, student: LogitTransform, teacher: LogitTransform, tokens: Tensor | None, cost: Cost
) -> Tensor:
    statistics = _new_statistics(logits)
    with torch.cuda.device(logits.student.device):
        _check(_C.cuda_row_stats(row_task(_C, logits, student, teacher, tokens, cost, statistics), _stream()))
    return statistics


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
    residual = _new_residual(out, out.shape[0])
    task = row_task(_C, logits, student, teacher, tokens, cost, statistics)
    grad = grad_rows(_C, out, cost_weight, logprob_weight, residual, terms)
    with torch.cuda.device(logits.student.device):
        _check(_C.cuda_row_grad(task, grad, _stream()))
    return residual


def row_mixture(
    logits: LogitPair, student: LogitTransform, teacher: LogitTransform, statistics: Tensor, cost: Cost
) -> None:
    with torch.cuda.device(logits.student.device):
        _check(_C.cuda_row_mixture(row_task(_C, logits, student, teacher, None, cost, statistics), _stream()))


def row_stats_grad(
    logits: LogitPair,
    student: LogitTransform,
    teacher: LogitTransform,
    tokens: Tensor | None,
    cost: Cost,
    cost_weight: Tensor,
    out: Tensor,
) -> tuple[Tensor, Tensor | None]:
    device, index = logits.student.device, _index(logits.student.device)
    num_rows, vocab_size = logits.student.shape
    softcap = student.softcap is not None or teacher.softcap is not None
    aligned = all(_aligned(tensor) for tensor in (*logits, out, student.bias, teacher.bias))
    kernel = choose_row_kernel(device_limits(index), vocab_size, aligned)
    if (
        kernel.cluster_size == TWO_KERNELS
        or cost.statistic not in (Statistic.FORWARD_CE, Statistic.FORWARD_KL)
        or not cluster_fits(index, vocab_size, softcap, kernel.cluster_size)
    ):
        statistics = row_stats(logits, student, teacher, tokens, cost)
        return statistics, row_grad(logits, student, teacher, tokens, statistics, cost, cost_weight, None, out)
    statistics, residual = _new_statistics(logits), _new_residual(out, num_rows, kernel.cluster_size)
    task = row_task(_C, logits, student, teacher, tokens, cost, statistics)
    grad = grad_rows(_C, out, cost_weight, None, residual)
    with torch.cuda.device(device):
        _check(_C.cuda_row_stats_grad(task, grad, kernel.cluster_size, _stream()))
    return statistics, None if residual is None else residual.sum(-1)


def cost_to_go(
    costs: Tensor, slots: Tensor, later: Tensor | None, discount: float, horizon: int | None
) -> tuple[Tensor, Tensor]:
    num_positions, num_sequences = slots.shape
    if later is None:
        later = costs.new_zeros(horizon or 1, num_sequences, dtype=torch.float64)
    to_go, next_later = costs.new_empty(slots.shape), torch.empty_like(later)
    grid = _C.CostGrid(
        costs.data_ptr(), slots.data_ptr(), later.data_ptr(), num_positions, num_sequences, later.shape[0]
    )
    with torch.cuda.device(costs.device):
        _check(_C.cuda_cost_to_go(grid, discount, horizon or 0, to_go.data_ptr(), next_later.data_ptr(), _stream()))
    return to_go, next_later


def _new_statistics(logits: LogitPair) -> Tensor:
    return logits.student.new_empty(NUM_STATISTICS, logits.student.shape[0])


def _new_residual(out: Tensor, *size: int) -> Tensor | None:
    """What the sum of each gradient row loses to rounding; None where `out` is float32."""
    return None if out.dtype == torch.float32 else out.new_empty(size, dtype=torch.float32)


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _check(error: int) -> None:
    if error != 0:
        raise RuntimeError(f"a CUDA row kernel could not be launched: {_C.cuda_error_text(error)}")


def _stream() -> int:
    return torch.cuda.current_stream().cuda_stream


def _aligned(tensor: Tensor | None) -> bool:
    if tensor is None:
        return True
    stride = tensor.stride(0) * tensor.element_size() if tensor.dim() == 2 else 0
    return tensor.data_ptr() % 16 == 0 and stride % 16 == 0
