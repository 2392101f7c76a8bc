"""Four processes on one run: two pairs that hold a model each, or four shares of one model whose vocabulary stays in
shards. Gradients are those of one process, rollouts and records those of whole models, a resumed run is the same.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from runs import EXTRA, assert_close_records, assert_same, assert_same_steps, run_main, start, two_steps
from tiny import save_tiny_model
from transformers import AutoModelForCausalLM
from two_processes import together

from distil_kernels.train import shared_rows
from distil_kernels.train.__main__ import main

pytestmark = pytest.mark.slow

SETTINGS = {"prompts_per_step": 4, "teacher": "ema"}
WAYS = {"pairs": {"tensor_parallel": 2}, "shards": {"shard": True}}
RUN = [*EXTRA, "--prompts_per_step", "4", "--held_out_every", "2"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Embeddings tied to the head, of a size that four do not divide, with a row that has no gradient as an input."""
    return save_tiny_model(tmp_path_factory.mktemp("model"), vocab_size=261, pad_token_id=3)


def in_four(rank: int, model: Path, directory: Path) -> int:
    """Gradients and runs in both ways, by processes that stay together."""
    Accelerator.end_training = lambda self: None  # type: ignore[method-assign]
    shared_rows.exchange_is_leaner = lambda sizes: True  # also where a vocabulary is as small as here
    for way, settings in WAYS.items():
        steps = two_steps(model, directory / f"{way} {rank}", **SETTINGS, **settings)
        torch.save(steps, directory / f"{way} {rank}.pt")
    starts = (
        ("pairs", 3, "--tensor_parallel", "2", "--micro_batch_prompts", "1"),
        ("again", 2, "--tensor_parallel", "2", "--micro_batch_prompts", "1"),
        ("shards", 2, "--shard"),
        ("whole", 2),
    )
    for name, steps, *options in starts:
        assert main([*start(model, directory, name, steps), *RUN, *options]) == 0
    return main(["--resume", str(directory / "again"), "--steps", "3"])


@pytest.fixture(scope="module")
def four(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("four")
    assert together(in_four, model, directory, number=4) == [0] * 4
    return directory


@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_those_of_one_process(model: Path, four: Path, tmp_path: Path, way: str) -> None:
    expected = two_steps(model, tmp_path / "alone", **SETTINGS)
    for rank in range(4):
        assert_same_steps(torch.load(four / f"{way} {rank}.pt"), expected, way)


def assert_close_runs(ours: Path, theirs: Path) -> None:
    """The same rollouts, and records, weights and configurations that differ by rounding."""
    assert_close_records(ours, theirs)
    checkpoints = [run / "checkpoint" for run in (ours, theirs)]
    files = [sorted(path.name for path in checkpoint.iterdir()) for checkpoint in checkpoints]
    configs = [(checkpoint / "config.json").read_text() for checkpoint in checkpoints]
    assert files[0] == files[1] and configs[0] == configs[1]
    weights = [AutoModelForCausalLM.from_pretrained(checkpoint).state_dict() for checkpoint in checkpoints]
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)


def test_a_run_of_two_pairs_is_that_of_two_processes(model: Path, four: Path, tmp_path: Path) -> None:
    arguments = [*start(model, tmp_path, "two", 3), *RUN, "--micro_batch_prompts", "1"]
    assert together(run_main, arguments) == [0, 0]
    assert_close_runs(four / "pairs", tmp_path / "two")


def test_a_run_of_four_shares_is_that_of_whole_models(four: Path) -> None:
    assert_close_runs(four / "shards", four / "whole")


def test_a_resumed_run_of_pairs_repeats_to_the_last_bit(four: Path) -> None:
    assert_same(four / "again", four / "pairs")


def test_one_process_evaluates_it(four: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(four / "pairs")]) == 0
    assert '"step": 3' in capsys.readouterr().out
