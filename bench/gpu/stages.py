"""The stages of check.py that run on the GPU; each number is in the record as soon as it is measured.

    python bench/gpu/stages.py RECORD STAGE ... [--rehearse]

They share a process: torch and a context take 8 to 12 s to begin. `--rehearse` runs them on the CPU: it shows that the
script works.
"""

from __future__ import annotations

import signal
import sys
import time
from functools import partial
from pathlib import Path

import torch
from measure import (
    DEVICE,
    DTYPE,
    HEADLINE,
    MANY_ROWS,
    NARROW,
    REHEARSE,
    Call,
    Record,
    available,
    device_name,
    extra_bytes,
    make_heads,
    median_ms,
    step,
    table,
)  # fmt: skip
from parts import cluster_sizes, row_kernel, stage_parts, stage_tune  # noqa: F401  (stages are found by name below)
from torch import Tensor

from distil_kernels.backends import FORWARD_CE, LogitPair, LogitTransform, cuda
from distil_kernels.plan import Plan

TARGETS = {"forward_ce": (1.15, 4.5e9), "frozen_head": (0.9, 1.5e9)}
"""At HEADLINE: time over the four bare products, extra bytes."""


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
        _check_many_elements(backend, record)
    if "cuda" in available():
        for vocab_size in (50_264, 151_936):
            _check_clusters(vocab_size, record)


def _check_many_elements(backend: str, record: Record) -> None:
    """More than 2^31 entries of the logits' gradient in one buffer: an index of 32 bits would wrap."""
    num_rows, vocab_size = (64, 999) if REHEARSE else (16_384, 151_936)
    heads, last = make_heads(num_rows, vocab_size, 64), slice(num_rows - 32, num_rows)
    step(heads, backend, "forward_ce", Plan("gradient_in_forward", num_rows // 16, num_rows))
    few = [heads[0][last].detach().requires_grad_(), heads[1], heads[2][last], heads[3]]
    ours = num_rows / 32 * heads[0].grad[last].float()
    step(few, "reference", "forward_ce")
    error = float((few[0].grad.float() - ours).norm() / ours.norm())
    record.put(f"{backend} N={num_rows} V={vocab_size}", error)
    print(f"{backend} N={num_rows} V={vocab_size}: dh of the last rows off plain torch's by {error:.1e}", flush=True)
    if not error < 2e-2:
        raise SystemExit("an index wrapped")


def _check_clusters(vocab_size: int, record: Record) -> None:
    """Statistics and gradient of clusters of every size beside two kernels: float32 in place, bfloat16 beside."""
    rows, plain = 256, LogitTransform(None, None, 1.0)
    saved = torch.randn(2 * rows, vocab_size, device=DEVICE)
    weight = torch.rand(rows, device=DEVICE)
    for dtype in (torch.float32, DTYPE):
        found = {}
        for cluster_size in cluster_sizes(vocab_size):
            both = saved.clone()
            pair = LogitPair(both[:rows], both[rows:])
            out = pair.student if dtype == torch.float32 else torch.empty_like(pair.student, dtype=dtype)
            with row_kernel(cluster_size):
                statistics, _ = cuda.row_stats_grad(pair, plain, plain, None, FORWARD_CE, weight, out)
            found[cluster_size] = statistics, out.float()
        for cluster_size, pair in found.items():
            errors = [float((a - b).norm() / b.norm()) for a, b in zip(pair, found[cuda.TWO_KERNELS], strict=True)]
            record.put(f"V={vocab_size} cluster {cluster_size} {dtype}", errors)
            print(f"V={vocab_size} cluster {cluster_size} {dtype}: off two kernels by {errors}", flush=True)
            if not max(errors) < 1e-2:
                raise SystemExit("a cluster computes something else")


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

    case = cases.Case("ce", *HEADLINE, "bf16", DEVICE.type, 1)
    heads = make_heads(*HEADLINE)
    tokens = torch.randint(HEADLINE[1], (HEADLINE[0],), device=DEVICE)
    ones = torch.ones(HEADLINE[0], device=DEVICE)
    borders = cases.sequence_borders(HEADLINE[0])
    inputs = cases.CaseInputs(*heads, tokens, cost_weight=ones, logprob_weight=ones, cu_seqlens=borders)
    best = available()[0]
    calls: dict[str, Call] = {f"ours {best}": lambda: step(heads, best, "forward_ce")}
    calls[f"ours {best}"]()
    ours = heads[0].grad.clone()
    for peer in peers.PEERS:
        reason = peer.unavailable(case) if "ce" in peer.ops else "not this op"
        if reason is None:
            call = _peer(peer, case, inputs, heads)
            reason = _try(call, heads[0], ours if peer.group == "peer" else None)
            if reason is None:
                calls[peer.name] = call
        if reason is not None:
            record.put(f"left out: {peer.name}", reason)
            print(f"left out: {peer.name}: {reason}", flush=True)
        if not REHEARSE:
            torch.cuda.empty_cache()
    table("N={} V={} D={}".format(*HEADLINE), heads, calls, record, "headline")


def _peer(peer, case, inputs, heads: list[Tensor]) -> Call:  # type: ignore[no-untyped-def]
    built = []

    def call() -> None:
        if not built:
            built.append(peer.build(case))
        for tensor in heads:
            tensor.grad = None
        built[0](inputs).backward()

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
                    cuda.row_stats_grad(pair, transform, plain, tokens, FORWARD_CE, ones, out)
        torch.cuda.synchronize()
    for num_positions, horizon in ((1, None), (600, None), (600, 1), (5, 700)):
        slots, later = torch.arange(-1, 2 * num_positions - 1, device=DEVICE).view(num_positions, 2), None
        costs = torch.rand(2 * num_positions - 1, device=DEVICE)
        for _ in range(2):
            _, later = cuda.cost_to_go(costs, slots, later, 0.9, horizon)
    torch.cuda.synchronize()
    record.put("ran", len(sizes))


def main(record: Path, names: list[str]) -> None:
    """Runs stages one after another. One that takes longer than it may ends the process, which check.py begins anew."""
    from check import STAGES

    stages = {name.removeprefix("stage_"): stage for name, stage in globals().items() if name.startswith("stage_")}
    for name in names:
        began, notes = time.monotonic(), Record(record, name)
        signal.alarm(STAGES[name])
        stages[name](notes)
        signal.alarm(0)
        notes.end("passed")
        print(f"== {name}: passed, {time.monotonic() - began:.0f} s", flush=True)
        if not REHEARSE:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    torch.manual_seed(0)
    main(Path(sys.argv[1]), [name for name in sys.argv[2:] if name != "--rehearse"])
