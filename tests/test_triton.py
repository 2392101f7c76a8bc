"""Back end `triton` without a GPU: its tests in Triton's interpreter, its choices, and what it says elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from distil_kernels.backends import triton as backend
from distil_kernels.backends.dispatch import choose_backend

INTERPRETED = Path(__file__).parent / "interpreted"


@pytest.mark.slow
def test_in_the_interpreter(request):
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", str(INTERPRETED), "--seed", str(request.config.option.seed)]
    run = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]


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
    assert backend.choose_tile((9, 0), torch.bfloat16).rows == 128
    assert backend.choose_tile((8, 0), torch.bfloat16).rows == 64
    assert backend.choose_tile((9, 0), torch.float32).columns == 64
    tile = backend.choose_tile((9, 0), torch.bfloat16)
    for num_rows, vocab_size in [(1, 1), (8192, 151936), (100, 4099), (5, 129)]:
        size, count = backend.choose_splits(num_rows, vocab_size, tile, num_processors=132)
        assert size % tile.columns == 0
        assert (count - 1) * size < vocab_size <= count * size
    # Few rows: the vocabulary is divided until the processors are busy.
    assert backend.choose_splits(100, 151936, tile, 132)[1] > 500
