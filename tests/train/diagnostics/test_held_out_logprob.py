"""The log-prob of held-out right answers before and after a step, against whole rows through the model itself."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

from distil_kernels.train.build import build
from distil_kernels.train.config import Config
from distil_kernels.train.diagnostics import held_out_logprob as diagnostic
from distil_kernels.train.diagnostics.held_out_logprob import held_out_logprob
from distil_kernels.train.rollouts.prompt_group import PromptGroup
from distil_kernels.train.trainer import Trainer


def made(model: Path, directory: Path, **changes: object) -> Trainer:
    directory.mkdir()
    settings: dict = {
        "model": str(model), "max_new_tokens": 6, "prompts_per_step": 2, "rollouts_per_prompt": 2, "eval_problems": 5,
        "learning_rate": 1e-2, "warmup_steps": 0,
    }  # fmt: skip
    config = Config(**(settings | changes))
    return Trainer(config, build(config, directory), Console(file=io.StringIO()))


@torch.no_grad()
def by_whole_rows(trainer: Trainer) -> float:
    """Each problem alone, through the model's own logits."""
    total = 0.0
    for group in trainer.evaluator.groups():
        answer = trainer.models.tokenizer(f" {group.problem.answer}").input_ids
        logits = trainer.student.model(torch.tensor([group.prompt + answer])).logits[0, len(group.prompt) - 1 : -1]
        total += logits.double().log_softmax(-1)[range(len(answer)), answer].sum().item()
    return total / len(trainer.evaluator.groups())


def test_a_step_records_what_it_changed_on_held_out_problems(tiny_model: Path, tmp_path: Path) -> None:
    trainer = made(tiny_model, tmp_path / "run", held_out_every=2)
    assert "held_out_change" not in trainer.train_step()
    before = by_whole_rows(trainer)
    record = trainer.train_step()
    after = by_whole_rows(trainer)
    assert record["held_out_logprob"] == pytest.approx(after, rel=1e-5)
    assert record["held_out_change"] == pytest.approx(after - before, rel=1e-3) and abs(after - before) > 1e-2


def test_problems_are_read_as_many_at_once_as_in_an_evaluation(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diagnostic, "BATCH_ROWS", 2)
    trainer = made(tiny_model, tmp_path / "run")
    sizes: list[int] = []
    trainer.student.body.register_forward_hook(
        lambda module, inputs, options, out: sizes.append(len(options["input_ids"])), with_kwargs=True
    )
    found = held_out_logprob(trainer.student, trainer.evaluator.groups(), trainer.tutor.prompts, trainer.config)
    assert max(sizes) == 2 and found == pytest.approx(by_whole_rows(trainer), rel=1e-5)


def test_looking_changes_no_run_and_a_rate_of_zero_changes_nothing(tiny_model: Path, tmp_path: Path) -> None:
    plain, looking = (made(tiny_model, tmp_path / str(every), held_out_every=every) for every in (0, 1))
    for trainer in (plain, looking):
        torch.manual_seed(3)
        trainer.train_step()
    assert torch.equal(plain.student.weight, looking.student.weight)
    still = made(tiny_model, tmp_path / "still", held_out_every=1, learning_rate=0.0)
    assert still.train_step()["held_out_change"] == 0.0


def test_problems_without_an_experts_answer_are_left_out(tiny_model: Path, tmp_path: Path) -> None:
    trainer = made(tiny_model, tmp_path / "run")
    groups = trainer.evaluator.groups()
    arguments = (trainer.tutor.prompts, trainer.config)
    blank = [PromptGroup(group.problem._replace(answer=""), group.prompt) for group in groups[:2]]
    all_but_two = held_out_logprob(trainer.student, groups[2:], *arguments)
    assert held_out_logprob(trainer.student, blank + groups[2:], *arguments) == pytest.approx(all_but_two)
    assert held_out_logprob(trainer.student, blank, *arguments) != held_out_logprob(trainer.student, groups, *arguments)
