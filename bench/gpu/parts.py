"""The stages `parts` and `tune` of check.py: memory, products, row kernels and credit one by one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import torch
from measure import (
    DEVICE,
    DTYPE,
    HEADLINE,
    NUM_SEQUENCES,
    REHEARSE,
    Call,
    Record,
    available,
    make_heads,
    median_ms,
    wide_mm,
)  # fmt: skip
from torch import Tensor

from distil_kernels.backends import FORWARD_CE, NUM_STATISTICS, LogitPair, LogitTransform, cuda, reference
from distil_kernels.backends.dispatch import BACKENDS
from distil_kernels.engine.credit import Credit, CreditScan, reverse_chunks
from distil_kernels.engine.gradients import new_rows


def stage_parts(record: Record) -> None:
    put = _printer(record)
    put("copy", "GB/s", _copy_rate())
    weight = make_heads(1, *HEADLINE[1:])[1].detach()
    for rows in (256, 512, 1024, 2048, 4096, 8192):
        for name, rate in _product_rates(rows, weight).items():
            put(f"{name} {rows}", "TFLOP/s", rate)
    for name, rate in _row_kernel_rates(HEADLINE[1]).items():
        put(name, "GB/s", rate)
    for name, found in _credit_times().items():
        put(name, "us", found)


def _copy_rate() -> float:
    source = torch.randn((2**16 if REHEARSE else 2**29,), device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / 1e6 / median_ms(lambda: target.copy_(source))


def _product_rates(rows: int, weight: Tensor) -> dict[str, float]:
    """The three products as the driver asks for them."""
    vocab_size, hidden_size = weight.shape
    hidden = torch.randn(rows, hidden_size, device=DEVICE, dtype=DTYPE)
    grad_logits = new_rows(hidden, rows, vocab_size, DTYPE).normal_()
    grad_hidden, grad_weight = torch.empty(rows, hidden_size, device=DEVICE), torch.empty_like(weight)
    calls: dict[str, Call] = {
        "dh": lambda: wide_mm(grad_logits, weight, grad_hidden),
        "dW": lambda: torch.mm(grad_logits.t(), hidden, out=grad_weight),
    }
    if rows <= 4096:
        logits = new_rows(hidden, rows, vocab_size, torch.float32)
        calls["lm_head"] = lambda: wide_mm(hidden, weight.t(), logits)
    gflop = 2e-9 * rows * vocab_size * hidden_size
    return {name: gflop / median_ms(call) for name, call in calls.items()}


def _row_kernel_rates(vocab_size: int) -> dict[str, float]:
    rows = 8 if REHEARSE else 1024  # of a chunk at the headline's size
    both = new_rows(torch.empty(0, device=DEVICE), 2 * rows, vocab_size, torch.float32).normal_()
    pair = LogitPair(both[:rows], both[rows:])
    out = new_rows(pair.student, rows, vocab_size, torch.float32 if REHEARSE else DTYPE)
    plain, ones = LogitTransform(None, None, 1.0), torch.ones(rows, device=DEVICE)
    read, written = 8 * rows * vocab_size, out.element_size() * rows * vocab_size
    rates = {}
    for backend in available():
        kernels = BACKENDS[backend]
        found = kernels.row_stats(pair, plain, plain, None, FORWARD_CE)
        stats = partial(kernels.row_stats, pair, plain, plain, None, FORWARD_CE)
        grad = partial(kernels.row_grad, pair, plain, plain, None, found, FORWARD_CE, ones, None, out)
        rates[f"{backend} row_stats"] = read / 1e6 / median_ms(stats)
        rates[f"{backend} row_grad"] = (read + written) / 1e6 / median_ms(grad)
    if "cuda" in available():
        for cluster_size, milliseconds in _row_route_times(vocab_size).items():
            name = "two kernels" if cluster_size == cuda.TWO_KERNELS else f"cluster of {cluster_size}"
            rates[f"cuda row_stats_grad, {name}"] = (read + written) / 1e6 / milliseconds
    return rates


@contextlib.contextmanager
def row_kernel(cluster_size: int) -> Iterator[None]:
    """Has `cuda.row_stats_grad` take clusters of this size, or two kernels for 0."""
    choice = cuda.choose_row_kernel
    cuda.choose_row_kernel = lambda *_: cuda.RowKernel(cluster_size, "asked for")  # type: ignore[assignment]
    try:
        yield
    finally:
        cuda.choose_row_kernel = choice


def cluster_sizes(vocab_size: int) -> list[int]:
    """Ways to a row's statistics and gradient that this GPU has: 0 for two kernels, then clusters."""
    limits = cuda.device_limits(torch.cuda.current_device())
    if limits.capability < (9, 0):
        return [cuda.TWO_KERNELS]
    fitting = [size for size in (1, 2, 4, 8) if cuda.cluster_bytes(vocab_size, size) <= limits.block_bytes]
    return [cuda.TWO_KERNELS, *fitting]


