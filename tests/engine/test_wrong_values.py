"""Wrong values of every argument of every public op: an error names the argument that it is about."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

import distil_kernels
from distil_kernels.engine.plan import Plan
from distil_kernels.losses import LossOptions

N, V, D, K, B = 6, 11, 4, 2, 3
OPS = [name for name in distil_kernels.__all__ if name.startswith(("fused", "token"))]

VALID: dict[str, Any] = {
    "student_hidden": torch.zeros(N, D),
    "student_weight": torch.zeros(V, D),
    "teacher_hidden": torch.zeros(N, D),
    "teacher_weight": torch.zeros(V, D),
    "teacher_ids": torch.arange(K).expand(N, K),
    "teacher_logprobs": torch.full((N, K), -2.0),
    "tokens": torch.zeros(N, dtype=torch.int64),
    "cu_seqlens": torch.tensor([0, 2, 4, N]),
    "advantages": torch.zeros(N),
}

WRONG: dict[str, Any] = {
    "None": None,
    "True": True,
    "0": 0,
    "-1": -1,
    "3": 3,
    "0.0": 0.0,
    "-1.0": -1.0,
    "0.5": 0.5,
    "1e-45": 1e-45,
    "3e38": 3e38,
    "1e300": 1e300,
    "nan": float("nan"),
    "inf": float("inf"),
    "-inf": -float("inf"),
    "10**400": 10**400,
    "complex": 1 + 2j,
    "text": "mean of all",
    "empty text": "",
    "bytes": b"sum",
    "list": [1.0, 2.0],
    "empty list": [],
    "dict": {"a": 1},
    "set": {1},
    "object": object(),
    "function": torch.zeros,
    "dtype": torch.float32,
    "tuple": (1, 2),
    "Plan of no name": Plan("fast", 4, 0),
    "Plan of no rows": Plan("recompute", 0, 0),
    "Plan of text": Plan("recompute", "4", 0),  # type: ignore[arg-type]
    "Plan of None": Plan("recompute", 4, None),  # type: ignore[arg-type]
    "Plan of half a row": Plan("recompute", 1.5, 0),  # type: ignore[arg-type]
    "scalar tensor": torch.tensor(1.0),
    "empty tensor": torch.zeros(0),
    "[N]": torch.zeros(N),
    "[N + 1]": torch.zeros(N + 1),
    "[N] int": torch.zeros(N, dtype=torch.int64),
    "[N] int32": torch.zeros(N, dtype=torch.int32),
    "[N] bool": torch.zeros(N, dtype=torch.bool),
    "[N] complex": torch.zeros(N, dtype=torch.complex64),
    "[N] of -100": torch.full((N,), -100),
    "[N] of V": torch.full((N,), V),
    "[N] of nan": torch.full((N,), float("nan")),
    "[N] on meta": torch.zeros(N, device="meta"),
    "[N] sparse": torch.ones(N).to_sparse(),
    "[N, D] double": torch.zeros(N, D, dtype=torch.float64),
    "[N, D] half": torch.zeros(N, D, dtype=torch.float16),
    "[N, D] int": torch.zeros(N, D, dtype=torch.int64),
    "[N, D] complex": torch.zeros(N, D, dtype=torch.complex64),
    "[N, D] on meta": torch.zeros(N, D, device="meta"),
    "[N, D + 1]": torch.zeros(N, D + 1),
    "[N, 0]": torch.zeros(N, 0),
    "[2, 3, D]": torch.zeros(2, 3, D),
    "[V, D + 1]": torch.zeros(V, D + 1),
    "[V + 1, D]": torch.zeros(V + 1, D),
    "[0, D]": torch.zeros(0, D),
    "[V, D] sparse": torch.ones(V, D).to_sparse(),
    "[V, D] half": torch.zeros(V, D, dtype=torch.float16),
    "[V] on meta": torch.zeros(V, device="meta"),
    "[V] int": torch.zeros(V, dtype=torch.int64),
    "[N, K] of V": torch.full((N, K), V),
    "[N, K] of one id": torch.zeros(N, K, dtype=torch.int64),
    "[N, K] of nan": torch.full((N, K), float("nan")),
    "[N, K] above 0": torch.full((N, K), 1.0),
    "[N, 0] int": torch.zeros(N, 0, dtype=torch.int64),
    "[N, K] int32": torch.zeros(N, K, dtype=torch.int32),
    "falling borders": torch.tensor([0, 4, 2, N]),
    "borders of fewer rows": torch.tensor([0, 2]),
    "borders on meta": torch.tensor([0, N], device="meta"),
    "borders of floats": torch.tensor([0.0, N]),
    "[B + 1, 1]": torch.zeros(B + 1, 1, dtype=torch.int64),
}


def parameters(op: str) -> list[str]:
    """Every argument of an op; options that it only passes on are `LossOptions`."""
    found = inspect.signature(getattr(distil_kernels, op)).parameters.values()
    names = [each.name for each in found if each.kind is not each.VAR_KEYWORD]
    return names if len(names) == len(found) else [*names, *(set(LossOptions.__annotations__) - set(names))]


def outcome(op: str, argument: str, value: object) -> Exception | None:
    arguments = {name: each for name, each in VALID.items() if name in parameters(op)}
    try:
        getattr(distil_kernels, op)(**{**arguments, argument: value})
    except Exception as error:
        return error
    return None


@pytest.mark.parametrize("op", OPS)
def test_every_error_names_its_argument(op):
    assert outcome(op, "student_hidden", VALID["student_hidden"]) is None
    nameless = []
    for argument in parameters(op):
        for label, value in WRONG.items():
            error = outcome(op, argument, value)
            is_clear = error is None or (isinstance(error, (ValueError, TypeError)) and argument in str(error))
            if not is_clear or "\n" in str(error):
                nameless.append(f"{argument} = {label}: {type(error).__name__}: {error}")
    assert not nameless, "\n".join(nameless)
