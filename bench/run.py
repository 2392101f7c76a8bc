"""Throughput, memory and accuracy of this library against everything else that computes the same.

    python bench/run.py                                   the shape of SmolLM2-135M, float32, all installed peers
                                                          in some three minutes on two cores
    python bench/run.py --quick --peers none              under a minute
    python bench/run.py --shapes 512x151936x896 --dtype bf16 --threads 1 --json out.json
    python bench/run.py --processes 1 2 4                 one head on several processes (processes.py)
    python bench/run.py --render out.json --plot figures  Markdown and figures of earlier runs, nothing is measured

For each case every candidate is verified against float64 in a separate process, which also measures its memory
(verify.py); the right ones are then timed together in this process, in interleaved rounds (timing.py). cases.py has the
ops and their inputs, peers.py the candidates and how to install them.

Columns: median ms and its spread; ratio to the bare matrix products of the same run; ratio to ours with the plan that
it takes by itself; peak MiB beyond inputs and their gradients; relative error of the gradients against float64, also
where teacher and student have nearly converged. The last line is the run as JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import machine
import processes
import speed_plots
import speed_tables
import torch
import verify
from cases import (
    DATA,
    DTYPES,
    NUM_PRODUCTS,
    OTHER_OPS,
    REGIMES,
    SMOLLM2_SHAPE,
    Case,
    CaseInputs,
    data_for,
    exact_result,
    make_case_inputs,
)
from peers import INSTALL, Candidate, candidates, default_plan
from timing import Call, Timing, bare_products, forward_backward, interleaved, keep_freed_memory, with_progress

from distil_kernels.extras import require

OPS = ("ce", "distil", "terms", "stats", "frozen", "jsd")
DEFAULT_SHAPES = {"cpu": ["1024x49152x576"], "cuda": ["8192x151936x4096"]}
QUICK_SHAPE = "128x8192x128"
_VERIFY_SECONDS = 1800


def main(arguments: list[str] | None = None) -> None:
    options = _parse(arguments)
    if options.render:
        runs = [json.loads(Path(path).read_text()) for path in options.render]
        print("\n\n".join([speed_tables.summary(runs), *map(speed_tables.markdown, runs)]))
    else:
        torch.set_num_threads(options.threads)
        run = {"header": machine.header(options.device, options.threads), "tables": []}
        if options.device == "cpu" and keep_freed_memory():
            run["header"]["allocator"] += "; freed memory stays in the timing process"
        print(*machine.header_lines(run["header"]), sep="\n", flush=True)
        cases = list(_cases(options))
        if not options.processes:
            _say_what_is_missing(cases, options.peers)
        for case in cases:
            if options.processes:
                run["tables"].append(processes.measure(case, options.processes, options.rounds))
                processes.print_table(run["tables"][-1])
            else:
                run["tables"].append(_measure(case, options))
                speed_tables.print_table(run["tables"][-1])
        runs = [run]
        if options.json:
            Path(options.json).parent.mkdir(parents=True, exist_ok=True)
            Path(options.json).write_text(json.dumps(run, indent=1) + "\n")
    if options.plot:
        for path in speed_plots.plot(runs, Path(options.plot)):
            print(f"wrote {path}", file=sys.stderr)
    if not options.render:
        print(json.dumps(runs[0]))


def _say_what_is_missing(cases: list[Case], peers: list[str]) -> None:
    """Prints which packages the chosen peers lack that could run here, and the command that installs all of them."""
    chosen = [each for case in cases for each in _selected(case, ["none"], peers) if not each.waits_for_gpu(case)]
    if missing := sorted({package for each in chosen for package in each.missing}):
        print(f"peers left out, not installed: {', '.join(missing)}\n  {INSTALL}", flush=True)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--shapes", nargs="+", metavar="NxVxD", help="default: 1024x49152x576, on a GPU 8192x151936x4096"
    )
    parser.add_argument("--dtype", nargs="+", choices=tuple(DTYPES), default=["fp32"])
    parser.add_argument("--ops", nargs="+", choices=OPS, default=["ce"])
    parser.add_argument("--ours", nargs="+", default=["all"], help="all, or parts of names (gradient_in_forward)")
    parser.add_argument("--peers", nargs="+", default=["all"], help="all, none, or parts of names (liger trl)")
    parser.add_argument("--data", choices=("auto", *DATA), default="auto", help="auto: a real model's where it fits")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=5.0, help="a slower candidate stops after its third round")
    parser.add_argument(
        "--processes",
        nargs="+",
        type=int,
        metavar="P",
        help="one head on P processes instead (processes.py): op ce, CPU",
    )
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_SHAPE}, three rounds")
    parser.add_argument("--json", metavar="PATH")
    parser.add_argument("--plot", metavar="DIR", help="PNG and SVG of time and memory against N and V")
    parser.add_argument("--render", nargs="+", metavar="JSON", help="print earlier runs as Markdown")
    options = parser.parse_args(arguments)
    if options.plot:
        require("bench/run.py", "studies", "matplotlib")
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    if options.processes and (options.device != "cpu" or options.ops != ["ce"] or options.plot):
        parser.error("--processes: expected --device cpu, --ops ce and no --plot")
    if options.quick:
        options.rounds = min(options.rounds, 3)
    options.shapes = options.shapes or ([QUICK_SHAPE] if options.quick else DEFAULT_SHAPES[options.device])
    for shape in options.shapes:
        if len(shape.split("x")) != 3 or not all(size.isdecimal() and int(size) for size in shape.split("x")):
            parser.error(f"--shapes: {shape!r} is not NxVxD")
    return options


def _cases(options: argparse.Namespace) -> Iterable[Case]:
    for op in options.ops:
        for dtype in options.dtype:
            for shape in options.shapes:
                num_rows, vocab_size, hidden_size = map(int, shape.split("x"))
                data = data_for(vocab_size, hidden_size) if options.data == "auto" else options.data
                if data == "smollm2" and (vocab_size, hidden_size) != SMOLLM2_SHAPE:
                    raise SystemExit(f"--data smollm2: its shape is Nx{'x'.join(map(str, SMOLLM2_SHAPE))}, not {shape}")
                yield Case(op, num_rows, vocab_size, hidden_size, dtype, options.device, options.threads, data)


def _selected(case: Case, ours: list[str], peers: list[str]) -> list[Candidate]:
    """The candidates of a case whose names contain one of the given words."""

    def is_selected(candidate: Candidate) -> bool:
        names = ours if candidate.group in ("ours", "approximate", "cost") else peers
        return names == ["all"] or (names != ["none"] and any(name in candidate.name for name in names))

    return [c for c in candidates(case.op, torch.device(case.device), case.torch_dtype) if is_selected(c)]


def _measure(case: Case, options: argparse.Namespace) -> dict:
    """Verifies and times the candidates of a case; returns its table."""
    selected = _selected(case, options.ours, options.peers)
    print(f"{case.op} {case.num_rows}x{case.vocab_size}x{case.hidden_size} {case.dtype}: float64 results",
          file=sys.stderr, flush=True)  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="distil_bench_") as name:
        folder = Path(name)
        kl = _prepare(case, folder, {candidate.group for candidate in selected})
        verified = {}
        runnable = {candidate.name: candidate for candidate in selected if candidate.unavailable(case) is None}
        for name in with_progress(list(runnable), "verified"):
            verified[name] = _verify(folder, name, case.device)
        inputs = torch.load(folder / "all_rows.pt", weights_only=False)["inputs"]
    right = [runnable[name] for name, result in verified.items() if result["reason"] is None]
    timings, limits, failures = _time(case, right, inputs.on_device(case.device), options)
    rows = [_row(name, "limit", timings.get(name)) for name in limits]
    for candidate in selected:
        result = verified.get(candidate.name, {})
        reason = candidate.unavailable(case) or result.get("reason") or failures.get(candidate.name)
        rows.append(_row(candidate.name, candidate.group, timings.get(candidate.name), reason, result))
    _mark_default(case, rows)
    _add_ratios(case, rows)
    return {"case": case.as_dict(), "checked_rows": case.checked_rows, "kl": kl, "rows": rows}


def _prepare(case: Case, folder: Path, groups: set[str]) -> dict[str, float]:
    """Writes inputs and exact results for the verifying processes; returns KL(T||S) by regime."""
    (folder / "case.json").write_text(json.dumps(case.as_dict()))
    kl = {}
    for regime in REGIMES:
        inputs = make_case_inputs(case, regime)
        if regime == "ordinary":
            torch.save({"inputs": inputs}, folder / "all_rows.pt")
        inputs = inputs.first_rows(case.checked_rows)
        results = {"op": exact_result(case.op, inputs)}
        results |= {group: exact_result(op, inputs) for group, op in OTHER_OPS.items() if group in groups}
        kl[regime] = results["op"].values["kl"]
        torch.save({"inputs": inputs, "results": results}, folder / f"{regime}.pt")
    gc.collect()
    return kl


def _verify(folder: Path, name: str, device: str) -> dict:
    """Runs verify.py on a candidate and returns its result, or the reason why there is none."""
    # On a CPU from one that has imported torch; a process that uses CUDA must not be a fork.
    context = multiprocessing.get_context("forkserver" if device == "cpu" else "spawn")
    if device == "cpu":
        context.set_forkserver_preload(["torch._dynamo"])
    result = folder / "result.json"
    result.unlink(missing_ok=True)
    process = context.Process(target=verify.main, args=(folder, name))
    process.start()
    process.join(_VERIFY_SECONDS)
    if process.exitcode is None:
        process.kill()
        process.join()
        return {"reason": f"took longer than {_VERIFY_SECONDS} s"}
    if process.exitcode != 0 or not result.exists():
        last = ((folder / "output.txt").read_text().strip().splitlines() or [""])[-1]
        return {"reason": f"its process ended with code {process.exitcode}: {last}"[:300]}
    return json.loads(result.read_text())


def _time(
    case: Case, right: list[Candidate], inputs: CaseInputs, options: argparse.Namespace
) -> tuple[dict[str, Timing], list[str], dict[str, str]]:
    """Returns timings by name, names of the limits, and reasons why right candidates could not be timed."""
    torch._dynamo.reset()
    calls: dict[str, Call] = bare_products(case, inputs)
    limits, failures = list(calls), {}
    for candidate in right:
        try:
            loss = candidate.build(case)
            forward_backward(loss, inputs)
        except Exception as error:  # as in verify.py; beside the other candidates it may run out of memory
            failures[candidate.name] = f"failed: {error}".splitlines()[0][:300]
        else:
            calls[candidate.name] = lambda loss=loss: forward_backward(loss, inputs)
    for name in limits:
        calls[name]()
    timings = interleaved(calls, case.device, options.rounds, options.seconds)
    inputs.clear_gradients()
    return timings, limits, failures


def _row(
    name: str, group: str, timing: Timing | None, reason: str | None = None, result: dict | None = None
) -> dict[str, object]:
    row: dict[str, object] = {"name": name, "group": group, "reason": reason}
    if timing is not None:
        row |= {"ms": timing.seconds * 1e3, "spread_ms": timing.spread * 1e3, "rounds": timing.rounds}
    return row | {key: value for key, value in (result or {}).items() if key != "reason"}


def _mark_default(case: Case, rows: list[dict]) -> None:
    """Marks the row of the library's choice: the first back end that runs, with the plan that it chooses."""
    ours = [row for row in rows if row["group"] == "ours" and "ms" in row]
    for row in [row for row in ours if row["name"].endswith(f" {default_plan(case)}")][:1]:
        row["default"] = True


def _add_ratios(case: Case, rows: list[dict]) -> None:
    """Adds each row's time over the fastest bare products (a label loss has fewer) and over our time."""
    limit = min(row["ms"] for row in rows if row["group"] == "limit")
    ours = speed_tables.our_row(rows)
    for row in rows:
        if "ms" in row:
            products = NUM_PRODUCTS[OTHER_OPS.get(row["group"], case.op)]
            row["limit_ratio"] = row["ms"] / (limit * products / NUM_PRODUCTS[case.op])
            row["ours_ratio"] = row["ms"] / ours["ms"] if ours else None


if __name__ == "__main__":
    main()
