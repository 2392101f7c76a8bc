"""Back end `cuda` without a GPU: its choices, what it says, and csrc/cuda run by an emulator (tests/emulated).

The emulator shows the kernels' logic: indices, tails, reductions, clusters. Races, ordering and speed need a GPU.
"""

from __future__ import annotations

import contextlib
import types

import pytest
import row_checks
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from distil_kernels.backends import FORWARD_CE, NUM_STATISTICS, LogitTransform, cuda
from distil_kernels.backends.dispatch import choose_backend
from distil_kernels.engine.credit import Credit, CreditScan, reverse_chunks

pytestmark = pytest.mark.slow


def test_unavailable_says_why(monkeypatch):
    gpu, dtype = torch.device("cuda"), torch.bfloat16
    assert "these tensors are on cpu" in cuda.unavailable(torch.device("cpu"), dtype)
    assert "float64 needs backend='reference'" in cuda.unavailable(gpu, torch.float64)
    no_driver = types.SimpleNamespace(
        cuda_row_stats=None, cuda_device_error=lambda: 35, cuda_error_text=lambda error: f"error {error}"
    )
    monkeypatch.setattr(cuda, "_C", no_driver)
    assert cuda.unavailable(gpu, dtype) == "the CUDA runtime finds no GPU: error 35"
    monkeypatch.setattr(cuda, "_C", types.SimpleNamespace(cuda_missing="there is no nvcc"))
    assert "no CUDA kernels: there is no nvcc; then run pip install" in cuda.unavailable(gpu, dtype)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert cuda.unavailable(gpu, dtype) == "it runs on NVIDIA GPUs, this torch is built for AMD's"
    with pytest.raises(RuntimeError, match="backend='cuda' cannot run here: it runs on NVIDIA GPUs"):
        choose_backend("cuda", torch.device("cpu"), dtype)


def test_the_built_extension_asks_the_driver():
    if not hasattr(cuda._C, "cuda_device_error"):
        pytest.skip("built without nvcc")
    error = cuda._C.cuda_device_error()
    assert (error == 0) == torch.cuda.is_available() or not torch.version.cuda
    assert cuda._C.cuda_error_text(35) == "CUDA driver version is insufficient for CUDA runtime version"


H100 = cuda.DeviceLimits((9, 0), 227 * 1024)


def test_choose_row_kernel():
    assert cuda.choose_row_kernel(H100, 32_000, True) == (4, "two blocks to a multiprocessor")
    assert cuda.choose_row_kernel(H100, 100_352, True).cluster_size == 8
    a100 = H100._replace(capability=(8, 0))
    assert cuda.choose_row_kernel(a100, 32_000, True) == (0, "compute capability 8.0 has no clusters")
    assert "multiples of 16 bytes" in cuda.choose_row_kernel(H100, 32_000, False).reason
    b300, rtx_5090 = H100._replace(capability=(10, 3)), cuda.DeviceLimits((12, 0), 99 * 1024)
    assert cuda.choose_row_kernel(b300, 32_000, True).cluster_size == 4
    assert "registers" in cuda.choose_row_kernel(rtx_5090, 8192, True).reason
    for vocab_size in (151_936, 262_144):  # one block to a multiprocessor, and none
        kernel = cuda.choose_row_kernel(H100, vocab_size, True)
        assert kernel.cluster_size == cuda.TWO_KERNELS and "in each of 8 blocks" in kernel.reason


def test_limits_come_from_the_cuda_runtime(emulated_extension, monkeypatch):
    """torch 2.6's properties have no shared memory per block, and ROCm's never had."""
    monkeypatch.setattr(cuda, "_C", emulated_extension)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(major=9, minor=0))
    cuda.device_limits.cache_clear()
    assert cuda.device_limits(0) == H100
    assert cuda.unavailable(torch.device("cuda", 0), torch.bfloat16) is None
    cuda.device_limits.cache_clear()


