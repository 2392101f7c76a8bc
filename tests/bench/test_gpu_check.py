"""bench/gpu/check.py without a GPU: its stages run on the CPU, its record is whole after each."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent.parent / "bench" / "gpu" / "check.py"


def check(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True)


@pytest.mark.slow
def test_rehearsal(tmp_path):
    stages = ("smoke", "parts", "tune", "time", "accuracy", "profile", "sweep")
    run = check(*stages, "--rehearse", "--out", tmp_path, "--commit", "abc")
    assert run.returncode == 0, run.stdout + run.stderr
    record = json.loads((tmp_path / "gpu_check.json").read_text())
    assert record["commit"] == "abc"
    assert record["stages"] == dict.fromkeys(stages, "passed")
    assert set(record["results"]["time"]) == {"measured", "headline", "narrow", "extra_bytes at N=128"}
    assert record["results"]["accuracy"]["near cpu"][0] < 5e-3
    assert all(each["measured"]["commit"] == "abc" for each in record["results"].values())
    assert "credit over token-wise" in (tmp_path / "gpu_check.log").read_text()


def test_a_stage_that_fails_or_has_no_time_is_on_record(tmp_path):
    assert check("smoke", "--rehearse", "--out", tmp_path, "--minutes", 0).returncode == 1
    assert json.loads((tmp_path / "gpu_check.json").read_text())["stages"] == {"smoke": "no time left"}
    # A stage that does not exist is refused before anything is touched.
    assert check("smokey", "--rehearse", "--out", tmp_path).returncode == 2
    assert "smoke" in json.loads((tmp_path / "gpu_check.json").read_text())["stages"]


def test_without_a_gpu_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    run = check("--out", tmp_path)
    assert run.returncode == 2
    assert "no GPU" in run.stdout


@pytest.mark.parametrize(
    ("failing", "processes", "stages"),
    [
        ("tune", [["smoke", "tune", "time"], ["time"]], {"smoke": "passed", "tune": "failed (1)", "time": "passed"}),
        ("smoke", [["smoke", "tune", "time"]], {"smoke": "failed (1)", "tune": "not run", "time": "not run"}),
    ],
)
def test_what_runs_after_a_stage_that_fails(failing, processes, stages, tmp_path, monkeypatch):
    """A CUDA error stays with its process: the stages after it run in a new one, but none after a failing smoke."""
    sys.path.insert(0, str(SCRIPT.parent))
    import check as module

    started = []

    def run(command, *_):
        names = [each for each in command[3:] if each != "--rehearse"]
        started.append(names)
        for name in names:
            if name == failing:
                return "failed (1)"
            module.note(record, name, "passed")
        return "passed"

    monkeypatch.setattr(module, "run", run)
    record = tmp_path / "gpu_check.json"
    record.write_text(json.dumps(module.header("abc")))
    assert not module.run_on_gpu(list(stages), record, tmp_path / "log", None, True, float("inf"))
    assert started == processes
    assert json.loads(record.read_text())["stages"] == stages


def test_the_sanitizer_looks_at_every_kernel(monkeypatch, tmp_path):
    sys.path.insert(0, str(SCRIPT.parent))
    import check as module

    monkeypatch.setattr(module.shutil, "which", lambda name: name)
    kernels = {path.stem for path in (SCRIPT.parents[2] / "csrc" / "cuda").glob("*.cu")}
    for command in module.commands("sanitize", tmp_path).values():
        names = [each.removeprefix("kernel_substring=") for each in command if each.startswith("kernel_substring=")]
        assert all(any(name in kernel for name in names) for kernel in kernels)
