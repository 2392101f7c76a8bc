"""Everything that only a GPU can show, in one command. Not yet run on a GPU.

    python bench/gpu_check.py           builds, tests (tests/gpu), compute-sanitizer on small shapes, then timings
    python bench/gpu_check.py smoke     a few small calls of each back end: what compute-sanitizer watches
    python bench/gpu_check.py time      the timings alone

Writes bench/results/gpu_check_<device>_<date>.json and prints a short table: medians by device events, every
candidate once per round; the bare matrix products of the same shape take part, since none can be faster than those.
Without a GPU it says so and exits 2.
"""

from __future__ import annotations

import datetime
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from distil_kernels import fused_distil_loss, fused_forward_ce
from distil_kernels.backends.dispatch import BACKENDS

ROOT = Path(__file__).parent.parent
SHAPES = [(8192, 151936, 4096), (8192, 151936, 1024), (8192, 32000, 4096)]
ROUNDS = 11
NUM_SEQUENCES = 32

Call = Callable[[], object]


def available() -> list[str]:
    gpu = torch.device("cuda")
    return [name for name in ("cuda", "triton") if BACKENDS[name].unavailable(gpu, torch.bfloat16) is None]


def make_heads(num_rows: int, vocab_size: int, hidden_size: int) -> list[torch.Tensor]:
    """Student hidden states and head (with gradients), then the teacher's; logits of about unit scale."""
    sizes = (num_rows, vocab_size) * 2
    heads = [torch.randn(size, hidden_size, device="cuda", dtype=torch.bfloat16) for size in sizes]
    for weight in heads[1::2]:
        weight.mul_(hidden_size**-0.5)
    for tensor in heads[:2]:
        tensor.requires_grad_()
    return heads


def step(heads: list[torch.Tensor], backend: str, kind: str) -> None:
    """Forward and backward as a training step makes them."""
    hidden, weight, teacher_hidden, teacher_weight = heads
    hidden.grad = weight.grad = None
    if kind == "credit":
        tokens = torch.zeros(hidden.shape[0], dtype=torch.int64, device="cuda")
        borders = torch.arange(NUM_SEQUENCES + 1) * (hidden.shape[0] // NUM_SEQUENCES)
        loss = fused_distil_loss(*heads, tokens=tokens, cu_seqlens=borders, backend=backend).loss
    else:
        own_weight = weight.detach() if kind == "frozen_head" else weight
        loss = fused_forward_ce(hidden, own_weight, teacher_hidden, teacher_weight, backend=backend)
    loss.backward()


def bare_products(heads: list[torch.Tensor]) -> Call:
    """Four products in chunks of rows: both logits (float32 results), dh and dW."""
    hidden, weight, teacher_hidden, teacher_weight = (tensor.detach() for tensor in heads)
    rows = 4096
    logits = torch.empty(rows, weight.shape[0], device="cuda")
    grad_logits = torch.randn(rows, weight.shape[0], device="cuda", dtype=torch.bfloat16)

    def run() -> None:
        for begin in range(0, hidden.shape[0], rows):
            part = slice(begin, begin + rows)
            torch.mm(hidden[part], weight.t(), out_dtype=torch.float32, out=logits)
            torch.mm(teacher_hidden[part], teacher_weight.t(), out_dtype=torch.float32, out=logits)
            torch.mm(grad_logits, weight)
            torch.mm(grad_logits.t(), hidden[part])

    return run


def milliseconds(calls: dict[str, Call]) -> dict[str, list[float]]:
    """Per call its times, one of each per round after two rounds of warm-up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(ROUNDS + 2):
        for name, call in calls.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            call()
            end.record()
            end.synchronize()
            if number >= 2:
                times[name].append(begin.elapsed_time(end))
    return times


def extra_bytes(call: Call, heads: list[torch.Tensor]) -> int:
    """Peak of one call beyond inputs and their gradients."""
    for tensor in heads:
        tensor.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    gradients = sum(tensor.grad.nbytes for tensor in heads if tensor.grad is not None)
    return torch.cuda.max_memory_allocated() - before - gradients


def time_shape(shape: tuple[int, int, int]) -> dict[str, object]:
    heads = make_heads(*shape)
    calls: dict[str, Call] = {"four bare products": bare_products(heads)}
    for backend in available():
        for kind in ("forward_ce", "credit", "frozen_head"):
            calls[f"{backend} {kind}"] = lambda backend=backend, kind=kind: step(heads, backend, kind)
    memory = {name: extra_bytes(call, heads) for name, call in calls.items()}
    times = milliseconds(calls)
    medians = {name: statistics.median(each) for name, each in times.items()}
    print(f"\nN={shape[0]} V={shape[1]} D={shape[2]}")
    print(f"{'candidate':<24}{'ms':>9}{'min':>9}{'max':>9}{'ratio':>8}{'extra GB':>10}")
    for name, median in medians.items():
        ratio = median / medians["four bare products"]
        print(f"{name:<24}{median:9.2f}{min(times[name]):9.2f}{max(times[name]):9.2f}{ratio:8.3f}"
              f"{memory[name] / 1e9:10.2f}")  # fmt: skip
    return {"shape": shape, "milliseconds": times, "extra_bytes": memory}


def run_timings() -> None:
    device = torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}, CUDA {torch.version.cuda}, bfloat16, forward and backward")
    record = {
        "device": device,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "shapes": [time_shape(shape) for shape in SHAPES],
    }
    folder = ROOT / "bench" / "results"
    folder.mkdir(exist_ok=True)
    name = f"gpu_check_{device.replace(' ', '_')}_{record['date'][:10]}.json"
    (folder / name).write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote bench/results/{name}")


def smoke() -> None:
    for backend in available():
        for vocab_size in (131, 4096):
            heads = make_heads(64, vocab_size, 64)
            for kind in ("forward_ce", "credit", "frozen_head"):
                step(heads, backend, kind)
        torch.cuda.synchronize()
        print(f"{backend}: ran")


def check_all() -> int:
    python = sys.executable
    steps = [
        [python, "setup.py", "build_ext", "--inplace"],
        [python, "bench/resources.py"],
        [python, "-m", "pytest", "-q", "tests/gpu"],
    ]
    if shutil.which("compute-sanitizer") is None:
        print("no compute-sanitizer: memcheck and racecheck are left out")
    else:
        for tool in ("memcheck", "racecheck"):
            steps.append(["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", python, __file__, "smoke"])
    failed = []
    for command in [*steps, [python, __file__, "time"]]:
        print(f"\n$ {' '.join(command)}", flush=True)
        if subprocess.run(command, cwd=ROOT, check=False).returncode != 0:
            failed.append(" ".join(command))
    print("\n".join(["", *(f"FAILED: {each}" for each in failed)]) if failed else "\nall passed")
    return int(bool(failed))


def main(names: list[str]) -> int:
    if not torch.cuda.is_available():
        print("gpu_check: torch finds no GPU on this machine")
        return 2
    if names == ["smoke"]:
        smoke()
    elif names == ["time"]:
        run_timings()
    else:
        return check_all()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
