"""What torch's matrix products do on this GPU: float32 results of half-precision operands, and the use of TF32.

TF32 rounds float32 operands to 11 significant bits. For logits that loses what the library is for: with a teacher that
differs from the student by noise of .001, dh was off by 28 % (emulated; V = 16384, D = 512), because the difference of
two rounded logits is what remains. So float32 logits are IEEE float32 whatever torch's flags say. Rounding after the
subtraction is harmless, so dh and dW follow the flags. bfloat16 and float16 operands are exact in TF32: where a device
has no product of them with a float32 result, TF32 multiplies them, widened, without loss.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Iterator
from functools import cache
from typing import Literal

import torch
from torch import Tensor

_FLAG_LOCK = threading.RLock()  # one thread may nest two settings


@contextlib.contextmanager
def float32_precision(device: torch.device, precision: Literal["ieee", "tf32"]) -> Iterator[None]:
    """Sets how products of float32 matrices on a GPU are computed, and restores the user's setting.

    The setting belongs to the process: the lock keeps two threads from restoring each other's.
    """
    if device.type != "cuda":
        yield
        return
    flags = torch.backends.cuda.matmul
    # torch 2.9 has a new flag, and raises where the old one is read after the new one was set.
    name: str
    value: str | bool
    name, value = "fp32_precision", precision
    if not hasattr(flags, name):
        name, value = "allow_tf32", precision == "tf32"
    with _FLAG_LOCK:
        before = getattr(flags, name)
        setattr(flags, name, value)
        try:
            yield
        finally:
            setattr(flags, name, before)


def exact_if_half(*operands: Tensor) -> contextlib.AbstractContextManager[None]:
    """Lets TF32 multiply half-precision operands that were widened to float32; leaves others to the user's setting."""
    if all(operand.dtype in (torch.bfloat16, torch.float16) for operand in operands):
        return float32_precision(operands[0].device, "tf32")
    return contextlib.nullcontext()


def has_float32_result(device: torch.device) -> bool:
    """Returns whether torch multiplies half-precision matrices to a float32 result on this device."""
    return _multiplies(device.type, torch.cuda.tunable.is_enabled() if device.type == "cuda" else False)


@cache
def _multiplies(device_type: str, tunable: bool) -> bool:
    """Multiplies two small matrices: an overload may exist without a kernel (ROCm before torch 2.9, MPS), and TunableOp
    has none."""
    small = torch.ones(16, 16, device=device_type, dtype=torch.bfloat16)
    try:
        torch.mm(small, small, out_dtype=torch.float32)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        reason = str(error).splitlines()[0]
        warnings.warn(
            f"distil_kernels widens half-precision operands to float32 on this {device_type} device, several times "
            f"slower: torch {torch.__version__} has no product of them with a float32 result here ({reason})",
            UserWarning,
            stacklevel=2,
        )
        return False
    return True
