"""The CPU's bfloat16 product against float64, and what rounding its operand must not cost."""

from __future__ import annotations

import pytest
import torch

from distil_kernels import gemm

pytestmark = pytest.mark.skipif(
    not gemm.has_bf16_product(), reason="this processor (or this build) has no bfloat16 product"
)

# Below, at and above the squares of C (8 x 48, 32 x 32), transposition (32) and blocks (256 x 1920 x 576, 128 x 1024 x
# 576 or whole depths to 1024); rows of whole and cut lines.
SIZES = [
    (1, 1, 1), (3, 5, 7), (8, 48, 32), (17, 100, 33), (32, 32, 31), (40, 480, 64), (257, 50, 1300), (300, 2000, 600),
    (70, 640, 1000),
]  # fmt: skip


@pytest.fixture(params=[1, 2], ids=["1thread", "2threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("unit", gemm.bf16_units())
@pytest.mark.parametrize("left_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("transposed", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
def test_product(size, transposed, left_dtype, unit, threads, generator):
    rows, columns, depth = size
    left = torch.randn(depth, rows + 3, generator=generator).to(left_dtype)[:, :rows].t()
    right = torch.randn(columns, depth + 2, generator=generator).bfloat16()[:, :depth].t()
    left = left if transposed[0] else left.contiguous()
    right = right if transposed[1] else right.contiguous()
    wide = torch.full((rows, columns + 16), torch.nan)  # a view: what lies beside it stays as it is
    out = wide[:, :columns]
    exact = left.bfloat16().double() @ right.double()
    bound = 4e-6 * left.bfloat16().double().abs() @ right.double().abs() + 1e-30
    gemm._bf16_product(left, right, out, unit=unit)
    assert ((out - exact).abs() <= bound).all()
    gemm._bf16_product(left, right, out, accumulate=True, unit=unit)
    assert ((out - 2 * exact).abs() <= 3 * bound).all()
    assert wide[:, columns:].isnan().all()


@pytest.mark.parametrize("unit", gemm.bf16_units())
def test_threads_do_not_change_a_bit(unit, generator):
    left = torch.randn(100, 700, generator=generator)
    right = torch.randn(700, 500, generator=generator).bfloat16()
    results = []
    for threads in (1, 2, 7):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        results.append(torch.empty(100, 500))
        gemm._bf16_product(left, right, results[-1], unit=unit)
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_what_the_rows_of_a_head_have_in_common_cancels(generator):
    """Rows of S - T sum to 0. Rounded entries do not: times a common 100 that would be a gradient of its own."""
    grad_logits = torch.randn(20, 3000, generator=generator)
    grad_logits -= grad_logits.double().mean(1, keepdim=True).float()
    weight = (100 + torch.randn(3000, 40, generator=generator)).bfloat16()
    exact = grad_logits.double() @ weight.double()
    error = (gemm.grad_hidden(grad_logits, weight).double() - exact).norm() / exact.norm()
    rounded = (grad_logits.bfloat16().double() @ weight.double() - exact).norm() / exact.norm()
    assert error < 4e-3
    assert rounded > 5 * error, "the case does not show what it is for"


def test_logits_are_not_rounded(generator):
    hidden = torch.randn(40, 64, generator=generator).bfloat16()
    weight = torch.randn(500, 64, generator=generator).bfloat16()
    out = torch.empty(40, 500)
    gemm.lm_head(hidden, weight, out)
    exact = hidden.double() @ weight.double().t()
    assert (out - exact).abs().max() < 1e-4
    assert (out.bfloat16() - exact).abs().max() > 1e-2
