"""The stages of gpu_check.py that run on the GPU; each number is in the record as soon as it is measured.

    python bench/gpu_stages.py STAGE RECORD [--rehearse]

Times are medians by device events, each candidate once per round. `--rehearse` runs a stage on the CPU with tiny
shapes and the CPU's back ends: it shows that the script works, its numbers mean nothing.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from distil_kernels import fused_distil_loss, fused_forward_ce
from distil_kernels.backends import FORWARD_CE, LogitPair, LogitTransform, cuda
from distil_kernels.backends.dispatch import BACKENDS
from distil_kernels.gradients import new_rows
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
TARGETS = {"forward_ce": (1.15, 4.5e9), "frozen_head": (0.9, 1.5e9)}
"""At HEADLINE: time over the four bare products, extra bytes."""

Call = Callable[[], object]


class Record:
    """results[stage][name] = value in a JSON file, written at once."""

    def __init__(self, path: Path, stage: str) -> None:
        self._path, self._stage = path, stage
        self.put("versions", {"device": device_name(), "torch": torch.__version__, "cuda": torch.version.cuda})

    def put(self, name: str, value: object) -> None:
        record = json.loads(self._path.read_text())
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


def stage_smoke(record: Record) -> None:
    for backend in available():
        for vocab_size in (131, 4096):
            heads = make_heads(64, vocab_size, 64)
            for kind in ("forward_ce", "credit", "frozen_head"):
                step(heads, "reference", kind)
                expected = heads[0].grad.float()
                step(heads, backend, kind)
                error = float((heads[0].grad.float() - expected).norm() / expected.norm())
                record.put(f"{backend} {kind} V={vocab_size}", error)
                print(f"{backend} {kind} V={vocab_size}: dh off plain torch's by {error:.1e}", flush=True)
                if not error < 2e-2:
                    raise SystemExit("that is no rounding")


def stage_time(record: Record) -> None:
    print(f"{device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}, {DTYPE}, forward and backward")
    best = available()[0]
    ratios = _time_shape(HEADLINE, record, "headline")
    for kind, (time_target, memory_target) in TARGETS.items():
        print(f"{kind}: {ratios[f'{best} {kind}']:.3f}, target {time_target} ({memory_target / 1e9} GB)")
    print(f"credit over token-wise: {ratios[f'{best} credit'] / ratios[f'{best} forward_ce']:.3f}, target 1.06")
    heads = make_heads(MANY_ROWS, *HEADLINE[1:])
    found = extra_bytes(lambda: step(heads, best, "forward_ce"), heads)
    record.put(f"extra_bytes at N={MANY_ROWS}", found)
    print(f"N={MANY_ROWS}: extra {found / 1e9:.2f} GB, target 4.5", flush=True)
    heads.clear()
    print(f"target 1.5: {_time_shape(NARROW, record, 'narrow')[f'{best} forward_ce']:.3f}")


def _time_shape(shape: tuple[int, int, int], record: Record, key: str) -> dict[str, float]:
    heads = make_heads(*shape)
    calls: dict[str, Call] = {
        f"{backend} {kind}": lambda backend=backend, kind=kind: step(heads, backend, kind)
        for backend in available()
        for kind in ("forward_ce", "credit", "frozen_head")
    }
    return table("N={} V={} D={}".format(*shape), heads, calls, record, key)


def stage_accuracy(record: Record) -> None:
    """Relative errors (2-norm) of dh and dW against float64; the baseline keeps float32 logits and gradients."""
    num_rows, vocab_size, hidden_size = (32, 999, 16) if REHEARSE else (512, 151_936, 1024)
    for regime, noise in (("apart", None), ("near", 0.01)):
        heads = make_heads(num_rows, vocab_size, hidden_size, noise)

        exact = _gradients(heads, torch.float64)
        found = {"float32 torch": [each.to(DTYPE) for each in _gradients(heads, torch.float32)]}
        for backend in available():
            step(heads, backend, "forward_ce")
            found[backend] = [tensor.grad.clone() for tensor in heads[:2]]
        for name, pair in found.items():
            errors = [float((a.double() - b).norm() / b.norm()) for a, b in zip(pair, exact, strict=True)]
            record.put(f"{regime} {name}", errors)
            print(f"{regime:<8}{name:<16}dh {errors[0]:.2e}  dW {errors[1]:.2e}", flush=True)


def _gradients(heads: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Of the mean cross-entropy, by hidden states and weight."""
    hidden, weight, teacher_hidden, teacher_weight = (tensor.detach().to(dtype) for tensor in heads)
    difference = (hidden @ weight.t()).softmax(-1) - (teacher_hidden @ teacher_weight.t()).softmax(-1)
    print(f"  total variation {0.5 * float(difference.abs().sum(-1).mean()):.4f}")
    difference /= hidden.shape[0]
    return [difference @ weight, difference.t() @ hidden]


