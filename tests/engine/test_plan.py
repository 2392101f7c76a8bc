"""The choice of plan, chunk and back end: pure functions, so their answers are asserted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from distil_kernels.backends import cpu
from distil_kernels.backends.dispatch import choose_backend
from distil_kernels.engine import gemm
from distil_kernels.engine.gemm import reads_head_in_place
from distil_kernels.engine.plan import PLANS, choose_plan, extra_bytes
from distil_kernels.engine.sizes import LOGITS_CHUNK_BYTES, Shape, choose_chunk_rows, logits_chunk_bytes

BIG = Shape(8192, 151_936, 4096, torch.bfloat16, "cpu", scalar=True, grad_hidden=True, grad_head=True)
ROWS = replace(BIG, scalar=False)


@pytest.mark.parametrize(
    ("shape", "name", "reason"),
    [
        (BIG, "gradient_in_forward", "row weights are known in order"),
        (replace(BIG, grad_head=False), "frozen_head", "needs no gradient"),
        (replace(BIG, grad_head=False, grad_hidden=False), "stats_only", "nothing needs a gradient"),
        (replace(ROWS, dtype=torch.float32), "kept_gradient", "no larger than two float32 dW"),
        (replace(ROWS, num_rows=8193, dtype=torch.float32), "recompute", "upstream gradients come later"),
        (replace(ROWS, num_rows=4096, dtype=torch.float32, logprob_grad=True), "kept_gradient", "no larger than two"),
        (replace(ROWS, num_rows=4097, dtype=torch.float32, logprob_grad=True), "recompute", "gradients come later"),
        (replace(ROWS, num_rows=16_384, device_type="cuda"), "kept_gradient", "no larger than two float32 dW"),
        (replace(ROWS, logprob_grad=True, device_type="cuda"), "kept_gradient", "no larger than two float32 dW"),
        (replace(ROWS, num_rows=8193, logprob_grad=True, device_type="cuda"), "recompute", "gradients come later"),
        (replace(ROWS, grad_head=False), "frozen_head", "needs no gradient"),
        (replace(ROWS, num_rows=9000, grad_head=False, logprob_grad=True), "recompute", "come later"),
    ],
)
def test_auto(shape, name, reason):
    plan = choose_plan(shape)
    assert plan.name == name
    assert reason in plan.reason


def test_asked_for_by_name():
    assert choose_plan(BIG, "recompute").name == "recompute"
    for name in PLANS:
        if name not in ("gradient_in_forward", "recompute"):
            with pytest.raises(ValueError, match="cannot compute this call"):
                choose_plan(BIG, name)


@pytest.mark.parametrize("vocab_size", [1, 7, 49_152, 151_936, 10**9])
def test_chunk_fits_its_memory(vocab_size):
    shape = replace(BIG, vocab_size=vocab_size, dtype=torch.float16)  # its head is packed on every processor
    rows = choose_chunk_rows(shape)
    assert 1 <= rows <= shape.num_rows
    assert logits_chunk_bytes(shape, rows) <= LOGITS_CHUNK_BYTES["cpu"] or rows == 1
    # No row more would fit, up to the multiple of 16 that products like.
    full = rows == shape.num_rows or logits_chunk_bytes(shape, rows + 16) > LOGITS_CHUNK_BYTES["cpu"]
    assert full or (rows >= 256 and logits_chunk_bytes(shape, max(rows, 257)) > 48 * 2**20)
    assert choose_chunk_rows(replace(shape, vocab_size=49_152)) == 256


def test_backend_choice_says_why():
    cpu_device = torch.device("cpu")
    assert choose_backend("auto", cpu_device, torch.bfloat16).name == "cpu"
    double = choose_backend("auto", cpu_device, torch.float64)
    assert double.name == "reference"
    assert "float64" in double.reason
    assert choose_backend("reference", cpu_device, torch.float32).reason == "asked for by name"


def test_fallback_says_so_once(monkeypatch):
    from distil_kernels.backends import dispatch

    monkeypatch.setattr(cpu, "unavailable", lambda device, dtype: "the extension is not built (test)")
    dispatch._warn_once.cache_clear()
    with pytest.warns(UserWarning, match="falls back to plain torch.*the extension is not built"):
        assert choose_backend("auto", torch.device("cpu"), torch.float32).name == "reference"
    assert choose_backend("auto", torch.device("cpu"), torch.float32).name == "reference"  # a warning would be an error
    dispatch._warn_once.cache_clear()


def test_chunks_of_a_call_are_of_equal_size():
    """300 rows are 2 x 160, not 256 and 44; 512 of 152k on the CPU are 2 x 256, where every chunk packs the head."""
    size = Shape(300, 49152, 576, torch.float16, "cpu", scalar=True)
    assert choose_chunk_rows(size) == 160
    assert choose_chunk_rows(replace(size, num_rows=512, vocab_size=151936)) == 256
    if reads_head_in_place(torch.float32):
        single = replace(size, dtype=torch.float32)
        assert choose_chunk_rows(single) == 144
        assert choose_chunk_rows(replace(single, num_rows=512, vocab_size=151936)) == 96
    if reads_head_in_place(torch.bfloat16):
        rounded = replace(size, dtype=torch.bfloat16, num_rows=512, vocab_size=151936, grad_head=True)
        assert choose_chunk_rows(rounded) == 48
    assert choose_chunk_rows(replace(size, num_rows=1)) == 1
    assert choose_chunk_rows(replace(size, num_rows=0)) == 1


@pytest.mark.parametrize("units", [(), ("tiles", "vector"), ("vector",)], ids=str)
def test_staging_on_the_cpu_replaces_a_larger_accumulator(units, monkeypatch):
    """All rows where dW is one product, half of them where two take less memory, whole chunks; no more than an
    accumulator."""
    monkeypatch.setattr(gemm, "UNITS", units)
    adds = units == ("vector",)
    few = replace(BIG, num_rows=1024, hidden_size=576, vocab_size=49_152)
    assert choose_plan(few).staging_rows == (1024 if units else 0)
    assert choose_plan(replace(few, num_rows=1100)).staging_rows == (576 if adds else 1100 if units else 0)
    assert choose_plan(replace(few, num_rows=100)).staging_rows == (100 if units else 0)
    assert choose_plan(replace(few, num_rows=2048)).staging_rows == (1056 if adds else 0)
    assert choose_plan(replace(few, num_rows=2500)).staging_rows == (576 if adds else 0)
    assert choose_plan(replace(few, grad_head=False)).staging_rows == (576 if adds else 0)
    assert choose_plan(replace(few, dtype=torch.float32)).staging_rows == 0


@pytest.mark.parametrize("size", [(49_152, 576), (151_936, 1024), (151_936, 896)], ids=str)
def test_memory_on_the_cpu_has_a_bound(size, monkeypatch):
    """bfloat16: chunk, staging buffer and residuals take no more than for many rows, and then the same for any."""
    monkeypatch.setattr(gemm, "UNITS", ("vector",))

    def extra(num_rows: int) -> int:
        shape = replace(BIG, num_rows=num_rows, vocab_size=size[0], hidden_size=size[1])
        return extra_bytes(shape, choose_plan(shape))

    most = extra(10**6)
    for num_rows in (1, 48, 100, 512, 1000, 2048, 3000, 4096, 10_000):
        assert extra(num_rows) <= 1.05 * most  # whole chunks
    assert extra(10_000) == most
    assert extra(512) < 150e6


GPU = replace(BIG, device_type="cuda")


def test_staging_on_a_gpu():
    """All rows where that spares the accumulator; what a few waves of dh's product need where there is no dW."""
    assert choose_plan(GPU)[1:3] == (1024, 8192)
    assert choose_plan(replace(GPU, num_rows=65536))[1:3] == (512, 3584)
    assert choose_plan(replace(GPU, hidden_size=1024))[1:3] == (1024, 8192)
    assert choose_plan(replace(GPU, num_rows=12_288, hidden_size=1024))[1:3] == (1024, 3072)
    assert choose_plan(replace(GPU, grad_head=False))[1:3] == (512, 2048)
    assert choose_plan(replace(GPU, num_rows=37))[1:3] == (37, 37)
    # N > D + Q: float32 rows are as wide as dW.
    assert choose_plan(replace(GPU, dtype=torch.float32)).staging_rows == 1536


@pytest.mark.parametrize("num_rows", [1, 100, 4096, 8192, 11_000, 12_000, 65_536, 10**6])
def test_memory_on_a_gpu(num_rows):
    """V = 152k, D = 4096: 4.5 GB with dW, 1.5 GB without, whatever the number of rows; 100 MB are for dh."""
    for grad_head, most in ((True, 4.4e9), (False, 1.4e9)):
        shape = replace(GPU, num_rows=num_rows, grad_head=grad_head)
        assert extra_bytes(shape, choose_plan(shape)) <= most
