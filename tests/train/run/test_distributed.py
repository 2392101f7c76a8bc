"""Two processes on one run: one directory, streams of their own, stopping together, resuming to the last bit."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator, DistributedType
from runs import assert_equal, assert_same, metrics, refused, run_interrupted, run_main, start, trainer
from two_processes import together

from distil_kernels.train.__main__ import main
from distil_kernels.train.config import Config
from distil_kernels.train.run import distributed
from distil_kernels.train.run.checkpoint import load_state
from distil_kernels.train.run.distributed import FailedTogether, Processes
from distil_kernels.train.run.json_lines import read_lines
from distil_kernels.train.trainer import Trainer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def whole(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps that nothing happened to."""
    runs = tmp_path_factory.mktemp("whole")
    assert together(run_main, start(tiny_model, runs, "run", 4)) == [0, 0]
    return runs / "run"


def test_they_write_one_directory(whole: Path) -> None:
    records = metrics(whole)
    assert [record["step"] for record in records if record["kind"] == "step"] == [1, 2, 3, 4]
    evaluations = [record for record in records if record["kind"] == "evaluation"]
    assert [(record["step"], record["num_problems"]) for record in evaluations] == [(0, 3), (2, 3), (4, 3)]
    rollouts = [record for record in read_lines(whole / "rollouts.jsonl") if record["kind"] == "training"]
    assert len(rollouts) == 4 * 3 * 2
    for record in records:
        if record["kind"] == "step":
            own = [rollout for rollout in rollouts if rollout["step"] == record["step"]]
            assert len({rollout["question"] for rollout in own}) == 3
            assert record["length"] == sum(len(rollout["tokens"]) for rollout in own) / 6
    assert [path.name for path in whole.parent.iterdir()] == ["run"]
    # LambdaLR counts optimiser steps, not processes' steps.
    assert load_state(whole / "checkpoint")["scheduler"]["last_epoch"] == 4


@pytest.mark.parametrize(("interrupted", "number"), [(0, signal.SIGINT), (1, signal.SIGTERM)])
def test_one_that_is_interrupted_stops_both_and_the_run_resumes(
    whole: Path, tiny_model: Path, tmp_path: Path, interrupted: int, number: signal.Signals
) -> None:
    assert together(run_interrupted, start(tiny_model, tmp_path, "run", 4), interrupted, number) == [130, 130]
    directory = tmp_path / "run"
    assert (directory / "checkpoint").resolve().name == "checkpoint-000002"
    assert together(run_main, ["--resume", str(directory)]) == [0, 0]
    assert_same(directory, whole)


