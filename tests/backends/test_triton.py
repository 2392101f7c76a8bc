"""Back end `triton` without a GPU: what it compiles, its choices, and what it says elsewhere.

Its kernels run in Triton's interpreter, in a session of their own: tests/interpreted and tests/gpu.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from distil_kernels.backends import Cost, LogitPair, LogitTransform, RowTerms, Statistic
from distil_kernels.backends import triton as backend
from distil_kernels.backends.dispatch import choose_backend

HOPPER = backend.Gpu("cuda", (9, 0), 132)


@pytest.fixture
def compile_only(monkeypatch):
    """Launches go through Triton's own just-in-time compiler for an H100, which then does not run the kernel.

    It makes constants of arguments that are None or 1, which neither the interpreter nor a signature by hand does.
    """
    pytest.importorskip("triton")
    from triton import JITFunction
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    names = {"get_current_device": 0, "get_current_stream": 0, "get_current_target": GPUTarget("cuda", 90, 32)}
    stand_in = type("Driver", (), {name: lambda self, *_, it=it: it for name, it in names.items()})()
    run, compiled = JITFunction.run, []

    def compile_it(self, *arguments, warmup, **options):
        assert run(self, *arguments, warmup=True, **options) is not None
        compiled.append(self.fn.__name__)

    monkeypatch.setattr(JITFunction, "run", compile_it)
    monkeypatch.setattr(backend, "_gpu", lambda device: HOPPER)
    driver.set_active(stand_in)
    yield compiled
    driver.set_active(None)  # the default, when it is next asked for


@pytest.mark.slow
@pytest.mark.parametrize(("num_rows", "vocab_size", "hidden_size", "options"), [
    (1, 1, 1, True), (1, 4099, 16, False), (3, 4099, 24, True),
])  # fmt: skip
def test_every_launch_compiles(compile_only, num_rows, vocab_size, hidden_size, options):
    logits = LogitPair(*torch.zeros(2, num_rows, vocab_size))
    transform = LogitTransform(torch.zeros(vocab_size), 8.0, 0.7) if options else LogitTransform(None, None, 1.0)
    tokens, weight = (torch.zeros(num_rows, dtype=torch.int64), torch.ones(num_rows)) if options else (None, None)
    for cost in (Cost(), Cost(Statistic.JSD)):
        statistics = backend.row_stats(logits, transform, transform, tokens, cost)
        out = torch.empty(num_rows, vocab_size, dtype=torch.bfloat16)
        backend.row_grad(
            logits, transform, transform, tokens, statistics, cost, torch.ones(num_rows), weight, out,
            RowTerms(torch.ones(4, num_rows), tokens) if options or num_rows > 1 else None,
        )  # fmt: skip
    slots = torch.zeros(num_rows, num_rows, dtype=torch.int64)
    for horizon in (None, 1, 300):
        backend.cost_to_go(torch.zeros(num_rows), slots, None, 0.9, horizon)
    head = [torch.zeros(size, hidden_size, dtype=torch.bfloat16) for size in (num_rows, vocab_size)]
    backend.head_stats(*head, *head, transform, transform, tokens)
    assert set(compile_only) == {
        "row_partials", "merge_partials", "mixture_partials", "row_grad", "cost_to_go", "head_partials"
    }  # fmt: skip


def test_refuses_cpu_tensors_and_float64():
    pytest.importorskip("triton")
    with pytest.raises(RuntimeError, match="runs on GPU tensors, these are on cpu"):
        choose_backend("triton", torch.device("cpu"), torch.bfloat16)
    assert "float64 needs backend='reference'" in backend.unavailable(torch.device("cuda"), torch.float64)


def test_without_triton(monkeypatch):
    monkeypatch.setattr(backend, "_import_kernels", lambda: "triton cannot be imported (No module named 'triton')")
    assert "cannot be imported" in backend.unavailable(torch.device("cuda"), torch.bfloat16)


def test_import_does_not_import_triton():
    # A process of its own: torch or another test may have imported it here.
    code = (
        "import sys, torch; h = 'triton' in sys.modules; import distil_kernels; assert h == ('triton' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_tiles_and_splits():
    assert backend.choose_tile(HOPPER, torch.bfloat16).rows == 128
    assert backend.choose_tile(HOPPER._replace(capability=(8, 0)), torch.bfloat16).rows == 64
    # An MI300 says that it is of capability 9.4: its vendor decides.
    assert backend.choose_tile(backend.Gpu("hip", (9, 4), 304), torch.bfloat16).num_stages == 2
    assert backend.choose_tile(HOPPER, torch.float32).columns == 64
    tile = backend.choose_tile(HOPPER, torch.bfloat16)
    for num_rows, vocab_size in [(1, 1), (8192, 151936), (100, 4099), (5, 129)]:
        size, count = backend.choose_splits(num_rows, vocab_size, tile, num_processors=132)
        assert size % tile.columns == 0
        assert (count - 1) * size < vocab_size <= count * size
    # Few rows: the vocabulary is divided until the processors are busy.
    assert backend.choose_splits(100, 151936, tile, 132)[1] > 500
