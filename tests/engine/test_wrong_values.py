"""Wrong values of every argument of every public op: an error names the argument that it is about."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
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
    "labels": torch.full((N,), -100),
    "reference_logprobs": torch.zeros(N),
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


def unclear_errors(function: Callable[..., object], valid: dict[str, Any], names: Iterable[str]) -> list[str]:
    """Calls with each argument replaced by each wrong value; errors that do not name it, or take several lines."""
    function(**valid)
    unclear = []
    for argument in names:
        for label, value in WRONG.items():
            try:
                function(**{**valid, argument: value})
            except Exception as error:
                names_it = isinstance(error, (ValueError, TypeError)) and argument in str(error)
                if not names_it or "\n" in str(error):
                    unclear.append(f"{argument} = {label}: {type(error).__name__}: {error}")
    return unclear


@pytest.mark.parametrize("op", OPS)
def test_every_error_names_its_argument(op):
    names = parameters(op)
    valid = {name: each for name, each in VALID.items() if name in names}
    assert not unclear_errors(getattr(distil_kernels, op), valid, names)


def test_every_error_of_an_explanation():
    valid = {"op": "fused_topk_distil_loss", "num_rows": 8, "vocab_size": V, "hidden_size": D, "num_named": K,
             "dtype": torch.float32, "device": "cpu", "needs_grad": ("student_hidden",)}  # fmt: skip
    assert not unclear_errors(distil_kernels.explain, valid, valid)
