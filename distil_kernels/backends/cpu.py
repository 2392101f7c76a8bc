"""Back end `cpu`: the C++ row kernels of csrc/cpu (AVX-512, AVX2 or portable, chosen at run time; OpenMP).

float32 logits only, so float32, bfloat16 and float16 inputs; float64 belongs to `reference`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distil_kernels.backends import NUM_STATISTICS, Cost, LogitPair, LogitTransform

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
    """Names that the row kernels take as `instruction_set` on this processor."""
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
    num_rows, vocab_size = logits.student.shape
    statistics = torch.empty(NUM_STATISTICS, num_rows, dtype=torch.float32)  # whatever the default is: C++ writes it
    _C.cpu_row_stats(
        _rows(logits.student, student),
        _rows(logits.teacher, teacher),
        _address(tokens),
        _C.Cost(*cost),
        num_rows,
        vocab_size,
        _address(statistics),
        torch.get_num_threads(),
        getattr(_C.InstructionSet, instruction_set),
    )
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
    *,
    instruction_set: str = "best",
) -> Tensor | None:
    num_rows, vocab_size = logits.student.shape
    rounding = _room_for_rounding(out)
    _C.cpu_row_grad(
        _rows(logits.student, student),
        _rows(logits.teacher, teacher),
        _address(tokens),
        _address(statistics),
        _C.Cost(*cost),
        _address(cost_weight),
        _address(logprob_weight),
        num_rows,
        vocab_size,
        _grad_rows(out),
        _address(rounding),
        torch.get_num_threads(),
        getattr(_C.InstructionSet, instruction_set),
    )
    return rounding


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
    num_rows, vocab_size = logits.student.shape
    statistics = torch.empty(NUM_STATISTICS, num_rows, dtype=torch.float32)
    rounding = _room_for_rounding(out)
    _C.cpu_row_stats_grad(
        _rows(logits.student, student),
        _rows(logits.teacher, teacher),
        _address(tokens),
        _C.Cost(*cost),
        _address(cost_weight),
        num_rows,
        vocab_size,
        _address(statistics),
        _grad_rows(out),
        _address(rounding),
        torch.get_num_threads(),
        getattr(_C.InstructionSet, instruction_set),
    )
    return statistics, rounding


def _room_for_rounding(out: Tensor) -> Tensor | None:
    return torch.empty(out.shape[0], dtype=torch.float32) if out.dtype == torch.bfloat16 else None


def _grad_rows(out: Tensor) -> _C.GradRows:
    return _C.GradRows(out.data_ptr(), out.stride(0), getattr(_C.FloatType, str(out.dtype).removeprefix("torch.")))


def _rows(raw: Tensor, transform: LogitTransform) -> _C.LogitRows:
    return _C.LogitRows(
        raw.data_ptr(),
        raw.stride(0),
        _address(transform.bias),
        transform.softcap or 0.0,
        1.0 / transform.temperature,
    )


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
