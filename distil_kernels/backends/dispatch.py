"""The choice of a back end: a pure function that says why; tests assert its answers."""

from __future__ import annotations

import warnings
from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch

from distil_kernels.backends import cpu, cuda, reference, triton

BACKENDS: dict[str, ModuleType] = {"cuda": cuda, "triton": triton, "cpu": cpu, "reference": reference}
"""The back ends in order of preference."""

_NEVER_AUTOMATIC = {"cpu": ("triton",)}
"""Back ends that "auto" does not choose, by device type: Triton's interpreter runs on CPU tensors for tests only."""


class BackendChoice(NamedTuple):
    """A back end, and why it was chosen."""

    name: str
    reason: str

    @property
    def kernels(self) -> ModuleType:
        """The module that has `row_stats` and `row_grad`."""
        return BACKENDS[self.name]


def choose_backend(requested: str, device: torch.device, dtype: torch.dtype) -> BackendChoice:
    """Returns the back end for tensors of `dtype` on `device`.

    Raises:
        ValueError: `requested` is no back end's name.
        RuntimeError: it was asked for by name and cannot run there; the message says why.
    """
    if requested != "auto":
        if not isinstance(requested, str) or requested not in BACKENDS:
            came = repr(requested) if isinstance(requested, str) else type(requested).__name__
            raise ValueError(f"backend must be 'auto' or one of {sorted(BACKENDS)}, got {came}")
        why_not = BACKENDS[requested].unavailable(device, dtype)
        if why_not is not None:
            raise RuntimeError(f"backend={requested!r} cannot run here: {why_not}")
        return BackendChoice(requested, "asked for by name")
    refusals: list[str] = []
    for name, module in BACKENDS.items():
        if name in _NEVER_AUTOMATIC.get(device.type, ()):
            continue
        why_not = module.unavailable(device, dtype)
        if why_not is None:
            if name == "reference" and dtype != torch.float64:
                _warn_once("; ".join(refusals))
            return BackendChoice(name, "; ".join(refusals) or "first choice")
        refusals.append(f"{name}: {why_not}")
    raise AssertionError("the reference back end runs everywhere")


@cache
def _warn_once(refusals: str) -> None:
    warnings.warn(
        f"distil_kernels falls back to plain torch (backend='reference'): {refusals}", UserWarning, stacklevel=2
    )
