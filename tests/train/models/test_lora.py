"""Adapters by peft: only they move, the head stays out of the gradient, and a resumed run repeats an unharmed one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from runs import QUICK, metrics, train, trainer
from transformers import AutoModelForCausalLM

from distil_kernels.train.__main__ import main

LORA = ("--lora_rank", "3", "--lora_targets", "all-linear")


def test_only_adapters_move_and_the_head_is_frozen(tiny_model: Path, tmp_path: Path) -> None:
    run = trainer(tiny_model, tmp_path / "run", lora_rank=3, plan="frozen_head", learning_rate=1e-2)
    before = {name: value.clone() for name, value in run.student.model.state_dict().items()}
    run.train_step()
    run.train_step()  # the first moves B alone: A's gradient is 0 while B is
    after = run.student.model.state_dict()
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved == {name for name in after if "lora_" in name} and moved
    assert run.teacher.lm is run.student and run.teacher.head[0] is None  # the start is the adapters' being off
    whole = trainer(tiny_model, tmp_path / "whole", plan="frozen_head")
    with pytest.raises(ValueError, match="needs a gradient"):
        whole.train_step()


@pytest.mark.parametrize("teacher", ["live", "frozen", "ema"])
def test_a_resumed_run_repeats_an_uninterrupted_one(tiny_model: Path, tmp_path: Path, teacher: str) -> None:
    extra = (*LORA, "--teacher", teacher)
    whole = train(tiny_model, tmp_path, "whole", *extra, steps=4)
    parts = train(tiny_model, tmp_path, "parts", *extra, steps=2)
    assert main(["--resume", str(parts), "--steps", "4"]) == 0
    assert metrics(parts) == metrics(whole)
    ours, theirs = ((run / "checkpoint" / "adapter_model.safetensors").read_bytes() for run in (parts, whole))
    assert ours == theirs and not (parts / "checkpoint" / "model.safetensors").exists()


def test_peft_loads_what_was_trained(tiny_model: Path, tmp_path: Path) -> None:
    run = trainer(tiny_model, tmp_path / "run", lora_rank=3, learning_rate=1e-2)
    run.train_step()
    run.save()
    tokens = torch.tensor([[40, 41, 42]])
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint")
    trained = run.student.logits(run.student.hidden(tokens))
    torch.testing.assert_close(loaded(tokens).logits, trained)
    assert not torch.allclose(AutoModelForCausalLM.from_pretrained(tiny_model)(tokens).logits, trained, atol=1e-4)


def test_adapters_are_not_put_on_another_model(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    directory = train(model, tmp_path, "run", *LORA, "--teacher", "live", steps=1)
    changed = AutoModelForCausalLM.from_pretrained(model)
    changed.model.norm.weight.data.add_(0.5)
    changed.save_pretrained(model)
    assert main(["--resume", str(directory), "--steps", "2"]) == 2
    assert "other weights than when the run started" in capsys.readouterr().err


def test_targets_that_are_not_there_are_said(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = ["--model", str(tiny_model), "--runs_dir", str(tmp_path), "--name", "run", *QUICK]
    assert main([*place, "--lora_rank", "2", "--lora_targets", "q_proj_,v"]) == 2
    assert "[lora_targets] 'q_proj_,v'" in capsys.readouterr().err
