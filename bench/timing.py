"""Time and memory, measured so that candidates can be compared.

Time: all candidates of a case run in one process, one call each per round, in an order that is shuffled for each round,
so that a slow minute of the machine hits all of them. On the CPU freed memory stays in the process for the next call:
the cost of fresh pages depends on the machine and its neighbours (on a virtual machine whose host takes free pages
back, between 30 and 600 ms for a dW of 300 MB), and it would hit the candidates that need most memory. Reported are
medians and, as spread, half the distance of the quartiles; warm-up calls do not count. The bare matrix products of the
same shape take part in the rounds: no candidate that computes every logit can be faster.

Memory: `verify.py` measures the peak of one call beyond inputs and their gradients, in a separate process and after a
first call that loads code and compiles. On the CPU this is the system's high-water mark of resident memory, reset just
before the call; malloc returns large blocks to the system at once, so that the mark shows memory in use and not memory
that malloc holds. On a GPU it is torch's peak statistics.
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
from cases import NUM_PRODUCTS, Case, CaseInputs
from torch import Tensor

from distil_kernels.engine import gemm

Call = Callable[[], object]

_MAX_LIMIT_BYTES = 2**30
"""Maximal size of the logits that the bare products write at once; more rows are computed in chunks."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # malloc.h


@dataclass(frozen=True)
class Timing:
    """Median seconds of a call over `rounds` rounds, and their spread: half the distance between the quartiles."""

    seconds: float
    spread: float
    rounds: int


def forward_backward(loss: Callable[[CaseInputs], Tensor], inputs: CaseInputs) -> Tensor:
    """Calls a loss and its backward as a training step does: no gradients before, gradients after."""
    inputs.clear_gradients()
    value = loss(inputs)
    value.backward()
    return value.detach()


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def interleaved(calls: dict[str, Call], device: str, rounds: int, seconds: float) -> dict[str, Timing]:
    """Times calls in interleaved rounds; a call that has used more than `seconds` leaves after its third round.

    Each call must have run before: the caller warms up.
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
            print_progress("rounds", number + 1, rounds, begin)
    return {name: _summary(samples) for name, samples in times.items()}


def _summary(samples: list[float]) -> Timing:
    quartiles = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else [0.0, 0.0, 0.0]
    return Timing(statistics.median(samples), (quartiles[2] - quartiles[0]) / 2, len(samples))


def print_progress(phase: str, completed: int, total: int, begin: float) -> None:
    elapsed = time.perf_counter() - begin
    remaining = elapsed / completed * (total - completed)
    print(f"  {phase} {completed}/{total}, {elapsed:.0f} s, about {remaining:.0f} s left",
          file=sys.stderr, flush=True)  # fmt: skip


def bare_products(case: Case, inputs: CaseInputs) -> dict[str, Call]:
    """Calls, by name, that compute the op's matrix products and nothing else, into allocated memory.

    The products are torch's, and on the CPU also this library's where it has such a product. Half precision on the CPU
    is also timed with operands widened to float32 beforehand, which is faster on a processor without instructions for
    half precision: the limit is the fastest of all.
    """
    dtypes = [case.torch_dtype]
    if case.device == "cpu" and case.torch_dtype != torch.float32:
        dtypes.append(torch.float32)
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    label = f"{NUM_PRODUCTS[case.op]} bare products"
    calls: dict[str, Call] = {f"{label}, {names[dtype]}": _products(case, inputs, dtype) for dtype in dtypes}
    if case.device == "cpu" and gemm.reads_head_in_place(case.torch_dtype):
        calls[f"{label}, ours"] = _products(case, inputs, case.torch_dtype, ours=True)
    return calls


def _products(case: Case, inputs: CaseInputs, dtype: torch.dtype, *, ours: bool = False) -> Call:
    """The products of one library; ours write float32 logits, and round dW once after all rows are summed."""
    hidden = inputs.student_hidden.detach().to(dtype)
    weight = inputs.student_weight.detach().to(dtype)
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


def peak_extra_bytes(call: Call, inputs: CaseInputs, device: str) -> int | None:
    """The peak memory of `call` beyond the memory before it and the gradients that it leaves; None if unknown."""
    inputs.clear_gradients()
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
    gradients = sum(leaf.grad.nbytes for leaf in inputs.leaves.values() if leaf.grad is not None)
    return peak - before - gradients


def keep_freed_memory() -> bool:
    """Makes glibc's malloc take all blocks from its heap and never return any; False without glibc."""
    return _set_malloc(_M_MMAP_MAX, 0) and _set_malloc(_M_TRIM_THRESHOLD, -1)


def return_large_blocks() -> None:
    """Fixes glibc's threshold for separately mapped blocks at 1 MiB; else it grows to 32 MiB and freed blocks stay."""
    _set_malloc(_M_MMAP_THRESHOLD, 2**20)


def _set_malloc(option: int, value: int) -> bool:
    try:
        return ctypes.CDLL("libc.so.6").mallopt(option, value) == 1
    except (OSError, AttributeError):
        return False


def reset_high_water(trim: bool = True) -> bool:
    """Returns free heap pages to the system (`trim`), then resets VmHWM to the resident memory (Linux only)."""
    try:
        if trim:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return False
    return True


def resident_bytes(field: str) -> int:
    """The resident memory of this process: now (field VmRSS), or its peak since `reset_high_water` (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def with_progress(names: list[str], phase: str) -> Iterator[str]:
    """Yields each name and prints progress after it."""
    begin = time.perf_counter()
    for completed, name in enumerate(names, start=1):
        yield name
        print_progress(f"{phase}: {name}", completed, len(names), begin)
