"""The benchmark itself: one quick run as a user starts it, and the parts that keep it honest."""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import peers
import pytest
import run
import speed_plots
import speed_tables
import timing
import torch
from cases import Case, exact_result, make_case_inputs, relative_errors
from verify import rejection_reason

from distil_kernels.backends import cpu
from distil_kernels.engine import gemm

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CASE = Case("ce", 64, 700, 16, "fp32", "cpu", 1)


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict]:
    """Standard output and JSON file of `bench/run.py --quick --peers none`."""
    path = tmp_path_factory.mktemp("bench") / "out.json"
    command = [sys.executable, "bench/run.py", "--quick", "--peers", "none", "--threads", "1", "--json", str(path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    return process.stdout, json.loads(path.read_text())


def test_quick_run_times_checks_and_weighs_every_plan_that_can_run(quick_run: tuple[str, dict]) -> None:
    _, record = quick_run
    (table,) = record["tables"]
    expected = {"ours reference gradient_in_forward"}
    if cpu.unavailable(torch.device("cpu"), torch.float32) is None:
        expected |= {f"ours cpu {plan}" for plan in ("gradient_in_forward", "kept_gradient", "recompute")}
    timed = {row["name"]: row for row in table["rows"] if row["group"] == "ours" and row["reason"] is None}
    assert set(timed) == expected
    for row in timed.values():
        assert row["rounds"] == 3
        assert row["ms"] > 0
        assert row["limit_ratio"] > 0
        for regime, bound in (("ordinary", 1e-4), ("converged", 1e-3)):
            assert set(row["errors"][regime]) == {"value", "student_hidden", "student_weight"}
            assert all(0 < error < bound for error in row["errors"][regime].values())
    assert 0 < table["kl"]["converged"] < 0.01 < table["kl"]["ordinary"]


def test_candidates_are_chosen_by_parts_of_their_names() -> None:
    every = [candidate.name for candidate in run._selected(CASE, ["all"], ["all"])]
    ours = [candidate.name for candidate in run._selected(CASE, ["all"], ["none"])]
    few = {candidate.name for candidate in run._selected(CASE, ["cpu gradient_in_forward"], ["naive"])}
    assert {"ours cpu recompute", "ours cpu threshold 0.001", "naive torch"} <= set(every)
    assert set(ours) == {name for name in every if name.startswith("ours ")}
    assert few == {"ours cpu gradient_in_forward", "naive torch", "naive torch, compiled"}


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory of a CPU process is read from Linux")
def test_quick_run_measures_the_memory_that_the_plan_has(quick_run: tuple[str, dict]) -> None:
    """A chunk of logits and the dW accumulator, to a huge page (2 MiB) either way.

    The peak is in forward, before dW itself exists, whose bytes are taken off as a gradient's: the accumulator may
    stand in its place, and then the chunk is all that is left, less the part of it that lies in pages which the
    process already had.
    """
    huge_page = 2 * 2**20
    case = quick_run[1]["tables"][0]["case"]
    chunk = 4 * case["vocab_size"] * 2 * case["num_rows"]
    accumulator = 4 * case["vocab_size"] * case["hidden_size"]
    rows = {row["name"]: row for row in quick_run[1]["tables"][0]["rows"]}
    name = next((name for name in ("ours cpu gradient_in_forward",) if name in rows and not rows[name]["reason"]), None)
    if name is None:
        pytest.skip("the cpu back end is not built")
    assert chunk - huge_page <= rows[name]["peak_extra_bytes"] <= chunk + accumulator + huge_page


def test_quick_run_ends_with_its_json_and_says_where_it_ran(quick_run: tuple[str, dict]) -> None:
    text, record = quick_run
    assert json.loads(text.strip().splitlines()[-1]) == record
    assert {"date", "command", "commit", "device", "threads", "versions", "allocator"} <= set(record["header"])
    assert record["header"]["versions"]["torch"].startswith(torch.__version__.split("+")[0])


def test_markdown_and_figures_come_from_the_json_alone(quick_run: tuple[str, dict], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    record = quick_run[1]
    text = speed_tables.markdown(record)
    for row in record["tables"][0]["rows"]:
        if row["reason"] is not None:
            continue
        assert f"| {row['name']} | {row['ms']:.1f} |" in text
    assert record["header"]["command"] in text
    larger = copy.deepcopy(record["tables"][0])
    larger["case"]["num_rows"] *= 2
    with_peer = copy.deepcopy(record["tables"][0])
    ours = next(row for row in with_peer["rows"] if row["group"] == "ours" and "ms" in row)
    with_peer["rows"].append(ours | {"name": "somebody's", "group": "peer"})
    bars = "ce_fp32_cpu_1_128x8192x128"
    for tables, name in (([*record["tables"], larger], "ce_fp32_cpu_1"), ([with_peer], bars)):
        written = speed_plots.plot([{"tables": tables}], tmp_path)
        assert written == [tmp_path / f"{name}.png", tmp_path / f"{name}.svg"]
        assert all(path.stat().st_size > 1000 for path in written)
    assert speed_plots.plot([record], tmp_path) == []


def test_the_summary_takes_the_fastest_and_the_leanest_peer() -> None:
    def row(name: str, group: str, ms: float, mib: int, error: float) -> dict:
        errors = {"converged": {"student_hidden": error / 2, "student_weight": error}}
        return {"name": name, "group": group, "reason": None, "ms": ms, "limit_ratio": ms / 80,
                "peak_extra_bytes": mib * 2**20, "errors": errors}  # fmt: skip

    case = {"op": "ce", "num_rows": 7, "vocab_size": 9, "hidden_size": 5, "dtype": "bf16", "threads": 2}
    rows = [
        row("4 bare products, ours", "limit", 80, 0, 0), row("4 bare products, bf16", "limit", 90, 0, 0),
        row("ours a", "ours", 110, 30, 1e-3), row("ours b", "ours", 99, 20, 2e-3),
        row("ours x", "approximate", 50, 9, 1),
        row("fast", "peer", 120, 70, 0.5), row("lean", "peer", 140, 60, 0.4),
        {"name": "absent", "group": "peer", "reason": "not installed"},
    ]  # fmt: skip
    *_, line = speed_tables.summary([{"tables": [{"case": case, "rows": rows}]}]).splitlines()
    assert [cell.strip() for cell in line.strip("|").split("|")] == [
        "ce 7x9x5 bf16, 2 threads", "99", "1.10", "1.24", "120", "fast", "20", "60", "lean", "2.0e-03", "5.0e-01",
    ]  # fmt: skip
    default = [each | {"default": True} if each["name"] == "ours a" else each for each in rows]
    assert "| 110 |" in speed_tables.summary([{"tables": [{"case": case, "rows": default}]}])
    alone = [row for row in rows if row["group"] != "peer"]
    assert "7x9x5" not in speed_tables.summary([{"tables": [{"case": case, "rows": alone}]}])


def test_a_row_that_was_not_timed_is_listed_with_its_reason(quick_run: tuple[str, dict]) -> None:
    record = copy.deepcopy(quick_run[1])
    record["tables"][0]["rows"].append({"name": "other", "group": "peer", "reason": "its kernels need a GPU"})
    text = speed_tables.markdown(record)
    assert "not timed: other: its kernels need a GPU" in text
    assert "| other |" not in text


def test_the_first_lines_say_how_to_get_the_peers(monkeypatch, capsys) -> None:
    found = {"liger_kernel": None, "trl": None, "fla": None}
    find_spec = peers.importlib.util.find_spec
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: found.get(name, "trl") and find_spec("torch"))
    run._say_what_is_missing([CASE], ["all"])
    said, command = capsys.readouterr().out.splitlines()
    assert said == "peers left out, not installed: liger_kernel, trl"  # fla's needs a GPU
    assert command.strip() == peers.INSTALL and "liger-kernel trl" in command
    run._say_what_is_missing([CASE], ["naive"])
    assert capsys.readouterr().out == ""


def test_a_wrong_result_gets_no_speed() -> None:
    inputs = make_case_inputs(CASE, "ordinary")
    result = exact_result("ce", inputs)
    loss = peers._naive("ce")

    def reason(scale: float, grad_scale: float) -> str | None:
        value = timing.forward_backward(
            lambda inputs: loss(inputs).mul(grad_scale) + loss(inputs).detach() * (scale - grad_scale), inputs
        ).item()
        exact = result.values["loss"]
        return rejection_reason(CASE, {"value": abs(value - exact) / abs(exact), **relative_errors(inputs, result)})

    assert reason(1.0, 1.0) is None
    assert "another value" in reason(1.01, 1.0)
    assert "another gradient" in reason(1.0, 1.01)
    assert "another value" in reason(math.nan, 1.0)


def test_a_candidate_whose_process_dies_has_its_last_words_as_reason(tmp_path: Path) -> None:
    (tmp_path / "case.json").write_text(json.dumps(CASE.as_dict()))
    reason = run._verify(tmp_path, "nobody's", "cpu")["reason"]
    assert reason == "its process ended with code 1: StopIteration"


def test_errors_are_relative_to_the_norm_of_the_exact_gradient() -> None:
    inputs = make_case_inputs(CASE, "ordinary")
    result = exact_result("ce", inputs)
    for name, leaf in inputs.leaves.items():
        leaf.grad = result.gradients[name].float() * 1.25
    assert relative_errors(inputs, result) == pytest.approx({"student_hidden": 0.25, "student_weight": 0.25}, rel=1e-4)


def test_rounds_are_interleaved_and_a_slow_call_leaves_after_its_third() -> None:
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    timings = timing.interleaved(calls, "cpu", rounds=2, seconds=100.0)
    assert sorted(order[:3]) == sorted(order[3:]) == list("abc")
    assert {name: each.rounds for name, each in timings.items()} == {"a": 2, "b": 2, "c": 2}
    timings = timing.interleaved(calls, "cpu", rounds=5, seconds=-1.0)
    assert {each.rounds for each in timings.values()} == {3}


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory of a process is read from Linux")
@pytest.mark.parametrize("stays", [True, False])
def test_freed_memory_stays_in_the_process(stays: bool) -> None:
    """Runs in a separate process: a setting of malloc cannot be taken back."""
    code = f"""
import torch, timing
if {stays}:
    assert timing.keep_freed_memory()
torch.ones(2**26)
print(timing.resident_bytes("VmRSS") - timing.resident_bytes("VmHWM"))
"""
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "bench", capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    given_back = -int(process.stdout)
    assert given_back < 2**24 if stays else given_back > 2**27


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory of a CPU process is read from Linux")
def test_peak_memory_is_what_a_call_needs_beyond_inputs_and_gradients() -> None:
    inputs = make_case_inputs(Case("ce", 64, 2**15, 64, "fp32", "cpu", 1), "ordinary")

    def call() -> None:
        for leaf in inputs.leaves.values():
            leaf.grad = torch.ones_like(leaf)
        for mebibytes in (40, 60):  # above 32 MiB malloc returns a freed block at once, whatever happened before
            torch.ones(mebibytes * 2**18)

    call()
    assert timing.peak_extra_bytes(call, inputs, "cpu") == pytest.approx(60 * 2**20, abs=2**20)


def test_bare_products_are_the_ones_of_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    product, own_flops = gemm._product, []

    def counted(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor, **options: object) -> None:
        own_flops.append(2 * left.shape[0] * left.shape[1] * right.shape[1])
        product(left, right, out, **options)

    monkeypatch.setattr(gemm, "_product", counted)
    for op, products in (("ce", 4), ("frozen", 3), ("stats", 4), ("distil", 4)):
        case = Case(op, 64, 700, 16, "fp32", "cpu", 1)
        calls = timing.bare_products(case, make_case_inputs(case, "ordinary"))
        expected = products * 2 * 64 * 700 * 16
        assert _flops(calls.pop(f"{products} bare products, fp32")) == expected
        assert bool(calls) == gemm.has_float32_product()
        for call in calls.values():
            own_flops.clear()
            call()
            assert sum(own_flops) == expected


def _flops(call: timing.Call) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("arguments", [["--shapes", "1024x49152"], ["--shapes", "0x10x10"], ["--ops", "label"]])
def test_a_wrong_argument_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main(arguments)
    assert arguments[0] in capsys.readouterr().err


def test_nobody_always_follows_the_same_neighbour() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "abcd"}
    timing.interleaved(calls, "cpu", rounds=6, seconds=1e9)
    rounds = [order[begin : begin + 4] for begin in range(0, 24, 4)]
    assert all(sorted(names) == list("abcd") for names in rounds)
    before_b = {order[place - 1] for place in range(1, 24) if order[place] == "b"}
    assert len(before_b) >= 3