def test_another_number_of_processes_goes_on_and_says_what_is_new(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From two to one and back: each change is recorded, and what follows it repeats itself."""
    runs = [Path(shutil.copytree(whole, tmp_path / name, symlinks=True)) for name in ("once", "again")]
    before = metrics(whole)
    for directory in runs:
        assert main(["--resume", str(directory), "--steps", "5"]) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert "2 processes took the first 4 steps and 1 go on" in said and "not to the last bit" in said
        records = metrics(directory)
        assert records[: len(before)] == before
        assert records[len(before)]["changes"] == ["the number of processes has changed from 2 to 1"]
        assert load_state(directory / "checkpoint")["scheduler"]["last_epoch"] == 5
    assert_same(*runs)
    assert together(run_main, ["--resume", str(runs[0]), "--steps", "6"]) == [0, 0]
    assert metrics(runs[0])[-1]["step"] == 6 and len(load_state(runs[0] / "checkpoint")["generators"]) == 2


def run_failing(rank: int, arguments: list[str], failing: int) -> int:
    """A judge raises in one of the processes, in its third step."""
    take_step = Trainer.train_step

    def step(self: Trainer) -> dict[str, object]:
        if self.step == 2 and rank == failing:
            self.tutor.verifier = fails
        return take_step(self)

    def fails(*_: object) -> None:
        raise RuntimeError("the judge is not there")

    Trainer.train_step = step  # type: ignore[method-assign]
    try:
        return main(arguments)
    except FailedTogether as error:
        assert str(error) == f"RuntimeError: the judge is not there (in process {failing})"
        assert (error.__cause__ is not None) == (rank == failing)
        return 17


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_in_one_ends_both_with_a_checkpoint(
    whole: Path, tiny_model: Path, tmp_path: Path, failing: int
) -> None:
    assert together(run_failing, start(tiny_model, tmp_path, "run", 4), failing) == [17, 17]
    directory = tmp_path / "run"
    assert (directory / "checkpoint").resolve().name == "checkpoint-000002"
    assert together(run_main, ["--resume", str(directory)]) == [0, 0]
    assert_same(directory, whole)


def test_one_process_evaluates_a_run_of_two(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(whole)]) == 0
    assert '"num_problems": 3' in capsys.readouterr().out


def gradients(rank: int) -> list[torch.Tensor | None]:
    generator = torch.Generator().manual_seed(rank)
    grads: list[torch.Tensor | None] = [torch.randn(n, 3, generator=generator) for n in (1, 2, 40, 3, 2, 1)]
    grads[1 + rank] = None
    return grads


def sum_small_buckets(rank: int, directory: Path) -> None:
    distributed.BUCKET = 10  # the third parameter alone is larger
    accelerator = Accelerator(cpu=True)
    mine = gradients(rank)
    parameters = [torch.nn.Parameter(torch.zeros(n, 3)) for n in (1, 2, 40, 3, 2, 1)]
    for parameter, grad in zip(parameters, mine, strict=True):
        parameter.grad = grad
    Processes.of(accelerator, Config()).sum_gradients(parameters)
    torch.save([parameter.grad for parameter in parameters], directory / f"{rank}.pt")
    accelerator.end_training()


def test_gradients_are_summed_bucket_by_bucket(tmp_path: Path) -> None:
    """A parameter that one process has no gradient for is the other's."""
    assert together(sum_small_buckets, tmp_path) == [0, 0]
    expected = [sum(grad for grad in pair if grad is not None) for pair in zip(gradients(0), gradients(1), strict=True)]
    for rank in range(2):
        assert_equal(torch.load(tmp_path / f"{rank}.pt"), expected)


def same_problem(rank: int, model: Path, directory: Path, seed: int) -> None:
    run = trainer(model, directory / f"{seed} {rank}", seed=seed, prompts_per_step=2, rollouts_per_prompt=8)
    (first, _) = next(run.batches)
    run.roll_out([first])
    torch.save([rollout.tokens for rollout in first.rollouts], directory / f"{seed} {rank}.pt")


def test_each_draws_its_own_rollouts_and_the_seed_says_which(tiny_model: Path, tmp_path: Path) -> None:
    drawn = []
    for name in ("once", "again"):
        directory = tmp_path / name
        directory.mkdir()
        assert together(same_problem, tiny_model, directory, 7) == [0, 0]
        drawn.append([torch.load(directory / f"7 {rank}.pt") for rank in range(2)])
    assert drawn[0] == drawn[1]
    assert drawn[0][0] != drawn[0][1]
    (tmp_path / "alone").mkdir()
    same_problem(0, tiny_model, tmp_path / "alone", 7)
    same_problem(1, tiny_model, tmp_path / "alone", 8)
    assert torch.load(tmp_path / "alone" / "7 0.pt") == drawn[0][0]
    assert torch.load(tmp_path / "alone" / "8 1.pt") not in drawn[0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--prompts_per_step", "1"], "[prompts_per_step] expected one for each of 2 processes, got 1"),
        (["--baseline", "position_mean"], "[baseline] position_mean compares the whole batch"),
    ],
)
def test_a_batch_that_cannot_be_shared_out_is_refused(
    tiny_model: Path, tmp_path: Path, options: list[str], said: str
) -> None:
    main_status, other = together(refused, [*start(tiny_model, tmp_path, "run", 1), *options], tmp_path)
    assert main_status == 2 and other != 0  # the other may find the main one gone before it has read its options
    assert said in (tmp_path / "0.txt").read_text()


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_sharded_models_are_refused(kind: str) -> None:
    told = SimpleNamespace(distributed_type=DistributedType(kind), num_processes=2)
    with pytest.raises(ValueError, match=f"expected the whole model in every process, got {kind}"):
        Processes.of(told, Config())  # type: ignore[arg-type]


def test_processes_that_accelerate_does_not_know_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    told = SimpleNamespace(distributed_type=DistributedType.NO, num_processes=1)
    with pytest.raises(ValueError, match="expected the 2 processes that were started, got 1"):
        Processes.of(told, Config())  # type: ignore[arg-type]
