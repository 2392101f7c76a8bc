"""examples/distil.py is the trainer's method: the same loss and gradient on the same rollouts, and it runs."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from runs import trainer
from transformers import AutoModelForCausalLM

from distil_kernels.hf import split
from distil_kernels.train.metrics import PhaseTimer
from distil_kernels.train.objective import UpdateState
from distil_kernels.train.rollouts.packed_batch import PackedBatch

PATH = Path(__file__).parents[2] / "examples" / "distil.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("distil_example", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_loss_and_gradient_are_the_trainers(example: ModuleType, tiny_model: Path, tmp_path: Path) -> None:
    run = trainer(tiny_model, tmp_path / "run", cost="kl", discount=0.9, baseline="leave_one_out")
    groups = next(run.batches)
    run.roll_out(groups)
    num_rollouts = sum(len(group.rollouts) for group in groups)
    batch = PackedBatch.of(groups, run.student.weight.device)
    expected, _ = run.micro_batch(batch, float(num_rollouts), PhaseTimer(), UpdateState())

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    teacher = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval().requires_grad_(False)
    rollouts = [
        example.Rollout(group.prompt, rollout.teacher_prompt, rollout.tokens)
        for group in groups
        for rollout in group.rollouts
    ]
    loss = example.distil_loss(split(model), split(teacher), rollouts, len(groups[0].rollouts)).loss
    loss.backward()

    torch.testing.assert_close(loss.detach(), expected, rtol=1e-5, atol=0.0)
    gradients = dict(run.student.model.named_parameters())
    for name, parameter in model.named_parameters():
        theirs = gradients[name].grad
        assert theirs is not None and theirs.norm() > 0
        assert (parameter.grad - theirs).norm() <= 1e-4 * theirs.norm(), name


def test_it_runs(
    example: ModuleType, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(example, "STEPS", 2)
    example.main(str(tiny_model))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[:2]] == [["step", "1"], ["step", "2"]]
    assert "48 held-out problems" in lines[2]