def _row_route_times(vocab_size: int, rows: int = 1024) -> dict[int, float]:
    """Milliseconds of statistics and gradient of a chunk, by cluster size (0: two kernels)."""
    both = new_rows(torch.empty(0, device=DEVICE), 2 * rows, vocab_size, torch.float32).normal_()
    pair, plain = LogitPair(both[:rows], both[rows:]), LogitTransform(None, None, 1.0)
    out, ones = new_rows(pair.student, rows, vocab_size, DTYPE), torch.ones(rows, device=DEVICE)
    call = partial(cuda.row_stats_grad, pair, plain, plain, None, FORWARD_CE, ones, out)
    times = {}
    for cluster_size in cluster_sizes(vocab_size):
        with row_kernel(cluster_size):
            times[cluster_size] = median_ms(call)
    return times


def stage_tune(record: Record) -> None:
    """What `cuda.choose_row_kernel` should answer on this GPU, and what it does answer."""
    if "cuda" not in available():
        record.put("left out", "no back end cuda")
        return
    limits = cuda.device_limits(torch.cuda.current_device())
    for vocab_size in (8192, 32_000, 50_304, 100_352, 128_256, 151_936, 262_144):
        times = _row_route_times(vocab_size)
        best = min(times, key=lambda size: times[size])
        chosen = cuda.choose_row_kernel(limits, vocab_size, True).cluster_size
        record.put(f"V={vocab_size}", {"milliseconds": times, "best": best, "chosen": chosen})
        listed = "  ".join(f"{size}: {milliseconds:.3f}" for size, milliseconds in times.items())
        print(f"V={vocab_size:<8} best {best}, chosen {chosen}   {listed} ms", flush=True)


def _credit_times() -> dict[str, float]:
    """Of one chunk: its scan, and all that credit does between the row kernels; many short sequences, a long one."""
    num_rows = 64 if REHEARSE else 1024
    statistics, ones = torch.rand(NUM_STATISTICS, num_rows, device=DEVICE), torch.ones(num_rows, device=DEVICE)
    times = {}
    for num_sequences in (NUM_SEQUENCES, 1):
        credit, lengths = Credit(discount=0.9), torch.tensor([num_rows // num_sequences] * num_sequences)
        (chunk,) = reverse_chunks(lengths, None, credit, 8 * num_rows, DEVICE)
        for backend in dict.fromkeys([*available(), "reference"]):
            kernels = BACKENDS[backend]
            cost_to_go = getattr(kernels, "cost_to_go", reference.cost_to_go)
            row_weights = CreditScan(credit, lengths, kernels).row_weights
            calls: dict[str, Call] = {
                "cost_to_go": partial(cost_to_go, ones, chunk.slots, None, 0.9, None),
                "credit": partial(row_weights, statistics, 0, ones, chunk.rows, chunk),
            }
            for name, call in calls.items():
                times[f"{backend} {name} B={num_sequences}"] = 1e3 * median_ms(call)
    return times


def _printer(record: Record) -> Callable[[str, str, float], None]:
    def put(name: str, unit: str, value: float) -> None:
        record.put(f"{name} {unit}", value)
        print(f"{name:<24}{value:10.1f} {unit}", flush=True)

    return put
