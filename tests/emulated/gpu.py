"""A GPU that is not there: tensors that say `cuda` and are computed on the CPU. So all that leads to a GPU's kernels
runs in tests without one.

    with emulated_gpu():
        there = torch.randn(3).to("cuda")

Shown are wrong branches, shapes, strides and dtypes, operands on two devices, and whatever would make the host wait
(`waits_are_errors`). Products of half precision with a float32 result are torch's of the widened operands. Kernels are
not part of it: back end `cuda` brings its emulator, `triton` its interpreter. It cannot show what only hardware does.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

GPU = torch.device("cuda", 0)
CAPABILITY = (9, 0)
PROPERTIES = SimpleNamespace(multi_processor_count=2)

aten = torch.ops.aten


class _Memory:
    """Bytes of the storages that tensors of the GPU hold."""

    def __init__(self) -> None:
        self._sizes: dict[StorageWeakRef, int] = {}
        self.peak = 0

    def note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self._sizes[StorageWeakRef(storage)] = storage.nbytes()
        if self.live() > self.peak:
            if os.environ.get("TRITON_INTERPRET") == "1":
                gc.collect()  # Triton's interpreter leaves operands in cycles
            self.peak = max(self.peak, self.live())

    def live(self, *_: Any) -> int:
        self._sizes = {storage: size for storage, size in self._sizes.items() if not storage.expired()}
        return sum(self._sizes.values())

    def forget_peak(self, *_: Any) -> None:
        self.peak = self.live()


_memory = _Memory()
_INDICES = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default)
_WAITS = (aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default)
_waits_are_errors = False


class OnGpu(Tensor):
    """What `held` holds, on the GPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnGpu:
        _memory.note(held)
        made = Tensor._make_wrapper_subclass(
            cls, held.size(), held.stride(), held.storage_offset(), dtype=held.dtype, device="cpu"
        )  # the autograd engine has threads for devices that are there
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnGpu({self.held})"

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def cpu(self) -> Tensor:
        return self.to("cpu")

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        places = [place for place in (*args, kwargs.pop("device", None)) if isinstance(place, (str, torch.device))]
        args = tuple(each for each in args if not isinstance(each, (str, torch.device)))
        if any(torch.device(place).type == "cpu" for place in places):
            _would_wait("a copy to the CPU")
            return self.held.clone().to(*args, **kwargs)
        return super().to(*args, **kwargs)

    def pin_memory(self) -> Tensor:
        raise RuntimeError("only a tensor on the CPU can be pinned")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "distil_kernels":
            with torch._C._EnableTorchFunction(), _ToGpu():
                return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        _check_devices(func, args, kwargs)
        if func in _WAITS or (func is aten.copy_.default and not all(isinstance(each, OnGpu) for each in args[:2])):
            _would_wait(str(func))
        here, options = tree_map_only(OnGpu, lambda tensor: tensor.held, (args, kwargs))
        options.pop("device", None)
        found = _compute(func, here, options)
        given = {id(tensor.held): tensor for tensor in (*args, *kwargs.values()) if isinstance(tensor, OnGpu)}
        return tree_map_only(Tensor, lambda tensor: given[id(tensor)] if id(tensor) in given else OnGpu(tensor), found)


def _compute(func: Any, args: tuple, kwargs: dict) -> Any:
    if func in (aten.mm.dtype, aten.mm.dtype_out):
        left, right, dtype = args
        return torch.mm(left.to(dtype), right.to(dtype), **kwargs)
    if func in (aten.addmm.dtype, aten.addmm.dtype_out):
        add, left, right, dtype = args
        return torch.addmm(add.to(dtype), left.to(dtype), right.to(dtype), **kwargs)
    return func(*args, **kwargs)


def _check_devices(func: Any, args: tuple, kwargs: dict) -> None:
    """On a GPU only numbers may come from the CPU, and indices."""
    if func in (aten.copy_.default, aten._to_copy.default, aten.view_as.default):
        return
    checked = args[:1] if func in _INDICES else args
    for tensor in torch.utils._pytree.tree_leaves((checked, kwargs)):
        if isinstance(tensor, Tensor) and not isinstance(tensor, OnGpu) and tensor.dim() > 0:
            raise RuntimeError(
                f"{func}: expected all tensors to be on the same device, found {list(tensor.shape)} on cpu"
            )


def _would_wait(what: str) -> None:
    if _waits_are_errors:
        raise RuntimeError(f"{what} makes the host wait for the GPU")


class _ToGpu(TorchFunctionMode):
    """What makes a tensor on the GPU of none that is there."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.pin_memory:
            pinned = args[0].clone()
            pinned.is_pinned_here = True
            return pinned
        if not any(map(_is_gpu, (*(args if func is Tensor.to else ()), kwargs.get("device")))):
            return func(*args, **kwargs)
        asynchronous = getattr(args[0], "is_pinned_here", False) and kwargs.get("non_blocking")
        if func in (Tensor.to, torch.tensor) and not asynchronous:
            _would_wait("a copy of memory that is not pinned")
        kwargs.pop("device", None)
        return OnGpu(func(*(each for each in args if not _is_gpu(each)), **kwargs).detach().clone())


def _is_gpu(place: Any) -> bool:
    return (isinstance(place, torch.device) and place.type == "cuda") or (
        isinstance(place, str) and place[:4] == "cuda"
    )


@contextlib.contextmanager
def emulated_gpu() -> Iterator[None]:
    def nothing(*_: Any) -> Any:
        return contextlib.nullcontext()

    with contextlib.ExitStack() as stack:
        for name, value in (
            ("device", nothing), ("stream", nothing), ("Stream", lambda: None), ("synchronize", lambda: None),
            ("is_available", lambda: True), ("current_device", lambda: 0),
            ("get_device_capability", lambda device=None: CAPABILITY),
            ("get_device_properties", lambda device=None: PROPERTIES), ("set_sync_debug_mode", _set_sync_debug_mode),
            ("memory_allocated", _memory.live), ("max_memory_allocated", lambda device=None: _memory.peak),
            ("reset_peak_memory_stats", _memory.forget_peak),
        ):  # fmt: skip
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(torch.cuda.tunable, "is_enabled", lambda: False))
        stack.enter_context(_ToGpu())
        gc.freeze()  # what was there before is no garbage of this GPU's, and `_Memory` looks for it often
        stack.callback(gc.unfreeze)
        yield


def _set_sync_debug_mode(mode: str) -> None:
    global _waits_are_errors
    _waits_are_errors = mode == "error"
