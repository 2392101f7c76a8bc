"""Every GPU kernel compiles for its targets and keeps to its registers; bench/gpu/resources.py prints the table."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

INSTRUCTIONS = {"row_stats": 30.4, "row_grad": 29.1, "row_stats_grad": 59.0}
"""Executed per pair of logits on sm_90a, by nvcc 13.0; docs/performance.md has the loops."""

SCRIPT = Path(__file__).parents[2] / "bench" / "gpu" / "resources.py"


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "num_kernels"), [("triton", 24), ("amd", 24), ("cuda", 90)])
def test_no_kernel_spills(kind, num_kernels):
    if kind != "cuda":
        pytest.importorskip("triton")
    elif shutil.which("nvcc") is None:
        pytest.skip("no nvcc to compile csrc/cuda with")
    run = subprocess.run([sys.executable, SCRIPT, kind], capture_output=True, text=True, check=False)
    print(run.stdout)
    assert run.returncode == 0, run.stdout + run.stderr[-2000:]
    resources, *instructions = run.stdout.split("\n\n")
    # Two blocks of 512 threads to a multiprocessor, on which cuda.choose_row_kernel counts.
    clusters = re.findall(r"row_stats_grad<\d>\s+sm_(?:90a|100a)\s+(\d+)", resources)
    assert all(int(registers) <= 64 for registers in clusters) and len(clusters) == (4 if kind == "cuda" else 0)
    assert len(resources.splitlines()) == 1 + num_kernels
    for kernel, most in INSTRUCTIONS.items() if instructions else ():
        lines = re.findall(rf"^{kernel} (?!.*any cost).*?\s([\d.]+)  ", instructions[0], re.MULTILINE)
        total = sum(map(float, lines))
        assert total <= 1.05 * most, f"{kernel}: {total:.1f} instructions per pair of logits, {most} before"
