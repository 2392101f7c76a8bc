"""Rows that are not consecutive, in the plan that keeps the gradient of the logits."""

from __future__ import annotations

import torch

from distil_kernels import fused_forward_ce
from distil_kernels.backends import cpu
from distil_kernels.testing import make_inputs


def test_masked_rows_are_written_with_an_aligned_stride(generator, monkeypatch):
    """V = 131: rows of a stride of 131 would be written four bytes at a time, and copied twice."""
    strides, row_stats_grad = [], cpu.row_stats_grad

    def note(*arguments):
        strides.append(arguments[-1].stride(0) * arguments[-1].element_size())
        return row_stats_grad(*arguments)

    monkeypatch.setattr(cpu, "row_stats_grad", note)
    inputs = make_inputs(12, 131, 8, generator=generator)
    mask = torch.arange(12) % 3 != 1
    options = {"reduction": "none", "token_mask": mask, "backend": "cpu"}
    ce = fused_forward_ce(*inputs.heads, plan="kept_gradient", **options)
    gradients = torch.autograd.grad(ce.sum(), list(inputs.leaves.values()))
    assert strides and all(stride % 64 == 0 for stride in strides)
    expected = fused_forward_ce(*inputs.heads, plan="recompute", **options)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected.sum(), list(inputs.leaves.values())))
