"""Runs that are really killed (SIGKILL), run into a full disk, or find a damaged checkpoint repeat an unharmed one.

Each run is a process of its own, forked from a server that has imported the trainer once.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from runs import assert_equal

from distil_kernels.train.__main__ import main
from distil_kernels.train.run.checkpoint import load_state
from distil_kernels.train.run.json_lines import read_lines

pytestmark = pytest.mark.slow

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["distil_kernels.train.trainer"])
TIMES = ("seconds", "tokens_per_second", "peak_")
NEVER = 1 << 30
QUICK = [
    "--prompts_per_step", "2", "--rollouts_per_prompt", "2", "--max_new_tokens", "4", "--num_examples", "1",
    "--eval_problems", "2", "--eval_every", "2", "--learning_rate", "1e-3", "--steps", "4", "--checkpoint_every", "1",
    "--teacher", "ema", "--ema_rate", "0.3",
]  # fmt: skip


def child(arguments: list[str], kill_at: int, file_limit: int, said: str) -> NoReturn:
    """The trainer, killed before its `kill_at`-th write, rename or removal; a torch.save is killed half-way."""
    torch.set_num_threads(1)
    with open(said, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    count = 0

    def counted(function: Callable[..., Any], dying: Callable[..., Any] | None = None) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == kill_at:
                if dying is not None:
                    dying(*args)
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    save = torch.save

    def half(state: object, path: Path) -> None:
        whole = io.BytesIO()
        save(state, whole)
        path.write_bytes(whole.getvalue()[: whole.tell() // 2])

    torch.save = counted(save, half)
    os.fsync, os.replace, shutil.rmtree = counted(os.fsync), counted(os.replace), counted(shutil.rmtree)
    if file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    status = main(arguments)
    print(f"writes: {count}", flush=True)
    sys.stdout.flush()
    os._exit(status)


class Run:
    """A run directory and the processes that work on it one after another."""

    def __init__(self, model: Path, directory: Path) -> None:
        self.model, self.directory = model, directory
        self.said = directory.with_suffix(".txt")

    def go(self, kill_at: int = NEVER, kill_after: float | None = None, file_limit: int = 0) -> int:
        """Starts or resumes; returns the exit status (-9 when killed)."""
        if not (self.directory / "config.json").exists():
            return self.start(kill_at, kill_after, file_limit)
        return self._run(["--resume", str(self.directory)], kill_at, kill_after, file_limit)

    def start(self, kill_at: int = NEVER, kill_after: float | None = None, file_limit: int = 0) -> int:
        place = ["--runs_dir", str(self.directory.parent), "--name", self.directory.name, "--overwrite"]
        return self._run(["--model", str(self.model), *place, *QUICK], kill_at, kill_after, file_limit)

    def _run(self, arguments: list[str], kill_at: int, kill_after: float | None, file_limit: int) -> int:
        process = PROCESSES.Process(target=child, args=(arguments, kill_at, file_limit, str(self.said)))
        process.start()
        if kill_after is not None:
            time.sleep(kill_after)
            process.kill()
        process.join()
        assert process.exitcode is not None
        return process.exitcode

    def records(self) -> tuple[list[dict[str, Any]], ...]:
        """metrics.jsonl and rollouts.jsonl without what the clock says."""
        return tuple(
            [{key: value for key, value in record.items() if not key.startswith(TIMES)} for record in read_lines(path)]
            for path in (self.directory / "metrics.jsonl", self.directory / "rollouts.jsonl")
        )

    def assert_same_as(self, other: Run) -> None:
        assert self.records() == other.records()
        ours, theirs = (run.directory / "checkpoint" for run in (self, other))
        assert (ours / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()
        assert_equal(load_state(ours), load_state(theirs))
        assert list(self.directory.rglob("*.tmp*")) == []


@pytest.fixture(scope="module")
def whole(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that nothing happened to."""
    run = Run(tiny_model, tmp_path_factory.mktemp("unharmed") / "run")
    assert run.go() == 0, run.said.read_text()
    return run


@pytest.fixture
def dice(request: pytest.FixtureRequest) -> random.Random:
    print(f"seed of the kill moments: {request.config.option.seed}")
    return random.Random(request.config.option.seed)


def test_a_run_killed_again_and_again_repeats_an_unharmed_one(
    whole: Run, tiny_model: Path, tmp_path: Path, dice: random.Random
) -> None:
    run = Run(tiny_model, tmp_path / "run")
    deaths = 0
    # From a resume to the next checkpoint are 26 writes at most: some of these kills come after it.
    while (status := run.go(kill_at=dice.randint(8, 40))) != 0:
        assert status == -signal.SIGKILL, run.said.read_text()
        deaths += 1
        assert deaths < 30
    assert deaths >= 3
    run.assert_same_as(whole)


