"""Copies to a GPU that do not synchronise it, on an emulated one."""

from __future__ import annotations

import contextlib

import pytest
import torch
from emulated.gpu import emulated_gpu

from distil_kernels.engine.allocation import to_device

SECOND_GPU = torch.device("cuda", 1)


def test_pinned_memory_belongs_to_the_tensors_device(monkeypatch):
    """Pinning makes a context, of half a gigabyte, on whatever device is current."""
    current = []

    @contextlib.contextmanager
    def device(index):
        current.append(index)
        yield
        current.append(None)

    with emulated_gpu():
        monkeypatch.setattr(torch.cuda, "device", device)
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: current.append("pinned") or tensor.clone())
        to_device(torch.arange(3), SECOND_GPU)
    assert current == [SECOND_GPU, "pinned", None]


@pytest.mark.parametrize(("version", "refuses"), [("2.10.0+cu128", True), ("2.11.0+cu130", False)])
def test_a_replay_that_would_read_recycled_memory_is_refused(version, refuses, monkeypatch):
    monkeypatch.setattr(torch, "__version__", version)
    with emulated_gpu():
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with pytest.raises(RuntimeError, match=r"before torch 2\.11") if refuses else contextlib.nullcontext():
            to_device(torch.arange(3), torch.device("cuda", 0))
