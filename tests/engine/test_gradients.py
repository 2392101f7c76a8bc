"""What sums of many products lose to a dW of bfloat16."""

from __future__ import annotations

import torch

from distil_kernels.engine import gemm, gradients
from distil_kernels.engine.gradients import GradientSums, Needs


def test_a_gradient_of_many_products_is_rounded_once(monkeypatch, generator):
    """What 40 products lose to bfloat16 is kept: dW is as exact as that of one product, where it would be twice off."""
    hidden = torch.randn(640, 24, generator=generator).bfloat16()
    weight = torch.randn(96, 24, generator=generator).bfloat16()
    grad_logits = torch.randn(640, 96, generator=generator).bfloat16()
    exact = grad_logits.t().double() @ hidden.double()

    def error(staging_rows: int) -> float:
        sums = GradientSums(hidden, weight, len(weight), Needs(hidden=False, weight=True, bias=False), staging_rows)
        for begin in range(0, 640, 16):
            rows = slice(begin, begin + 16)
            sums.output_buffer(torch.empty(16, 96)).copy_(grad_logits[rows])
            sums.add(rows, grad_logits[rows], None)
        return float((sums.result().weight - exact).norm() / exact.norm())

    once = error(640)
    assert once < 2.5e-3
    assert error(320) < 1.5 * once
    assert error(16) < 1.05 * once
    monkeypatch.setattr(gradients, "ROUNDED_SUMS", 40)
    if gemm.adds_to_bf16(torch.bfloat16, "cpu"):
        assert error(16) > 2 * once, "the case does not show what it is for"
