"""What every stage of check.py that runs on the GPU measures with: shapes, inputs, clocks, the record.

Times are medians by device events, each candidate once per round. With `--rehearse` everything is on the CPU, with tiny
shapes and the CPU's back ends: numbers then mean nothing.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from distil_kernels import fused_distil_loss, fused_forward_ce
from distil_kernels.backends.dispatch import BACKENDS
from distil_kernels.plan import Plan

REHEARSE = "--rehearse" in sys.argv
DEVICE = torch.device("cpu" if REHEARSE else "cuda")
BACKEND_NAMES = ("cpu", "reference") if REHEARSE else ("cuda", "triton")
DTYPE = torch.bfloat16
HEADLINE = (64, 999, 32) if REHEARSE else (8192, 151_936, 4096)
NARROW = (64, 999, 16) if REHEARSE else (8192, 151_936, 1024)
MANY_ROWS = 128 if REHEARSE else 65_536
ROUNDS = 3 if REHEARSE else 9
NUM_SEQUENCES = 32
HOST_LEAD = 2_000_000
"""Cycles, about 1 ms, that the GPU sleeps before the first event of a measurement. The host enqueues a call meanwhile;
else the events would measure 40 to 400 microseconds of Python beside the kernels."""

Call = Callable[[], object]


class Record:
    """results[stage][name] = value in a JSON file, written at once."""

    def __init__(self, path: Path, stage: str) -> None:
        self._path, self._stage = path, stage
        self.put("measured", {
            "device": device_name(), "torch": torch.__version__, "cuda": torch.version.cuda,
            "commit": self._read()["commit"], "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        })  # fmt: skip

    def _read(self) -> dict:
        return json.loads(self._path.read_text())

    def end(self, ended: str) -> None:
        """Notes how the stage ended."""
        record = self._read()
        record["stages"][self._stage] = ended
        self._path.write_text(json.dumps(record, indent=1) + "\n")

    def put(self, name: str, value: object) -> None:
        record = self._read()
        record["results"].setdefault(self._stage, {})[name] = value
        self._path.write_text(json.dumps(record, indent=1) + "\n")


def available() -> list[str]:
    return [name for name in BACKEND_NAMES if BACKENDS[name].unavailable(DEVICE, DTYPE) is None]


def make_heads(num_rows: int, vocab_size: int, hidden_size: int, noise: float | None = None) -> list[Tensor]:
    """Student hidden states and head (with gradients), then the teacher's; logits of about unit scale. With `noise`
    the teacher is the student but for that share."""
    heads = [torch.randn(size, hidden_size, device=DEVICE, dtype=DTYPE) for size in (num_rows, vocab_size) * 2]
    for weight in heads[1::2]:
        weight.mul_(hidden_size**-0.5)
    if noise is not None:
        heads[2:] = [own + noise * other for own, other in zip(heads[:2], heads[2:], strict=True)]
    for tensor in heads[:2]:
        tensor.requires_grad_()
    return heads


def step(heads: list[Tensor], backend: str, kind: str, plan: str | Plan = "auto") -> None:
    """Forward and backward as a training step makes them."""
    hidden, weight, teacher_hidden, teacher_weight = heads
    hidden.grad = weight.grad = None
    if kind == "credit":
        tokens = torch.zeros(hidden.shape[0], dtype=torch.int64, device=DEVICE)
        borders = torch.arange(NUM_SEQUENCES + 1) * (hidden.shape[0] // NUM_SEQUENCES)
        loss = fused_distil_loss(*heads, tokens=tokens, cu_seqlens=borders, discount=0.9, backend=backend).loss
    else:
        own_weight = weight.detach() if kind == "frozen_head" else weight
        loss = fused_forward_ce(hidden, own_weight, teacher_hidden, teacher_weight, backend=backend, plan=plan)
    loss.backward()


def wide_mm(left: Tensor, right: Tensor, out: Tensor) -> None:
    """float32 result of half-precision operands."""
    if REHEARSE:
        out.copy_(left.float() @ right.float())
    else:
        torch.mm(left, right, out_dtype=torch.float32, out=out)


def bare_products(heads: list[Tensor]) -> Call:
    """Four products in chunks of rows: both logits (float32 results), dh and dW."""
    hidden, weight, teacher_hidden, teacher_weight = (tensor.detach() for tensor in heads)
    rows = min(4096, hidden.shape[0])
    logits = torch.empty(rows, weight.shape[0], device=DEVICE)
    grad_logits = torch.randn(rows, weight.shape[0], device=DEVICE, dtype=DTYPE)

    def run() -> None:
        for begin in range(0, hidden.shape[0], rows):
            part = slice(begin, begin + rows)
            wide_mm(hidden[part], weight.t(), logits)
            wide_mm(teacher_hidden[part], teacher_weight.t(), logits)
            torch.mm(grad_logits, weight)
            torch.mm(grad_logits.t(), hidden[part])

    return run


def milliseconds(calls: dict[str, Call], rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Per call its times, one of each per round after two rounds of warm-up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 2):
        for name, call in calls.items():
            if REHEARSE:
                begin = time.perf_counter()
                call()
                elapsed = 1e3 * (time.perf_counter() - begin)
            else:
                first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                torch.cuda._sleep(HOST_LEAD)
                first.record()
                call()
                last.record()
                last.synchronize()
                elapsed = first.elapsed_time(last)
            if number >= 2:
                times[name].append(elapsed)
    return times


def median_ms(call: Call, rounds: int = ROUNDS) -> float:
    return statistics.median(milliseconds({"": call}, rounds)[""])


def extra_bytes(call: Call, heads: list[Tensor]) -> int:
    """Peak of one call beyond inputs and their gradients, after a first one."""
    call()
    for tensor in heads:
        tensor.grad = None
    if REHEARSE:
        return 0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    gradients = sum(tensor.grad.nbytes for tensor in heads if tensor.grad is not None)
    return torch.cuda.max_memory_allocated() - before - gradients


def table(title: str, heads: list[Tensor], calls: dict[str, Call], record: Record, key: str) -> dict[str, float]:
    """Times `calls` beside the bare products; returns each one's ratio to them."""
    memory = {name: extra_bytes(call, heads) for name, call in calls.items()}
    for tensor in heads:
        tensor.grad = None
    times = milliseconds({"four bare products": bare_products(heads), **calls})
    medians = {name: statistics.median(each) for name, each in times.items()}
    record.put(key, {"milliseconds": times, "extra_bytes": memory})
    print(f"\n{title}\n{'candidate':<36}{'ms':>9}{'min':>9}{'max':>9}{'ratio':>8}{'extra GB':>10}")
    ratios = {name: median / medians["four bare products"] for name, median in medians.items()}
    for name, each in times.items():
        columns = f"{medians[name]:9.2f}{min(each):9.2f}{max(each):9.2f}{ratios[name]:8.3f}"
        print(f"{name:<36}{columns}{memory.get(name, 0) / 1e9:10.2f}", flush=True)
    return ratios


def device_name() -> str:
    return "rehearsal on a CPU" if REHEARSE else torch.cuda.get_device_name()