@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.9])
def test_a_run_killed_at_any_write_repeats_an_unharmed_one(
    whole: Run, tiny_model: Path, tmp_path: Path, dice: random.Random, share: float
) -> None:
    writes = int(whole.said.read_text().split("writes: ")[1])
    run = Run(tiny_model, tmp_path / "run")
    assert run.go(kill_at=int(writes * share) + dice.randint(0, writes // 10)) == -signal.SIGKILL
    assert run.go() == 0, run.said.read_text()
    run.assert_same_as(whole)


def test_a_run_killed_by_the_clock_repeats_an_unharmed_one(
    whole: Run, tiny_model: Path, tmp_path: Path, dice: random.Random
) -> None:
    run = Run(tiny_model, tmp_path / "run")
    for _ in range(3):
        run.go(kill_after=dice.uniform(0.05, 1.0))
    assert run.go() == 0, run.said.read_text()
    run.assert_same_as(whole)


def test_a_full_disk_is_said_and_the_last_checkpoint_stays(whole: Run, tiny_model: Path, tmp_path: Path) -> None:
    run = Run(tiny_model, tmp_path / "run")
    # No file may pass this size: the model fits, the optimiser's state does not.
    limit = (whole.directory / "checkpoint" / "model.safetensors").stat().st_size * 5 // 4
    dies_in_step_3 = int(int(whole.said.read_text().split("writes: ")[1]) * 0.6)
    assert run.go(kill_at=dies_in_step_3) == -signal.SIGKILL
    before = os.readlink(run.directory / "checkpoint")
    assert run.go(file_limit=limit) == 1
    said = " ".join(run.said.read_text().split())
    assert "cannot write" in said and f"as of {before}" in said and "Traceback" not in said
    assert os.readlink(run.directory / "checkpoint") == before
    assert run.go() == 0, run.said.read_text()
    run.assert_same_as(whole)


def test_a_disk_that_is_full_of_records_is_said(whole: Run, tiny_model: Path, tmp_path: Path) -> None:
    run = Run(tiny_model, tmp_path / "run")
    assert run.go(file_limit=3000) == 1
    said = " ".join(run.said.read_text().split())
    assert "cannot write" in said and ".jsonl: File too large" in said and "Traceback" not in said
    assert run.go() == 0, run.said.read_text()
    run.assert_same_as(whole)


@pytest.mark.parametrize("harm", ["cut", "flipped bit", "missing file", "no manifest"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    whole: Run, tmp_path: Path, dice: random.Random, harm: str
) -> None:
    run = Run(whole.model, tmp_path / "run")
    shutil.copytree(whole.directory, run.directory, symlinks=True)
    newest = run.directory / "checkpoint-000004"
    state = newest / "trainer.pt"
    if harm == "cut":
        state.write_bytes(state.read_bytes()[:1000])
    elif harm == "flipped bit":
        content = bytearray(state.read_bytes())
        content[dice.randrange(len(content))] ^= 1
        state.write_bytes(content)
    else:
        (newest / ("model.safetensors" if harm == "missing file" else "files.json")).unlink()
    assert run.go() == 0, run.said.read_text()
    said = " ".join(run.said.read_text().split())
    assert "checkpoint-000004 is damaged" in said and "resuming from" in said and "checkpoint-000003" in said
    run.assert_same_as(whole)


def test_when_all_checkpoints_are_damaged_the_run_says_so(whole: Run, tmp_path: Path) -> None:
    run = Run(whole.model, tmp_path / "run")
    shutil.copytree(whole.directory, run.directory, symlinks=True)
    for state in run.directory.glob("checkpoint-*/trainer.pt"):
        state.unlink()
    assert run.go() == 2
    assert "every checkpoint" in run.said.read_text()
    assert read_lines(run.directory / "metrics.jsonl") == read_lines(whole.directory / "metrics.jsonl")


def test_another_start_model_is_refused_where_it_is_the_frozen_teacher(tiny_model: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    arguments = ["--model", str(model), "--runs_dir", str(tmp_path), "--name", "run", *QUICK, "--steps", "1"]
    assert main([*arguments, "--teacher", "frozen"]) == 0
    shutil.copytree(tmp_path / "run" / "checkpoint", model, dirs_exist_ok=True)
    assert main(["--resume", str(tmp_path / "run"), "--steps", "2"]) == 2


@pytest.mark.parametrize("kill_at", range(1, 8))
def test_a_kill_while_a_run_is_replaced_leaves_one_of_the_two(whole: Run, tmp_path: Path, kill_at: int) -> None:
    """Seven writes, renames and removals before the new run's first record."""
    run = Run(whole.model, tmp_path / "run")
    shutil.copytree(whole.directory, run.directory, symlinks=True)
    old = (run.directory / "checkpoint" / "model.safetensors").read_bytes()
    (run.directory / "config.json").write_text('{"rollouts_per_prompt": 2}')
    assert run.start(kill_at) == -signal.SIGKILL
    places = [run.directory, tmp_path / ".run.new" / "old.tmp", run.directory / "old.tmp"]
    files = [place / "checkpoint" / "model.safetensors" for place in places]
    assert [path.read_bytes() for path in files if path.exists()] == [old]
    assert run.start() == 0, run.said.read_text()
    assert sorted(os.listdir(tmp_path)) == ["run", "run.txt"] and not (run.directory / "old.tmp").exists()
    run.assert_same_as(whole)
