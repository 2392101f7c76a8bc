"""Products on an emulated GPU: which of torch's flags are in force, and what happens where a device has no product."""

from __future__ import annotations

import threading

import pytest
import torch
from emulated import gpu as emulation

from distil_kernels.engine import gemm, gpu_products

GPU = torch.device("cuda", 0)
FLAGS = torch.backends.cuda.matmul


@pytest.fixture
def products(monkeypatch):
    """Name and precision of every product, in order."""
    seen, compute = [], emulation._compute

    def note(func, args, kwargs):
        if func._schema.name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            seen.append((func._schema.name.removeprefix("aten::"), FLAGS.fp32_precision))
        return compute(func, args, kwargs)

    monkeypatch.setattr(emulation, "_compute", note)
    gpu_products._multiplies.cache_clear()
    with emulation.emulated_gpu():
        yield seen
    gpu_products._multiplies.cache_clear()


@pytest.fixture(params=["highest", "high"])
def users_precision(request):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield FLAGS.fp32_precision
    assert FLAGS.fp32_precision == ("tf32" if request.param == "high" else "ieee"), "the user's flag was not restored"
    torch.set_float32_matmul_precision(before)


def operands(dtype, generator):
    hidden, weight, grad_logits = (torch.randn(shape, generator=generator) for shape in ((5, 8), (24, 8), (5, 24)))
    return [tensor.to(dtype).to(GPU) for tensor in (hidden, weight, grad_logits)]


def test_float32_logits_are_never_tf32(products, users_precision, generator):
    hidden, weight, grad_logits = operands(torch.float32, generator)
    gemm.lm_head(hidden, weight, out=torch.empty(5, 24, device=GPU))
    gemm.grad_hidden(grad_logits, weight)
    gemm.add_grad_weight(grad_logits, hidden, torch.zeros(24, 8, device=GPU))
    gemm.grad_weight(grad_logits, hidden, torch.empty(24, 8, device=GPU))
    assert products == [
        ("mm", "ieee"), ("mm", users_precision), ("addmm_", users_precision), ("mm", users_precision),
    ]  # fmt: skip


def test_logits_of_two_precisions_are_never_tf32(products, users_precision, generator):
    hidden, _, _ = operands(torch.float32, generator)
    _, weight, _ = operands(torch.bfloat16, generator)
    gemm.lm_head(hidden, weight, out=torch.empty(5, 24, device=GPU))
    assert products == [("mm", "ieee")]


@pytest.mark.parametrize("error", [
    RuntimeError("gemm input type at::BFloat16 and output type float is not supported for ROCm"),
    NotImplementedError("Could not run 'aten::mm.dtype' with arguments from the 'MPS' backend"),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_device_without_the_product_widens_its_operands(dtype, error, products, generator, monkeypatch):
    """The overload is there and its kernel is not; TF32 is exact for what was half precision."""
    compute = emulation._compute

    def refuse(func, args, kwargs):
        if func in (torch.ops.aten.mm.dtype, torch.ops.aten.mm.dtype_out, torch.ops.aten.addmm.dtype_out):
            raise error
        return compute(func, args, kwargs)

    monkeypatch.setattr(emulation, "_compute", refuse)
    hidden, weight, grad_logits = operands(dtype, generator)
    logits = torch.empty(5, 24, device=GPU)
    with pytest.warns(UserWarning, match="widens half-precision operands to float32 on this cuda device") as caught:
        gemm.lm_head(hidden, weight, out=logits)
    grad_hidden = gemm.grad_hidden(grad_logits, weight)
    grad_weight = torch.zeros(24, 8, device=GPU)
    gemm.add_grad_weight(grad_logits, hidden, grad_weight)
    assert len(caught) == 1
    assert {precision for _, precision in products} == {"tf32"}
    wide = [tensor.held.float() for tensor in (hidden, weight, grad_logits)]
    torch.testing.assert_close(logits.held, wide[0] @ wide[1].t())
    torch.testing.assert_close(grad_hidden.held, wide[2] @ wide[1])
    torch.testing.assert_close(grad_weight.held, wide[2].t() @ wide[0])


def test_tunable_op_is_asked_anew(products, generator, monkeypatch):
    """Its products have no float32 result of half-precision operands."""
    hidden, weight, _ = operands(torch.bfloat16, generator)
    out = torch.empty(5, 24, device=GPU)
    gemm.lm_head(hidden, weight, out=out)
    first = len(products)
    monkeypatch.setattr(torch.cuda.tunable, "is_enabled", lambda: True)
    gemm.lm_head(hidden, weight, out=out)
    gemm.lm_head(hidden, weight, out=out)
    assert (first, len(products)) == (2, 5)  # a trial and a product, another trial and two


def test_two_threads_do_not_restore_each_others_flag():
    before, inside = FLAGS.fp32_precision, threading.Event()

    def other():
        with gpu_products.float32_precision(GPU, "tf32"):
            inside.set()

    with gpu_products.float32_precision(GPU, "ieee"):
        thread = threading.Thread(target=other)
        thread.start()
        assert not inside.wait(0.05) and FLAGS.fp32_precision == "ieee"
    thread.join()
    assert FLAGS.fp32_precision == before
