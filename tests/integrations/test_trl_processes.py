"""TRL's trainers after the switch in two processes: they learn what one process learns from the whole batch."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")

import torch
import trl_runs
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from two_processes import PROCESSES, together

from distil_kernels.integrations.trl import DistILConfig, DistILTrainer, apply_distil_kernels_to_trl

PROCESSES.set_forkserver_preload(["distil_kernels.integrations.trl.distil_trainer", "trl.experimental.gkd.gkd_trainer"])
pytestmark = pytest.mark.slow

GREEDY = {"generation_kwargs": {"do_sample": False}, "shuffle_dataset": False}  # the same rollouts, however shared out
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "distillation": (trl_runs.distillation, GREEDY | {"beta": 0.5}),
    "sdpo": (trl_runs.sdpo, GREEDY | {"distillation_mode": "full_logits", "distillation_alpha": 0.5}),
    "distil": (trl_runs.sdpo, GREEDY | {"trainer": DistILTrainer, "config": DistILConfig, "baseline": None}),
    "gkd": (trl_runs.gkd, {"lmbda": 0.0, "beta": 0.5}),
}


def shard(model: torch.nn.Module) -> torch.nn.Module:
    """Wraps a model as accelerate does with FSDP2, which it offers on GPUs alone."""
    for layer in model.model.layers:
        fully_shard(layer, reshard_after_forward=True)
    return fully_shard(model, reshard_after_forward=True)


def train(rank: int, folder: Path, wrapper: str, batch: int, names: tuple[str, ...], switched: bool = True) -> None:
    """Trains cases and saves their parameters."""
    options: dict[str, Any] = {"per_device_train_batch_size": batch}
    if wrapper == "FSDP2":
        options["prepare"] = shard
        Accelerator.prepare_model = lambda self, model, evaluation_mode=False, **_: (
            shard(model) if evaluation_mode else model
        )
    for name in names:
        make, options_of_case = CASES[name]
        with apply_distil_kernels_to_trl() if switched else nullcontext():
            run = trl_runs.run(make, folder / f"{name}{rank}", **options, **options_of_case)
        assert all(isinstance(value, DTensor) for value in run.parameters.values()) == (wrapper == "FSDP2")
        whole = {
            key.removeprefix("module."): value.full_tensor() if isinstance(value, DTensor) else value
            for key, value in run.parameters.items()
        }
        if rank == 0:
            torch.save(whole, folder / f"{name}.pt")
        AcceleratorState._reset_state()


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    """Parameters after a run in one process; of GKD, whose loss TRL scales by the processes, after TRL's own in two."""
    folder = tmp_path_factory.mktemp("expected")
    trl_runs.saved_model(folder / "model")
    train(0, folder, "none", 4, ("distillation", "sdpo", "distil"))
    assert together(train, folder, "DDP", 2, ("gkd",), False) == [0, 0]
    return {name: torch.load(folder / f"{name}.pt") for name in CASES}


@pytest.mark.parametrize("wrapper", ["DDP", "FSDP2"])
def test_two_processes_learn_what_one_does(
    wrapper: str, expected: dict[str, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    trl_runs.saved_model(tmp_path / "model")
    assert together(train, tmp_path, wrapper, 2, tuple(CASES)) == [0, 0]
    for name, parameters in expected.items():
        learnt = torch.load(tmp_path / f"{name}.pt")
        for key, value in parameters.items():
            torch.testing.assert_close(learnt[key], value, rtol=1e-5, atol=1e-6, msg=f"{name} {key}")
