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

PROCESSES.set_forkserver_preload(["distil_kernels.train.trainer", "test_trl_processes"])
pytestmark = pytest.mark.slow

GREEDY = {"generation_kwargs": {"do_sample": False}, "shuffle_dataset": False}  # the same rollouts, however shared out
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "distillation": (trl_runs.distillation, GREEDY | {"beta": 0.5}),
    "sdpo": (trl_runs.sdpo, GREEDY | {"distillation_mode": "full_logits", "distillation_alpha": 0.5}),
    "distil": (trl_runs.sdpo, GREEDY | {"trainer": DistILTrainer, "config": DistILConfig, "baseline": None}),
    "gkd": (trl_runs.gkd, {"lmbda": 0.0, "beta": 0.5}),
}


def sharded(self: Accelerator, model: torch.nn.Module, evaluation_mode: bool = False, **_: Any) -> torch.nn.Module:
    """Wraps a student as accelerate does with FSDP2, which it offers on GPUs alone."""
    if evaluation_mode:
        return model
    for layer in model.model.layers:
        fully_shard(layer, reshard_after_forward=True)
    return fully_shard(model, reshard_after_forward=True)


def train(rank: int, folder: Path, wrapper: str, batch: int, names: tuple[str, ...], switched: bool = True) -> None:
    """Trains cases and saves their parameters."""
    if wrapper == "FSDP2":
        Accelerator.prepare_model = sharded
    for name in names:
        make, options = CASES[name]
        with apply_distil_kernels_to_trl() if switched else nullcontext():
            run = trl_runs.run(make, folder / f"{name}{rank}", per_device_train_batch_size=batch, **options)
        assert all(isinstance(value, DTensor) for value in run.parameters.values()) == (wrapper == "FSDP2")
        whole = {
            key.removeprefix("module."): value.full_tensor() if isinstance(value, DTensor) else value
            for key, value in run.parameters.items()
        }
        if rank == 0:
            torch.save(whole, folder / f"{name}.pt")
        AcceleratorState._reset_state()


@pytest.mark.parametrize("wrapper", ["DDP", "FSDP2"])
def test_two_processes_learn_what_one_does(wrapper: str, tmp_path: Path) -> None:
    for place in ("one", "two", "trl"):
        trl_runs.saved_model(tmp_path / place / "model")
    train(0, tmp_path / "one", "none", 4, tuple(CASES))
    assert together(train, tmp_path / "two", wrapper, 2, tuple(CASES)) == [0, 0]
    # TRL's GKD in two processes is not what it is in one; ours is what TRL's is.
    assert together(train, tmp_path / "trl", wrapper, 2, ("gkd",), False) == [0, 0]
    for name in CASES:
        expected = torch.load(tmp_path / ("trl" if name == "gkd" else "one") / f"{name}.pt")
        for key, value in torch.load(tmp_path / "two" / f"{name}.pt").items():
            torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-6, msg=f"{name} {key}")
