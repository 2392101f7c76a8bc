"""The CPU's own products against float64, and what rounding an operand must not cost."""

from __future__ import annotations

import pytest
import torch

from distil_kernels.engine import gemm

pytestmark = pytest.mark.skipif(
    not gemm.has_bf16_product(), reason="this processor (or this build) has no product of our own"
)

# Below, at and above the tiles of C (16 x 48, 32 x 32), transposition (16, 32) and blocks (vectors: 64 lanes of one
# operand, 2048 of the other, 1024 floats or pairs of the depth; tiles: 128 x 1024 x 576 or whole depths to 1024); rows
# of whole and cut lines; a C that is written past the caches.
SIZES = [
    (1, 1, 1), (3, 5, 7), (8, 48, 32), (17, 100, 33), (32, 32, 31), (40, 480, 64), (257, 50, 1300), (300, 2000, 600),
    (70, 640, 1000), (5, 2100, 1100), (20, 70, 2500), (1100, 1000, 16),
]  # fmt: skip
TYPES = {"bf16": (torch.bfloat16, torch.bfloat16), "rounded": (torch.float32, torch.bfloat16),
         "fp32": (torch.float32, torch.float32)}  # fmt: skip


@pytest.fixture(params=[1, 2], ids=["1thread", "2threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("unit", gemm.UNITS)
@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("transposed", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
def test_product(size, transposed, types, unit, threads, generator):
    rows, columns, depth = size
    left_dtype, right_dtype = TYPES[types]
    left = torch.randn(depth, rows + 3, generator=generator).to(left_dtype)[:, :rows].t()
    right = torch.randn(columns, depth + 2, generator=generator).to(right_dtype)[:, :depth].t()
    left = left if transposed[0] else left.contiguous()
    right = right if transposed[1] else right.contiguous()
    wide = torch.full((rows, columns + 16), torch.nan)  # a view: what lies beside it stays as it is
    out = wide[:, :columns]
    exact_left = left.to(right_dtype).double()
    exact = exact_left @ right.double()
    bound = 4e-6 * exact_left.abs() @ right.double().abs() + 1e-30
    gemm._product(left, right, out, unit=unit)
    assert ((out - exact).abs() <= bound).all()
    gemm._product(left, right, out, accumulate=True, unit=unit)
    assert ((out - 2 * exact).abs() <= 3 * bound).all()
    assert wide[:, columns:].isnan().all()
    if unit == "vector" and right_dtype == torch.bfloat16:
        narrow = torch.full((rows, columns + 16), torch.nan, dtype=torch.bfloat16)
        gemm._product(left, right, narrow[:, :columns], unit=unit)
        assert ((narrow[:, :columns] - exact).abs() <= exact.abs() / 256 + bound).all()
        gemm._product(left, right, narrow[:, :columns], accumulate=True, unit=unit)
        assert ((narrow[:, :columns] - 2 * exact).abs() <= exact.abs() / 64 + 3 * bound).all()
        lost = torch.full_like(narrow, torch.nan)
        for times in range(4):
            gemm._product(left, right, narrow[:, :columns], residual=lost[:, :columns], accumulate=times > 0, unit=unit)
        both = narrow[:, :columns].double() + lost[:, :columns].double()
        assert ((both - 4 * exact).abs() <= exact.abs() / 2**13 + 6 * bound).all()
        assert narrow[:, columns:].isnan().all() and lost[:, columns:].isnan().all()


def test_where_depth_is_read_in_place_nothing_beside_it_counts(threads, generator):
    """Both operands are views of memory full of NaN, up to its last byte; an odd depth ends within a pair."""
    for dtype in (torch.float32, torch.bfloat16):
        for depth in (6, 7, 16):
            left = torch.full((19, depth + 2), torch.nan, dtype=dtype)[:, :depth]
            right = torch.full((35, depth + 1), torch.nan, dtype=dtype)[:, 1:]
            left.copy_(torch.randn(19, depth, generator=generator))
            right.copy_(torch.randn(35, depth, generator=generator))
            out = torch.empty(19, 35)
            gemm._product(left, right.t(), out)
            assert (out - left.double() @ right.double().t()).abs().max() < 1e-4


def test_no_depth_is_zero():
    out = torch.full((3, 5), torch.nan)
    gemm._product(torch.empty(3, 0), torch.empty(0, 5), out, unit="vector")
    assert (out == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_of_a_head_go_to_ours(dtype, generator, monkeypatch):
    if dtype == torch.float32:
        monkeypatch.setattr(gemm, "has_float32_product", lambda: True)
    monkeypatch.setattr(torch, "mm", lambda *_, **__: pytest.fail("the vendor library was asked"))
    hidden, weight = (torch.randn(rows, 64, generator=generator).to(dtype) for rows in (40, 500))
    out = torch.empty(40, 500)
    gemm.lm_head(hidden, weight, out)
    gemm.grad_hidden(out, weight)
    gemm.grad_weight(out, hidden, torch.empty(500, 64))
    gemm.add_grad_weight(out, hidden, torch.zeros(500, 64))


@pytest.mark.parametrize("unit", gemm.UNITS)
def test_threads_do_not_change_a_bit(unit, generator):
    left = torch.randn(100, 700, generator=generator)
    right = torch.randn(700, 500, generator=generator).bfloat16()
    results = []
    for threads in (1, 2, 7):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        results.append(torch.empty(100, 500))
        gemm._product(left, right, results[-1], unit=unit)
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