@pytest.mark.parametrize("requested", ["auto", "cuda"])
def test_the_choice_is_a_constant_to_dynamo(requested, emulated_extension, monkeypatch):
    """torch.compile(fullgraph=True) meets it in every op; with tensors on a GPU no probe returns early."""
    monkeypatch.setattr(cuda, "_C", emulated_extension)
    gpu = torch.device("cuda", 0)

    @torch.compile(fullgraph=True, backend="eager")
    def chosen(x):
        return x + (choose_backend(requested, gpu, torch.bfloat16).name == "cuda")

    assert chosen(torch.zeros(1)) == 1


def test_a_triton_choice_is_a_constant_to_dynamo(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(cuda, "_C", types.SimpleNamespace(cuda_missing="there is no nvcc"))
    gpu = torch.device("cuda", 0)

    @torch.compile(fullgraph=True, backend="eager")
    def chosen(x):
        return x + (choose_backend("auto", gpu, torch.bfloat16).name == "triton")

    assert chosen(torch.zeros(1)) == 1


@pytest.fixture
def kernels(emulated_extension, monkeypatch):
    monkeypatch.setattr(cuda, "_C", emulated_extension)
    monkeypatch.setattr(cuda, "_stream", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(cuda, "device_limits", lambda index: H100)
    cuda.cluster_fits.cache_clear()
    return cuda


# padding 1 makes rows of 131 and 7 begin at vectors, 5 does not.
@pytest.mark.parametrize("padding", [1, 5])
@pytest.mark.parametrize("kind", ["ordinary", "peaked", "near", "offset"])
@pytest.mark.parametrize("vocab_size", [1, 7, 131])
def test_statistics_and_gradient(kernels, vocab_size, kind, padding, generator):
    row_checks.check_kinds(kernels, vocab_size, kind, generator, padding)


@pytest.mark.parametrize("kind", ["ordinary", "peaked", "near"])
@pytest.mark.parametrize("cost", ["reverse_kl", "jsd", "entropy"])
def test_other_costs(kernels, cost, kind, generator):
    row_checks.check_kinds(kernels, 131, kind, generator, padding=1, cost=cost)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("cost", row_checks.COSTS)
def test_terms(kernels, cost, softcap, generator):
    row_checks.check_terms(kernels, generator, cost, softcap)


def test_shards(kernels, generator):
    row_checks.check_shards(kernels, generator)


def test_corners(kernels, generator):
    row_checks.check_softcap_and_minus_infinity(kernels, generator)
    row_checks.check_blocks(kernels, generator)
    row_checks.check_equal_models(kernels, generator)
    row_checks.check_first_of_equal_maxima(kernels)
    row_checks.check_unused_rows_and_nan(kernels, generator)
    row_checks.check_tokens_outside(kernels, generator)
    row_checks.check_no_rows(kernels)
    column = torch.arange(16384)  # 64 vectors of 4 for each of 64 threads, which has both its maxima in the first one
    first, place = column < 256, column % 4
    row_checks.check_small_terms_after_large_ones(kernels, first & (place == 0), first & (place == 1))


class Operations(TorchDispatchMode):
    """Names of what torch computes: no views, no uninitialised memory."""

    def __enter__(self):
        self.names = []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if not name.startswith(("select", "slice", "view", "empty", "new_empty")):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def test_credit_of_a_chunk_takes_few_launches(kernels):
    credit, lengths = Credit(discount=0.9), torch.tensor([64] * 8)
    scan = CreditScan(credit, lengths, kernels)
    statistics, ones = torch.rand(NUM_STATISTICS, 128), torch.ones(128)
    for number, chunk in enumerate(reverse_chunks(lengths, None, credit, 128)):
        with Operations() as launched:
            scan.row_weights(statistics, 0, ones, chunk.rows, chunk)
        first = ["new_zeros"] if number == 0 else []
        assert launched.names == ["eq", "mul", "scalar_tensor", "where", *first, "index", "mul", "stack"]


@pytest.mark.parametrize(
    ("dtype", "softcap"), [(torch.float32, None), (torch.bfloat16, 5.0), (torch.float16, None)], ids=str
)
@pytest.mark.parametrize(("vocab_size", "cluster_size"), [(3, 1), (131, 1), (131, 2), (131, 8), (4099, 4), (9, 8)])
def test_cluster_equals_two_passes(kernels, vocab_size, cluster_size, softcap, dtype, generator, monkeypatch):
    # 131 over 8: the last block holds 12 of 20; 9 over 8: most blocks hold nothing.
    logits = row_checks.make_logits(3, vocab_size, generator, "near", padding=-vocab_size % 4)
    logits.student[2] = float("nan")
    bias = torch.randn(vocab_size, generator=generator)
    student, teacher = LogitTransform(bias, softcap, 0.7), LogitTransform(None, None, 1.3)
    tokens, cost_weight = torch.tensor([0, vocab_size - 1, 1]), torch.tensor([0.3, 1.7, 0.0])
    arguments = logits, student, teacher, tokens, FORWARD_CE, cost_weight
    kernel = cuda.RowKernel(0, "two passes")
    monkeypatch.setattr(cuda, "choose_row_kernel", lambda *_: kernel)
    expected = torch.full_like(logits.student, float("nan"), dtype=dtype)
    statistics, _ = kernels.row_stats_grad(*arguments, expected)
    kernel = cuda.RowKernel(cluster_size, "cluster")
    exact = torch.full_like(logits.student, float("nan"))
    assert kernels.row_stats_grad(*arguments, exact)[1] is None
    in_place = dtype == torch.float32
    out = logits.student if in_place else torch.full_like(expected, float("nan"))
    found, lost = kernels.row_stats_grad(*arguments, out)
    if not in_place:
        exact_lost = (exact.double() - out.double()).sum(-1)
        torch.testing.assert_close(lost.double(), exact_lost, rtol=1e-4, atol=1e-6 * float(exact.abs().sum(-1).max()))
    torch.testing.assert_close(found, statistics, rtol=2e-6, atol=2e-6, equal_nan=True)
    ulp = torch.finfo(dtype).eps
    largest_term = float(cost_weight.max()) / student.temperature  # of the two whose difference an entry is
    atol = 2e-7 * largest_term + ulp * float(expected.abs().max())
    torch.testing.assert_close(out, expected, rtol=2 * ulp, atol=atol)


def test_a_cluster_is_not_asked_for_a_cost_that_it_has_not(kernels, generator, monkeypatch):
    monkeypatch.setattr(cuda, "choose_row_kernel", lambda *_: cuda.RowKernel(2, "cluster"))
    logits, plain = row_checks.make_logits(3, 131, generator), LogitTransform(None, None, 1.0)
    weights, cost = torch.tensor([0.3, 1.7, 0.0]), row_checks.COSTS["reverse_kl"]
    statistics = kernels.row_stats(logits, plain, plain, None, cost)
    expected, out = torch.empty_like(logits.student), torch.empty_like(logits.student)
    kernels.row_grad(logits, plain, plain, None, statistics, cost, weights, None, expected)
    found, _ = kernels.row_stats_grad(logits, plain, plain, None, cost, weights, out)
    assert torch.equal(found, statistics) and torch.equal(out, expected)


def test_a_cluster_that_does_not_fit_is_not_launched(kernels, emulated_extension, generator, monkeypatch):
    """A slice of a GPU may have too few multiprocessors for any cluster of 8."""

    class Slice:
        def __getattr__(self, name):
            return getattr(emulated_extension, name)

        def cuda_max_clusters(self, *_):
            return 0, 0

        def cuda_row_stats_grad(self, *_):
            raise AssertionError("launched")

    monkeypatch.setattr(cuda, "_C", Slice())
    monkeypatch.setattr(cuda, "choose_row_kernel", lambda *_: cuda.RowKernel(8, "cluster"))
    logits, plain = row_checks.make_logits(3, 131, generator, padding=1), LogitTransform(None, None, 1.0)
    statistics, _ = kernels.row_stats_grad(
        logits, plain, plain, None, FORWARD_CE, torch.ones(3), torch.empty_like(logits.student)
    )
    assert torch.equal(statistics, kernels.row_stats(logits, plain, plain, None, FORWARD_CE))
