"""Adapters by peft: only they move, the head stays out of the gradient, and a resumed run repeats an unharmed one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from runs import QUICK, metrics, train, trainer
from transformers import AutoModelForCausalLM

from distil_kernels.train.__main__ import main
from distil_kernels.train.models import loading, smollm2

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


@pytest.fixture(scope="module")
def adapters(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters that two steps have trained, as a run leaves them."""
    return train(tiny_model, tmp_path_factory.mktemp("adapters"), "run", *LORA, steps=2) / "checkpoint"


TOKENS = torch.tensor([[40, 41, 42]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def test_adapters_are_merged_and_never_replaced_by_their_base(adapters: Path, tiny_model: Path) -> None:
    expected = logits(AutoPeftModelForCausalLM.from_pretrained(adapters))
    merged, tokenizer = loading.load(str(adapters))
    assert not hasattr(merged, "peft_config") and all(weight.requires_grad for weight in merged.parameters())
    torch.testing.assert_close(logits(merged), expected)
    assert not torch.allclose(expected, logits(AutoModelForCausalLM.from_pretrained(tiny_model)), atol=1e-4)
    assert tokenizer("Q: 12").input_ids == loading.load(str(tiny_model))[1]("Q: 12").input_ids


@pytest.mark.parametrize("extra", [(), ("--lora_rank", "2"), ("--lora_continue",)])
def test_a_run_starts_from_adapters(adapters: Path, tmp_path: Path, extra: tuple[str, ...]) -> None:
    expected = logits(AutoPeftModelForCausalLM.from_pretrained(adapters))
    checkpoint = train(adapters, tmp_path, "run", *extra, steps=0) / "checkpoint"
    torch.testing.assert_close(logits(loading.load(str(checkpoint))[0]), expected)
    assert (checkpoint / "adapter_config.json").exists() == bool(extra)


@pytest.mark.parametrize("teacher", ["frozen", "ema"])
def test_adapters_are_trained_on_and_a_resumed_run_repeats_an_uninterrupted_one(
    adapters: Path, tmp_path: Path, teacher: str
) -> None:
    extra = ("--lora_continue", "--teacher", teacher)
    whole = train(adapters, tmp_path, "whole", *extra, steps=4)
    parts = train(adapters, tmp_path, "parts", *extra, steps=2)
    assert main(["--resume", str(parts), "--steps", "4"]) == 0
    assert metrics(parts) == metrics(whole)
    ours, theirs, start = (
        (path / "adapter_model.safetensors").read_bytes()
        for path in (parts / "checkpoint", whole / "checkpoint", adapters)
    )
    assert ours == theirs != start
    assert json.loads((parts / "checkpoint" / "adapter_config.json").read_text())["r"] == 3


def test_the_frozen_teacher_of_adapters_that_are_trained_on_has_them(adapters: Path, tmp_path: Path) -> None:
    """Student and teacher are one model at the start, and the teacher stays what it was."""
    run = trainer(adapters, tmp_path / "run", lora_continue=True, learning_rate=1e-2)
    start = run.student.logits(run.student.hidden(TOKENS)).detach()
    run.train_step()
    assert not torch.allclose(run.student.logits(run.student.hidden(TOKENS)), start, atol=1e-4)
    teacher = run.teacher.lm
    torch.testing.assert_close(teacher.logits(teacher.hidden(TOKENS)), start)


def test_eval_of_a_checkpoint_of_adapters_repeats_the_runs(adapters: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--max_new_tokens", "4", "--num_examples", "1", "--eval_problems", "4"]
    assert main(["eval", str(adapters.parent)]) == 0
    of_run = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert main(["eval", str(adapters), *sizes]) == 0
    of_checkpoint = json.loads(capsys.readouterr().out.splitlines()[-1])
    for name in ("greedy", "sampled", "length", "num_correct"):
        assert of_checkpoint[name] == of_run[name]


def edited(adapters: Path, directory: Path, **changes: object) -> Path:
    """A copy of adapters with another adapter_config.json."""
    shutil.copytree(adapters, directory)
    file = directory / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return directory


@pytest.mark.parametrize(
    ("changes", "extra", "said"),
    [
        ({"base_model_name_or_path": "/nowhere"}, [], "cannot load '/nowhere'"),
        ({"base_model_name_or_path": None}, [], "names no base_model_name_or_path"),
        ({"r": 5}, [], "do not fit"),
        ({"modules_to_save": ["lm_head"]}, ["--lora_continue"], "plain LoRA adapters, got LORA, modules_to_save"),
        ({}, ["--lora_continue", "--lora_rank", "2"], "[lora_rank] lora_continue takes 0, got 2"),
    ],
)
def test_adapters_that_cannot_be_used_are_one_line(
    adapters: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, object],
    extra: list[str],
    said: str,
) -> None:
    model = edited(adapters, tmp_path / "model", **changes)
    arguments = ["--model", str(model), "--runs_dir", str(tmp_path), "--name", "run", *QUICK, *extra]
    try:
        status = main(arguments)
    except SystemExit as exit_:  # an option that does not go with another
        status = exit_.code
    assert status == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert said in line


def test_what_are_no_adapters_is_not_trained_on(
    tiny_model: Path, adapters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--runs_dir", str(tmp_path), "--name", "run", "--lora_continue"]
    assert main(["--model", str(tiny_model), *arguments]) == 2
    assert "expected a directory of adapters" in capsys.readouterr().err
    shutil.copytree(adapters, tmp_path / "both")
    shutil.copy(tiny_model / "config.json", tmp_path / "both")
    assert main(["--model", str(tmp_path / "both"), *arguments]) == 2
    assert "both a config.json and an adapter_config.json" in capsys.readouterr().err


def test_the_default_model_is_found_again_from_another_cache(tmp_path: Path) -> None:
    elsewhere = tmp_path / smollm2.PLACE
    assert smollm2.found_again(str(elsewhere)) == smollm2.NAME
    assert smollm2.found_again("HuggingFaceTB/SmolLM2-135M-Instruct") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    elsewhere.mkdir(parents=True)
    assert smollm2.found_again(str(elsewhere)) == str(elsewhere)
