"""One head on several processes: the vocabulary in shards (`vocab_group`) beside gathering the head for each call.

    python bench/run.py --processes 1 2 4 --shapes 1024x49152x576 --threads 1

    shards      every process has all rows and V / P entries of both heads; N x D of dh are summed
    gathered    every process has N / P rows and V / P entries of both heads; it gathers both heads for the call, and
                its gradient of the student's is reduce-scattered (what FSDP does)

Both leave every process with the gradient of its V / P entries. The processes talk over gloo and share this machine's
cores: with more processes than cores, CPU seconds (of all processes) tell more than the time. Time is the slowest
process's, median of the rounds, both methods in each round. Memory is the largest of a process: its part of the heads,
the gradient of it, and the peak beyond inputs and gradients. Bytes are what a process gives to collectives, by the
messages of a ring: (P - 1) parts of a gather or a reduce-scatter, twice that for a sum.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
from cases import Case, CaseInputs, make_case_inputs
from timing import reset_high_water, resident_bytes, return_large_blocks
from torch import Tensor

from distil_kernels import fused_forward_ce
from distil_kernels.engine import placements, vocab_shards

METHODS = ("shards", "gathered")
COLUMNS = ("processes", "method", "ms", "x one", "CPU s", "heads MiB", "peak MiB", "x one", "sent MiB", "error dW")
MIB = 2**20


def measure(case: Case, numbers: list[int], rounds: int) -> dict[str, Any]:
    """Returns the table of a case for some numbers of processes."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.save(make_case_inputs(case, "ordinary"), folder / "inputs.pt")
        rows = []
        multiprocessing.get_context("forkserver").set_forkserver_preload(
            ["torch._dynamo"]
        )  # as run.py does: there is one such server
        for number in dict.fromkeys([1, *numbers]):
            torch.multiprocessing.start_processes(
                _process, (number, case, folder, rounds), nprocs=number, start_method="forkserver"
            )
            for method in METHODS if number > 1 else METHODS[:1]:
                parts = [json.loads((folder / f"{method}{rank}.json").read_text()) for rank in range(number)]
                rows.append(_row(number, method, parts))
    one = rows[0]
    for row in rows:
        row["time_ratio"], row["memory_ratio"] = row["ms"] / one["ms"], row["peak_bytes"] / one["peak_bytes"]
    return {"case": case.as_dict(), "processes": rows}


def print_table(table: dict[str, Any]) -> None:
    case = table["case"]
    print(f"\n{case['op']}: N={case['num_rows']} V={case['vocab_size']} D={case['hidden_size']} {case['dtype']}, "
          f"{case['threads']} threads in each process\n")  # fmt: skip
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS))
    for row in table["processes"]:
        cells = (
            row["processes"], row["method"] if row["processes"] > 1 else "one head", f"{row['ms']:.0f}",
            f"{row['time_ratio']:.2f}", f"{row['cpu_seconds']:.2f}", f"{row['head_bytes'] / MIB:.0f}",
            f"{row['peak_bytes'] / MIB:.0f}", f"{row['memory_ratio']:.2f}", f"{row['sent_bytes'] / MIB:.1f}",
            f"{row['error']:.1e}",
        )  # fmt: skip
        print("| " + " | ".join(map(str, cells)) + " |")


