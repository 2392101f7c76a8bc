"""Back end `cpu`: the C++ row kernels of csrc/cpu (AVX-512, AVX2 or portable, chosen at run time; OpenMP).

float32 logits only, so float32, bfloat16 and float16 inputs; float64 belongs to `reference`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distil_kernels.backends import NUM_STATISTICS, Cost, LogitPair, LogitTransform, RowTerms
from distil_kernels.backends.row_task import grad_rows, row_task

try:
    from distil_kernels import _C
except ImportError as error:  # not built, or built for another Python
    _C = None  # type: ignore[assignment]
    _IMPORT_ERROR = str(error)

INSTRUCTION_SETS = ("best", "portable", "avx2", "avx512")


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return f"it runs on CPU tensors, these are on {device}"
    if dtype == torch.float64:
        return "its kernels keep float32 logits, float64 needs backend='reference'"
    if _C is None:
        return f"the extension is not built ({_IMPORT_ERROR}); run pip install -e . in the repository"
    return None


def supported_instruction_sets() -> list[str]:
    """Returns the names that the row kernels take as `instruction_set` on this processor."""
    return [name for name in INSTRUCTION_SETS if _C.cpu_supports(getattr(_C.InstructionSet, name))]


def row_stats(
    logits: LogitPair,
    student: LogitTransform,
    teacher: LogitTransform,
    tokens: Tensor | None,
    cost: Cost,
    *,
    instruction_set: str = "best",
) -> Tensor:
    statistics = _new_statistics(logits)
    task = row_task(_C, logits, student, teacher, tokens, cost, statistics)
    _C.cpu_row_stats(task, torch.get_num_threads(), getattr(_C.InstructionSet, instruction_set))
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
    *,
    instruction_set: str = "best",
) -> Tensor | None:
    residual = _new_residual(out)
    task = row_task(_C, logits, student, teacher, tokens, cost, statistics)
    grad = grad_rows(_C, out, cost_weight, logprob_weight, residual, terms)
    _C.cpu_row_grad(task, grad, torch.get_num_threads(), getattr(_C.InstructionSet, instruction_set))
    return residual


def row_mixture(
    logits: LogitPair,
    student: LogitTransform,
    teacher: LogitTransform,
    statistics: Tensor,
    cost: Cost,
    *,
    instruction_set: str = "best",
) -> None:
    task = row_task(_C, logits, student, teacher, None, cost, statistics)
    _C.cpu_row_mixture(task, torch.get_num_threads(), getattr(_C.InstructionSet, instruction_set))


def row_stats_grad(
    logits: LogitPair,
    student: LogitTransform,
    teacher: LogitTransform,
    tokens: Tensor | None,
    cost: Cost,
    cost_weight: Tensor,
    out: Tensor,
    *,
    instruction_set: str = "best",
) -> tuple[Tensor, Tensor | None]:
    statistics, residual = _new_statistics(logits), _new_residual(out)
    task = row_task(_C, logits, student, teacher, tokens, cost, statistics)
    grad = grad_rows(_C, out, cost_weight, None, residual)
    _C.cpu_row_stats_grad(task, grad, torch.get_num_threads(), getattr(_C.InstructionSet, instruction_set))
    return statistics, residual


# The C++ kernels write float32 on the CPU: torch's default dtype and device must not change that.


def _new_statistics(logits: LogitPair) -> Tensor:
    return torch.empty(NUM_STATISTICS, logits.student.shape[0], dtype=torch.float32, device="cpu")


def _new_residual(out: Tensor) -> Tensor | None:
    """[R]: what the sum of each gradient row loses to rounding; None where `out` is float32."""
    return torch.empty(out.shape[0], dtype=torch.float32, device="cpu") if out.dtype == torch.bfloat16 else None
