"""Peak memory of forward and backward does not grow with the number of rows, beyond what grows by itself.

Each measurement is a process of its own: the peak of its resident memory above what it held just before the call. They
are forks of one that has imported torch and computed nothing.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch

from distil_kernels.engine import plan, sizes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads peak memory from /proc"),
]

V, D = 8192, 64
CHUNK_BYTES = 8 * 2**20  # 128 rows of both models' logits

MEASURE = f"""
import os, sys, torch
import torch._dynamo  # the first call of any custom op imports it
import distil_kernels
from distil_kernels.engine import sizes
distil_kernels.fused_forward_ce  # imports the ops
sizes.LOGITS_CHUNK_BYTES["cpu"] = {CHUNK_BYTES}
torch.set_num_threads(1)

def status(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024

def run(op, num_rows, hidden_size, dtype):
    hidden = torch.randn(num_rows, hidden_size, dtype=dtype, requires_grad=True)
    weight = torch.randn({V}, hidden_size, dtype=dtype, requires_grad=True)
    teacher = torch.randn(num_rows, hidden_size, dtype=dtype)
    tokens = torch.randint({V}, (num_rows,))
    borders = torch.arange(0, num_rows + 1, 64)
    named = tokens[:, None], torch.full((num_rows, 1), -0.5)
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")  # the peak starts again from what is resident now
    before = status("VmRSS")
    if op == "forward_ce":
        loss = distil_kernels.fused_forward_ce(hidden, weight, teacher, weight.detach())
    elif op == "token_stats":
        loss = distil_kernels.token_stats(hidden, weight, teacher, weight.detach(), tokens=tokens).ce.sum()
    elif op == "topk_ce":
        loss = distil_kernels.fused_topk_ce(hidden, weight, *named)
    elif op == "topk_distil_loss":
        loss = distil_kernels.fused_topk_distil_loss(hidden, weight, *named, tokens=tokens, cu_seqlens=borders).loss
    else:
        loss = distil_kernels.fused_distil_loss(
            hidden, weight, teacher, weight.detach(), tokens=tokens, cu_seqlens=borders, discount=0.9,
            baseline="leave_one_out", group_size=2).loss
    loss.backward()
    return status("VmHWM") - before

for line in sys.stdin:
    if os.fork():
        os.wait()
        continue
    op, num_rows, hidden_size, dtype = line.split()
    hidden_size, dtype = int(hidden_size), getattr(torch, dtype)
    run(op, 128, hidden_size, dtype)  # code, threads and workspaces of the first call
    print(run(op, int(num_rows), hidden_size, dtype), flush=True)
    os._exit(0)
"""


@pytest.fixture(scope="module")
def peak() -> Iterator[Callable[..., int]]:
    # Freed blocks go back to the system at once; else the peak is of what glibc keeps, 32 to 120 MiB for one of 57.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    command = [sys.executable, "-c", MEASURE]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=environment
    ) as measuring:

        def measure(op: str, num_rows: int, hidden_size: int = D, dtype: torch.dtype = torch.float32) -> int:
            print(op, num_rows, hidden_size, str(dtype).removeprefix("torch."), file=measuring.stdin)
            return int(measuring.stdout.readline())

        yield measure


@pytest.mark.parametrize("op", ["forward_ce", "distil_loss", "token_stats", "topk_ce", "topk_distil_loss"])
def test_peak_does_not_grow_with_rows(op, peak):
    small, large = 1024, 8192
    # What grows: the hidden states' gradient, and a few numbers per row.
    per_row = D * 4 + 64 * 4
    growth = peak(op, large) - peak(op, small)
    slack = 6 * 2**20  # of the allocator and 2 MiB pages; logits for the additional rows would be 448 MiB
    if op.startswith("topk"):
        slack += 2 * CHUNK_BYTES  # plain torch's temporaries, of which more or fewer lie unused
    assert growth <= (large - small) * per_row + slack, f"{growth / 2**20:.1f} MiB"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("num_rows", "hidden_size"), [(4096, D), (256, 1024)])
def test_peak_is_what_the_plan_says(num_rows, hidden_size, dtype, peak, monkeypatch):
    """And the gradients themselves: backward hands out what forward has summed."""
    monkeypatch.setitem(sizes.LOGITS_CHUNK_BYTES, "cpu", CHUNK_BYTES)
    shape = sizes.Shape(num_rows, V, hidden_size, dtype, "cpu", scalar=True, grad_hidden=True, grad_head=True)
    gradients = (V + num_rows) * hidden_size * dtype.itemsize
    predicted = plan.extra_bytes(shape, plan.choose_plan(shape)) + gradients
    found = peak("forward_ce", num_rows, hidden_size, dtype)
    assert 0.6 * predicted - 2 * 2**20 <= found <= 1.3 * predicted + 2 * 2**20