def _row(number: int, method: str, parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns what is shown of the processes' measurements."""
    times = [max(each) for each in zip(*(part["seconds"] for part in parts), strict=True)]
    return {
        "processes": number,
        "method": method,
        "ms": 1e3 * statistics.median(times),
        "cpu_seconds": sum(statistics.median(part["cpu_seconds"]) for part in parts),
        **{name: max(part[name] for part in parts) for name in ("head_bytes", "peak_bytes", "sent_bytes", "error")},
    }


def _process(rank: int, number: int, case: Case, folder: Path, rounds: int) -> None:
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    torch.set_num_threads(case.threads)
    return_large_blocks()
    torch.distributed.init_process_group("gloo", rank=rank, world_size=number, init_method=f"file://{folder}/{number}")
    inputs = torch.load(folder / "inputs.pt", weights_only=False, mmap=True)
    calls = {method: _call(method, rank, number, inputs) for method in (METHODS if number > 1 else METHODS[:1])}
    results: dict[str, dict[str, Any]] = {method: {"seconds": [], "cpu_seconds": []} for method in calls}
    for method, (call, leaves) in calls.items():
        call()  # fills the buffers of the products
        results[method]["error"] = _error(leaves["weight"].grad, rank, number, folder)
        results[method] |= _memory(call, leaves)
        with _counted_bytes(number) as sent:
            call()
        results[method]["sent_bytes"] = sum(sent)
    for _ in range(rounds):
        for method, (call, _) in calls.items():
            torch.distributed.barrier()
            begin, used = time.perf_counter(), _cpu_seconds()
            call()
            results[method]["seconds"].append(time.perf_counter() - begin)
            results[method]["cpu_seconds"].append(_cpu_seconds() - used)
    for method, result in results.items():
        (folder / f"{method}{rank}.json").write_text(json.dumps(result))
    torch.distributed.destroy_process_group()


def _call(method: str, rank: int, number: int, inputs: CaseInputs) -> tuple[Callable[[], None], dict[str, Tensor]]:
    """Returns one forward and backward, and the tensors that this process has: leaves, and the teacher's."""
    columns = slice(
        rank * inputs.student_weight.shape[0] // number, (rank + 1) * inputs.student_weight.shape[0] // number
    )
    num_rows = inputs.student_hidden.shape[0]
    rows = slice(rank * num_rows // number, (rank + 1) * num_rows // number) if method == "gathered" else slice(None)
    leaves = {
        "hidden": inputs.student_hidden.detach()[rows].clone().requires_grad_(),
        "weight": inputs.student_weight.detach()[columns].clone().requires_grad_(),
        "teacher_hidden": inputs.teacher_hidden[rows].clone(),
        "teacher_weight": inputs.teacher_weight[columns].clone(),
    }
    loss_of = _gathered_loss if method == "gathered" else _sharded_loss
    return partial(_forward_backward, loss_of, leaves, num_rows, number), leaves


def _forward_backward(loss_of: Callable[..., Tensor], leaves: dict[str, Tensor], num_rows: int, number: int) -> None:
    leaves["hidden"].grad = leaves["weight"].grad = None
    loss_of(*leaves.values(), num_rows, number).backward()


def _sharded_loss(
    hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, num_rows: int, number: int
) -> Tensor:
    group = torch.distributed.group.WORLD if number > 1 else None
    return fused_forward_ce(hidden, weight, teacher_hidden, teacher_weight, vocab_group=group)


def _gathered_loss(
    hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, num_rows: int, number: int
) -> Tensor:
    heads = _Gathered.apply(weight), _Gathered.apply(teacher_weight)
    return fused_forward_ce(hidden, heads[0], teacher_hidden, heads[1], normalizer=num_rows)


class _Gathered(torch.autograd.Function):
    """The rows of all processes; their gradients are summed, and each process gets its own."""

    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        return placements.all_gathered(part.detach(), torch.distributed.group.WORLD)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        own = gradient.new_empty(gradient.shape[0] // torch.distributed.get_world_size(), *gradient.shape[1:])
        vocab_shards.reduce_scatter(own, gradient, torch.distributed.group.WORLD)
        return own


def _memory(call: Callable[[], None], leaves: dict[str, Tensor]) -> dict[str, int]:
    """Returns the bytes of this process's heads, and the peak of a call with them and the gradient of the student's."""
    leaves["hidden"].grad = leaves["weight"].grad = None
    heads = leaves["weight"].nbytes + leaves["teacher_weight"].nbytes
    reset_high_water()
    before = resident_bytes("VmRSS")
    call()
    return {"head_bytes": heads, "peak_bytes": heads + resident_bytes("VmHWM") - before}


def _error(gradient: Tensor, rank: int, number: int, folder: Path) -> float:
    """Returns how far dW is from that of one process, as a share of its norm; of one process it is 0, and saved."""
    if number == 1:
        torch.save(gradient, folder / "gradient.pt")
        return 0.0
    whole = torch.load(folder / "gradient.pt", mmap=True)
    exact = whole[rank * whole.shape[0] // number : (rank + 1) * whole.shape[0] // number].double()
    return float((gradient.double() - exact).norm() / exact.norm())


@contextmanager
def _counted_bytes(number: int) -> Iterator[list[float]]:
    """Counts what this process gives to collectives: the parts of a ring's messages."""
    sent: list[float] = []
    others = number - 1
    functions = {
        (vocab_shards, "all_gather"): lambda out, part, group: others * part.nbytes,
        (vocab_shards, "reduce_scatter"): lambda out, whole, group: others * out.nbytes,
        (vocab_shards, "all_reduce"): lambda tensor, group: 2 * others * tensor.nbytes / number,
    }
    before = {place: getattr(*place) for place in functions}

    def counted(place: tuple[Any, str]) -> Callable[..., Any]:
        def function(*arguments: Any) -> Any:
            sent.append(functions[place](*arguments))
            return before[place](*arguments)

        return function

    for module, name in functions:
        setattr(module, name, counted((module, name)))
    try:
        yield sent
    finally:
        for (module, name), function in before.items():
            setattr(module, name, function)


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
