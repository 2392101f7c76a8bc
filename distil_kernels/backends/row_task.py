"""Arguments of the C++ row kernels (csrc/distil_kernels.h), made from tensors for the back ends `cpu` and `cuda`.

`extension` is the module that has the kernels: `distil_kernels._C`, or in tests its emulation.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from distil_kernels.backends import Cost, LogitPair, LogitTransform, RowTerms


def row_task(
    extension: Any,
    logits: LogitPair,
    student: LogitTransform,
    teacher: LogitTransform,
    tokens: Tensor | None,
    cost: Cost,
    statistics: Tensor,
) -> Any:
    return extension.RowTask(
        student=_logit_rows(extension, logits.student, student),
        teacher=_logit_rows(extension, logits.teacher, teacher),
        tokens=_address(tokens),
        cost=extension.Cost(*cost),
        num_rows=logits.student.shape[0],
        vocab_size=logits.student.shape[1],
        statistics=statistics.data_ptr(),
    )


def grad_rows(
    extension: Any,
    out: Tensor,
    cost_weight: Tensor,
    logprob_weight: Tensor | None,
    residual: Tensor | None,
    terms: RowTerms | None = None,
) -> Any:
    of_terms = {} if terms is None else {"term_weights": _address(terms.weights), "labels": _address(terms.labels)}
    return extension.GradRows(
        cost_weight=cost_weight.data_ptr(),
        logprob_weight=_address(logprob_weight),
        data=out.data_ptr(),
        row_stride=out.stride(0),
        type=getattr(extension.FloatType, str(out.dtype).removeprefix("torch.")),
        residual=_address(residual),
        **of_terms,
    )


def _logit_rows(extension: Any, raw: Tensor, transform: LogitTransform) -> Any:
    return extension.LogitRows(
        raw=raw.data_ptr(),
        row_stride=raw.stride(0),
        bias=_address(transform.bias),
        softcap=transform.softcap or 0.0,
        inverse_temperature=1.0 / transform.temperature,
    )


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
