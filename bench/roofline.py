"""The roofline of this processor: the attained rate of each part against its arithmetic intensity.

    python bench/roofline.py --threads 1 --json bench/results/roofline.json --plot docs/figures

The roof is measured, not looked up: the faster of torch's and our square matrix product, and a copy between two blocks
larger than every cache. A part's operations and bytes are counted from its definition (each operand read once, each
result written once; the vector kernels' operations from csrc/row_math.h), so a point above the slope has its data in a
cache.
Times are medians of interleaved rounds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import machine
import torch
from cases import SMOLLM2_SHAPE, Case, make_case_inputs
from speed_plots import save
from timing import forward_backward, interleaved, keep_freed_memory

import distil_kernels as dk
from distil_kernels.backends import FORWARD_CE, LogitPair, LogitTransform, cpu
from distil_kernels.engine import gemm
from distil_kernels.extras import require

ROW_STATS_OPERATIONS, ROW_GRAD_OPERATIONS = 46, 36
"""Operations per logit pair: two exponentials of 15, and the sums and differences around them (csrc/row_math.h)."""

_COPY_FLOATS = 2**26
_SQUARE = 2048


@dataclass(frozen=True)
class Part:
    """A part of the operation: its call, and the operations and bytes that its definition needs."""

    name: str
    call: Callable[[], object]
    operations: float
    num_bytes: float


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", metavar="PATH")
    parser.add_argument("--plot", metavar="DIR")
    options = parser.parse_args(arguments)
    if options.plot:
        require("bench/roofline.py", "studies", "matplotlib")
    torch.set_num_threads(options.threads)
    header = machine.header("cpu", options.threads)
    if keep_freed_memory():
        header["allocator"] += "; freed memory stays in the process"
    print(*machine.header_lines(header), sep="\n", flush=True)
    parts = {part.name: part for dtype in ("fp32", "bf16") for part in _parts(options.rows, dtype, options.threads)}
    for part in parts.values():
        part.call()
    timings = interleaved({name: part.call for name, part in parts.items()}, "cpu", options.rounds, seconds=60.0)
    points = [
        {
            "name": name,
            "ms": timings[name].seconds * 1e3,
            "gflops": part.operations / timings[name].seconds / 1e9,
            "gigabytes_per_second": part.num_bytes / timings[name].seconds / 1e9,
            "intensity": part.operations / part.num_bytes if part.num_bytes else None,
        }
        for name, part in parts.items()
    ]
    run = {"header": header, "rows": options.rows, "points": points}
    for point in points:
        print(f"{point['name']:32s} {point['ms']:9.1f} ms {point['gflops']:8.1f} GF/s "
              f"{point['gigabytes_per_second']:7.1f} GB/s")  # fmt: skip
    if options.json:
        Path(options.json).write_text(json.dumps(run, indent=1) + "\n")
    if options.plot:
        plot(run, Path(options.plot))


def _parts(rows: int, dtype: str, threads: int) -> list[Part]:
    vocab_size, hidden_size = SMOLLM2_SHAPE
    inputs = make_case_inputs(Case("ce", rows, vocab_size, hidden_size, dtype, "cpu", threads), "ordinary")
    hidden, weight = (tensor.detach() for tensor in inputs.heads[:2])
    width, logit_bytes = weight.element_size(), 4 * rows * vocab_size
    head_bytes, hidden_bytes = width * vocab_size * hidden_size, width * rows * hidden_size
    product = 2.0 * rows * vocab_size * hidden_size
    logits = torch.randn(2, rows, vocab_size) * 4.0
    grad_weight = torch.zeros(vocab_size, hidden_size)
    square = torch.randn(_SQUARE, _SQUARE).to(hidden.dtype)
    square_out, wide_out = torch.empty_like(square), torch.empty(_SQUARE, _SQUARE)
    parts = [
        Part(f"square product, {dtype}", lambda: torch.mm(square, square.t(), out=square_out), 2.0 * _SQUARE**3, 0.0),
        Part(f"square product as ours, {dtype}", lambda: gemm.lm_head(square, square, out=wide_out), 2.0 * _SQUARE**3,
             0.0),
        Part(f"logits, {dtype}", lambda: gemm.lm_head(hidden, weight, out=logits[0]), product,
             head_bytes + hidden_bytes + logit_bytes),
        Part(f"dh, {dtype}", lambda: gemm.grad_hidden(logits[1], weight), product,
             head_bytes + hidden_bytes + logit_bytes),
        Part(f"dW, {dtype}", lambda: gemm.add_grad_weight(logits[1], hidden, out=grad_weight), product,
             8 * vocab_size * hidden_size + hidden_bytes + logit_bytes),
        Part(f"whole operation, {dtype}",
             lambda: forward_backward(lambda inputs: dk.fused_forward_ce(*inputs.heads, backend="cpu"), inputs),
             4 * product, 3 * head_bytes + 8 * vocab_size * hidden_size + 8 * logit_bytes),
    ]  # fmt: skip
    return parts if dtype != "fp32" else [*parts, *_row_parts(LogitPair(*logits)), _copy()]


def _row_parts(logits: LogitPair) -> list[Part]:
    rows, vocab_size = logits.student.shape
    transform, tokens, ones = LogitTransform(None, None, 1.0), torch.arange(rows), torch.ones(rows)
    arguments = logits, transform, transform, tokens, FORWARD_CE
    statistics = cpu.row_stats(*arguments)
    out = torch.empty_like(logits.student)
    pairs = rows * vocab_size
    return [
        Part("row_stats", lambda: cpu.row_stats(*arguments), ROW_STATS_OPERATIONS * pairs, 8 * pairs),
        Part("row_grad", lambda: cpu.row_grad(*arguments[:4], statistics, FORWARD_CE, ones, ones, out),
             ROW_GRAD_OPERATIONS * pairs, 12 * pairs),
    ]  # fmt: skip


def _copy() -> Part:
    source, target = torch.zeros(_COPY_FLOATS), torch.zeros(_COPY_FLOATS)
    return Part("copy", lambda: target.copy_(source), 0.0, 8 * _COPY_FLOATS)


def plot(run: dict, folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    points = {point["name"]: point for point in run["points"]}
    bandwidth = points["copy"]["gigabytes_per_second"]
    figure, axes = plt.subplots(figsize=(8.5, 5.5))
    for dtype, style in (("fp32", "k-"), ("bf16", "k--")):
        roof = max(point["gflops"] for name, point in points.items() if name.endswith(f", {dtype}"))  # any product's
        intensity = [1.0, roof / bandwidth, 1024.0]
        axes.plot(intensity, [min(roof, bandwidth * x) for x in intensity], style, lw=1, label=f"roof, {dtype}")
    for name, point in points.items():
        if point["gflops"] and point["intensity"]:
            marker = "s" if "bf16" in name else "o"
            axes.plot(point["intensity"], point["gflops"], marker, label=name)
    axes.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="GF/s",
             title=f"{run['rows']} rows of SmolLM2's head, {run['header']['threads']} thread(s)")  # fmt: skip
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    figure.tight_layout()
    save(figure, folder, "roofline")


if __name__ == "__main__":
    main()
