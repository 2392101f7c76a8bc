"""Time and memory, measured so that they can be compared.

Time: all candidates of a case in one process, one call each per round, so that a slow minute of the machine hits
everyone, in an order that is shuffled for each round. On the CPU freed memory stays in the process, for whoever comes
next: fresh pages cost what the machine and its neighbours please (on a virtual machine whose host takes free pages
back a dW of 300 MB between 30 and 600 ms), and those pay most who need most memory. Medians, and half the distance of
the quartiles as spread. Warm-up is apart. The bare matrix products of the same shape take part in the rounds: no
candidate that computes every logit can be faster than these.

Memory: in a process of its own (`check.py`), the peak of one call beyond inputs and their gradients, after a first
call has loaded code and compiled. On the CPU that is the kernel's high-water mark of resident memory, reset just
before the call, with a malloc that returns large blocks to the system at once (so it is what was in use, not what
malloc kept); on a GPU torch's own peak statistics.
"""

from __future__ import annotations

import ctypes
import gc
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from cases import NUM_PRODUCTS, Case, Problem
from torch import Tensor

from distil_kernels.engine import gemm

Call = Callable[[], object]

_MAX_LIMIT_BYTES = 2**30
"""The bare products write logits of at most this size; more rows go in chunks."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # malloc.h


@dataclass(frozen=True)
class Timing:
    seconds: float
    """Median."""
    spread: float
    """Half the distance between the quartiles."""
    rounds: int


def forward_backward(loss: Callable[[Problem], Tensor], problem: Problem) -> Tensor:
    """One call as a training step makes it: gradients absent before, present after."""
    problem.clear_gradients()
    value = loss(problem)
    value.backward()
    return value.detach()


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def interleaved(calls: dict[str, Call], device: str, rounds: int, seconds: float) -> dict[str, Timing]:
    """Medians over rounds; a call that has used up `seconds` leaves after its third round.

    Each call must have run before: warm-up is the caller's.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    begin = time.perf_counter()
    for number in range(rounds):
        order = list(calls)
        random.Random(number).shuffle(order)
        for name in order:
            if number >= 3 and sum(times[name]) > seconds:
                continue
            synchronize(device)
            start = time.perf_counter()
            calls[name]()
            synchronize(device)
            times[name].append(time.perf_counter() - start)
        if number + 1 < rounds:
            report_progress("rounds", number + 1, rounds, begin)
    return {name: _summary(samples) for name, samples in times.items()}


def _summary(samples: list[float]) -> Timing:
    quartiles = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else [0.0, 0.0, 0.0]
    return Timing(statistics.median(samples), (quartiles[2] - quartiles[0]) / 2, len(samples))


def report_progress(what: str, done: int, total: int, begin: float) -> None:
    elapsed = time.perf_counter() - begin
    print(f"  {what} {done}/{total}, {elapsed:.0f} s, about {elapsed / done * (total - done):.0f} s left",
          file=sys.stderr, flush=True)  # fmt: skip


def bare_products(case: Case, problem: Problem) -> dict[str, Call]:
    """The op's matrix products and nothing else, into memory that is already there.

    By torch's library, and on the CPU by this one's own where it has such a product. Half precision on the CPU is
    also timed with operands widened to float32 beforehand: where a processor has no such instructions that is the
    faster one, and the limit is the fastest way there is.
    """
    dtypes = [case.torch_dtype]
    if case.device == "cpu" and case.torch_dtype != torch.float32:
        dtypes.append(torch.float32)
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    label = f"{NUM_PRODUCTS[case.op]} bare products"
    calls: dict[str, Call] = {f"{label}, {names[dtype]}": _products(case, problem, dtype) for dtype in dtypes}
    if case.device == "cpu" and gemm.reads_head_in_place(case.torch_dtype):
        calls[f"{label}, ours"] = _products(case, problem, case.torch_dtype, ours=True)
    return calls


def _products(case: Case, problem: Problem, dtype: torch.dtype, *, ours: bool = False) -> Call:
    """Ours leave float32 logits, and round the sums of all rows of dW once."""
    hidden = problem.inputs.student_hidden.detach().to(dtype)
    weight = problem.inputs.student_weight.detach().to(dtype)
    logits_dtype = torch.float32 if ours else dtype
    rows = min(case.num_rows, max(1, _MAX_LIMIT_BYTES // (case.vocab_size * logits_dtype.itemsize)))
    logits = hidden.new_empty(rows, case.vocab_size, dtype=logits_dtype)
    gradient = logits if logits_dtype == dtype else torch.zeros_like(logits, dtype=dtype)
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight)
    with_grad_weight = case.op not in ("frozen",)
    num_logits = NUM_PRODUCTS[case.op] - 1 - with_grad_weight

    def run() -> None:
        for begin in range(0, case.num_rows, rows):
            part, out = hidden[begin : begin + rows], logits[: case.num_rows - begin]
            grad = gradient[: part.shape[0]]
            for _ in range(num_logits):
                gemm.lm_head(part, weight, out=out) if ours else torch.mm(part, weight.t(), out=out)
            if ours:
                gemm.grad_hidden(grad, weight)
            else:
                torch.mm(grad, weight, out=grad_hidden[begin : begin + rows])
            if with_grad_weight and ours:
                gemm.grad_weight(grad, part, out=grad_weight)
            elif with_grad_weight:
                torch.addmm(grad_weight, grad.t(), part, beta=float(begin > 0), out=grad_weight)

    return run


def peak_extra_bytes(call: Call, problem: Problem, device: str) -> int | None:
    """Highest memory during `call` beyond what there was before and the gradients that it leaves; None if unknown."""
    problem.clear_gradients()
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    else:
        if not reset_high_water():
            return None
        before = resident_bytes("VmRSS")
        call()
        peak = resident_bytes("VmHWM")
    gradients = sum(leaf.grad.nbytes for leaf in problem.inputs.leaves.values() if leaf.grad is not None)
    return peak - before - gradients


def keep_freed_memory() -> bool:
    """Lets glibc's malloc take all blocks from its heap and never give any back; False where there is none."""
    return _set_malloc(_M_MMAP_MAX, 0) and _set_malloc(_M_TRIM_THRESHOLD, -1)


def return_large_blocks() -> None:
    """Fixes glibc's threshold for blocks of their own at 1 MiB; else it grows up to 32 MiB and freed blocks stay."""
    _set_malloc(_M_MMAP_THRESHOLD, 2**20)


def _set_malloc(option: int, value: int) -> bool:
    try:
        return ctypes.CDLL("libc.so.6").mallopt(option, value) == 1
    except (OSError, AttributeError):
        return False


def reset_high_water(trim: bool = True) -> bool:
    """Returns free heap pages to the system (`trim`), then sets VmHWM to what is resident now (Linux only)."""
    try:
        if trim:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return False
    return True


def resident_bytes(field: str) -> int:
    """VmRSS, what this process holds now, or VmHWM, the most since `reset_high_water`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def numbered(names: list[str], what: str) -> Iterator[str]:
    """Each name, with progress after it."""
    begin = time.perf_counter()
    for done, name in enumerate(names, start=1):
        yield name
        report_progress(f"{what}: {name}", done, len(names), begin)
