"""A step of TRL's SDPO trainer on a tiny model: given the same prompts and seed it is ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl")

import trainers
from tiny import save_tiny_model

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict]:
    """Standard output and JSON file of a round of eight completions of 96 tokens: ours, SDPO, and SDPO switched."""
    directory = save_tiny_model(tmp_path_factory.mktemp("tiny"), max_position_embeddings=1024)
    path = directory / "out.json"
    command = [
        sys.executable, "bench/trainers.py", "--shape", "long", "--rounds", "1", "--threads", "1", "--model",
        str(directory), "--json", str(path), "--trainers", "full_logits",
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stderr
    return process.stdout, json.loads(path.read_text())


@pytest.fixture
def rows(quick_run: tuple[str, dict]) -> dict[str, dict]:
    return {row["name"]: row for row in quick_run[1]["table"]["rows"]}


def test_every_trainer_is_timed_and_weighed(quick_run: tuple[str, dict], rows: dict[str, dict]) -> None:
    printed, run = quick_run
    assert json.loads(printed.splitlines()[-1]) == run
    assert run["table"]["completion_tokens"] == [96, 96]
    for row in rows.values():
        assert row["rounds"] == 1
        assert 0 < row["rollout"] < row["seconds"] > row["update"] > 0
        assert 0.5 < row["tokens_per_second"] * row["seconds"] / (8 * 96) < 2
        assert 0 <= row["rollout_peak"] < row["held"] and 0 < row["update_peak"] < row["held"]
        assert row["name"] in printed
        assert row["name"] in trainers.markdown(run)


def test_trl_with_the_full_vocabulary_computes_our_step(rows: dict[str, dict]) -> None:
    ours, theirs = rows["ours"], rows["trl full_logits"]
    assert theirs["same_completions"] == 2
    assert theirs["kl"] == pytest.approx(ours["kl"], rel=1e-5)
    assert min(ours["kl"]) > 0.01
    # Its loss is the mean over the tokens of a completion, ours the sum.
    assert [96 * norm for norm in theirs["grad_norm"]] == pytest.approx(ours["grad_norm"], rel=1e-4)


def test_the_switch_leaves_trl_its_step(rows: dict[str, dict]) -> None:
    before, after = rows["trl full_logits"], rows["trl full_logits, switched"]
    assert after["same_completions"] == 2
    assert after["kl"] == pytest.approx(before["kl"], rel=1e-5)
    assert after["grad_norm"] == pytest.approx(before["grad_norm"], rel=1e-4)
