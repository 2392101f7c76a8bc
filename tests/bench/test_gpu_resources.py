"""Every GPU kernel compiles for its targets and keeps to its registers; bench/gpu/resources.py prints the table."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "bench" / "gpu" / "resources.py"


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "num_kernels"), [("triton", 22), ("cuda", 43)])
def test_no_kernel_spills(kind, num_kernels):
    if kind == "triton":
        pytest.importorskip("triton")
    elif shutil.which("nvcc") is None:
        pytest.skip("no nvcc to compile csrc/cuda with")
    run = subprocess.run([sys.executable, SCRIPT, kind], capture_output=True, text=True, check=False)
    print(run.stdout)
    assert run.returncode == 0, run.stdout + run.stderr[-2000:]
    assert len(run.stdout.splitlines()) == 1 + num_kernels
