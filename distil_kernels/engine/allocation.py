"""Large blocks of memory on the CPU whose first touch is cheap; copies to a GPU for which nothing waits.

A fresh block of 200 MiB is 51,200 pages of 4 KiB, and the first write to each traps into the kernel: 5 to 10 % of a
whole operation whose products take a second. Where Linux leaves huge pages to those who ask (`madvise`, the usual
setting), asking makes that 100 pages of 2 MiB. Nothing else changes; elsewhere this is plain `empty`.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

_MADV_HUGEPAGE = 14  # sys/mman.h
_HUGE_PAGE = 2**21


def empty(*size: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns uninitialised memory on the device of `like`."""
    block = like.new_empty(*size, dtype=dtype)
    _ask_for_huge_pages(block)
    return block


def _ask_for_huge_pages(block: Tensor) -> None:
    madvise = _madvise()
    if madvise is None or block.device.type != "cpu" or block.nbytes < 4 * _HUGE_PAGE:
        return
    begin = -(-block.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
    end = (block.data_ptr() + block.nbytes) // _HUGE_PAGE * _HUGE_PAGE
    madvise(begin, end - begin, _MADV_HUGEPAGE)  # advice: a refusal costs nothing


@cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns a copy of a tensor on the CPU that does not synchronise a GPU.

    Raises:
        RuntimeError: a CUDA graph is captured, and torch is older than 2.11: it reuses the pinned memory after the
            capture, and a replay copies whatever is there then.
    """
    if device.type != "cuda":
        return tensor.to(device)
    major, minor = torch.__version__.split(".")[:2]
    if (int(major), int(minor)) < (2, 11) and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "[distil_kernels] credit cannot be captured in a CUDA graph before torch 2.11: a replay would read "
            "recycled memory"
        )
    with torch.cuda.device(device):  # pinning makes a context on the current device
        return tensor.pin_memory().to(device, non_blocking=True)
