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
    stages = ("smoke", "time", "accuracy", "parts", "sweep", "profile")
    run = check(*stages, "--rehearse", "--out", tmp_path, "--commit", "abc")
    assert run.returncode == 0, run.stdout + run.stderr
    record = json.loads((tmp_path / "gpu_check.json").read_text())
    assert record["commit"] == "abc"
    assert record["stages"] == dict.fromkeys(stages, "passed")
    assert set(record["results"]["time"]) == {"versions", "headline", "narrow", "extra_bytes at N=128"}
    assert record["results"]["accuracy"]["near cpu"][0] < 5e-3
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