def stage_parts(record: Record) -> None:
    put = _printer(record)
    put("copy", "GB/s", _copy_rate())
    weight = make_heads(1, *HEADLINE[1:])[1].detach()
    for rows in (256, 512, 1024, 2048, 4096, 8192):
        for name, rate in _product_rates(rows, weight).items():
            put(f"{name} {rows}", "TFLOP/s", rate)
    for name, rate in _row_kernel_rates(HEADLINE[1]).items():
        put(name, "GB/s", rate)


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
    rows = 8 if REHEARSE else 512
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
        at_once = partial(cuda.row_stats_grad, pair, plain, plain, None, ones, out)
        rates["cuda row_stats_grad"] = (read + written) / 1e6 / median_ms(at_once)
    return rates


def _printer(record: Record) -> Callable[[str, str, float], None]:
    def put(name: str, unit: str, value: float) -> None:
        record.put(f"{name} {unit}", value)
        print(f"{name:<24}{value:10.1f} {unit}", flush=True)

    return put


def stage_sweep(record: Record) -> None:
    heads = make_heads(*HEADLINE)
    num_rows, backend = heads[0].shape[0], available()[0]
    sizes = [
        ("forward_ce", "gradient_in_forward", chunk, ring)
        for chunk, ring in ((256, num_rows), (512, num_rows), (1024, num_rows), (2048, num_rows), (512, num_rows // 2),
                            (1024, num_rows // 4))
    ] + [("frozen_head", "frozen_head", 512, ring) for ring in (512, 1024, 2048, 4096)]  # fmt: skip
    for kind, name, chunk, ring in sizes:
        plan = Plan(name, min(chunk, ring), ring)
        call = partial(step, heads, backend, kind, plan)
        found = {"ms": median_ms(call, 5), "extra_bytes": extra_bytes(call, heads)}
        record.put(f"{name} {chunk} {ring}", found)
        print(f"{name:<20} chunk {chunk:5d} ring {ring:5d} {found['ms']:9.2f} ms {found['extra_bytes'] / 1e9:6.2f} GB",
              flush=True)  # fmt: skip


def stage_profile(record: Record) -> None:
    heads = make_heads(*HEADLINE)
    for kind in ("forward_ce", "credit", "frozen_head"):
        step(heads, available()[0], kind)
        with torch.profiler.profile() as profile:
            step(heads, available()[0], kind)
            if not REHEARSE:
                torch.cuda.synchronize()
        rows = [
            (event.key, event.count, (event.cpu_time_total if REHEARSE else event.self_device_time_total) / 1e3)
            for event in profile.key_averages()
            if REHEARSE or event.device_type == torch.autograd.DeviceType.CUDA
        ]
        rows = sorted(rows, key=lambda row: -row[2])[:15]
        record.put(kind, rows)
        print(f"\n{kind}")
        for name, count, spent in rows:
            print(f"{spent:9.3f} ms {count:6d} x  {name[:90]}", flush=True)


def stage_peers(record: Record) -> None:
    import cases
    import peers

    from distil_kernels.testing import Inputs

    case = cases.Case("ce", *HEADLINE, "bf16", DEVICE.type, 1)
    heads = make_heads(*HEADLINE)
    tokens = torch.randint(HEADLINE[1], (HEADLINE[0],), device=DEVICE)
    ones = torch.ones(HEADLINE[0], device=DEVICE)
    problem = cases.Problem(Inputs(*heads, tokens), ones, ones, cases.borders(HEADLINE[0]))
    best = available()[0]
    calls: dict[str, Call] = {f"ours {best}": lambda: step(heads, best, "forward_ce")}
    calls[f"ours {best}"]()
    ours = heads[0].grad.clone()
    for peer in peers.PEERS:
        reason = peer.unavailable(case) if "ce" in peer.ops else "not this op"
        if reason is None:
            call = _peer(peer, case, problem, heads)
            reason = _try(call, heads[0], ours if peer.group == "peer" else None)
            if reason is None:
                calls[peer.name] = call
        if reason is not None:
            record.put(f"left out: {peer.name}", reason)
            print(f"left out: {peer.name}: {reason}", flush=True)
        if not REHEARSE:
            torch.cuda.empty_cache()
    table("N={} V={} D={}".format(*HEADLINE), heads, calls, record, "headline")


def _peer(peer, case, problem, heads: list[Tensor]) -> Call:  # type: ignore[no-untyped-def]
    built = []

    def call() -> None:
        if not built:
            built.append(peer.build(case))
        for tensor in heads:
            tensor.grad = None
        built[0](problem).backward()

    return call


def _try(call: Call, hidden: Tensor, ours: Tensor | None) -> str | None:
    """Why a peer is not timed: it fails, or its gradient is another one (25 %: most of them round logits)."""
    try:
        call()
        if ours is not None:
            error = float((hidden.grad.float() - ours.float()).norm() / ours.float().norm())
            return None if error < 0.25 else f"its dh is off ours by {error:.2f}"
    except Exception as error:  # whatever a peer raises on a machine it has not seen
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return None


def stage_sanitize(record: Record) -> None:
    """Small calls of every row kernel, every cluster size among them, with ragged ends; for compute-sanitizer."""
    sizes = ((1, 0), (131, 1), (4096, 0), (4099, 5))
    for vocab_size, padding in sizes:
        both = torch.randn(6, vocab_size + padding, device=DEVICE)[:, :vocab_size]
        pair, plain = LogitPair(both[:3], both[3:]), LogitTransform(None, None, 1.0)
        capped = LogitTransform(torch.randn(vocab_size, device=DEVICE), 5.0, 0.7)
        tokens, ones = torch.zeros(3, dtype=torch.int64, device=DEVICE), torch.ones(3, device=DEVICE)
        out = torch.empty(3, -(-vocab_size // 8) * 8, device=DEVICE, dtype=DTYPE)[:, :vocab_size]
        for transform in (plain, capped):
            found = cuda.row_stats(pair, transform, plain, tokens, FORWARD_CE)
            cuda.row_grad(pair, transform, plain, tokens, found, FORWARD_CE, ones, ones, out)
            if (vocab_size + padding) % 4 == 0 and torch.cuda.get_device_capability() >= (9, 0):
                for size in (1, 2, 4, 8):
                    cuda.choose_row_kernel = lambda *_, size=size: cuda.RowKernel(size, "asked for")
                    cuda.row_stats_grad(pair, transform, plain, tokens, ones, out)
        torch.cuda.synchronize()
    record.put("ran", len(sizes))


def device_name() -> str:
    return "rehearsal on a CPU" if REHEARSE else torch.cuda.get_device_name()


if __name__ == "__main__":
    torch.manual_seed(0)
    {name.removeprefix("stage_"): stage for name, stage in globals().items() if name.startswith("stage_")}[sys.argv[1]](
        Record(Path(sys.argv[2]), sys.argv[1])
    )
