"""A rollout whose judge died is left out of loss, baseline and accuracy, and counted."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runs import give_rollouts, micro_batch, sampled, set_scores, trainer

from distil_kernels.train.rollouts.prompt_group import PromptGroup
from distil_kernels.train.run.json_lines import read_lines
from distil_kernels.train.tasks import NO_VERDICT, Feedback, Problem, Task
from distil_kernels.train.tasks.sandbox import JudgeFailed
from distil_kernels.train.trainer import Trainer

COMPLETIONS = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]


def gradient(run: Trainer, batch: list[PromptGroup], kept: list[int], lost: int | None) -> list[torch.Tensor]:
    groups = [PromptGroup(group.problem, group.prompt) for group in batch]
    give_rollouts(run, groups, [sampled(*(COMPLETIONS[index] for index in kept)) for _ in groups])
    for group in groups:
        set_scores(group, *([1.0, 0.5, 0.25][index] for index in kept))
        if lost is not None:
            group.rollouts[lost].feedback, group.rollouts[lost].teacher_prompt = NO_VERDICT, None
    run.student.model.zero_grad()
    micro_batch(run, groups, 2.0 * len(groups))
    return [parameter.grad.clone() for parameter in run.student.model.parameters()]


def test_the_gradient_is_that_of_the_other_rollouts(tiny_model: Path, tmp_path: Path) -> None:
    run = trainer(tiny_model, tmp_path / "run")
    batch = next(run.batches)
    for objective, baseline in (
        ("forward_ce", "leave_one_out"),
        ("forward_ce", "moving_average"),
        ("forward_ce", "position_mean"),
        ("policy_gradient", "leave_one_out"),
    ):
        run.config = replace(run.config, objective=objective, baseline=baseline)
        with_lost, without = gradient(run, batch, [0, 1, 2], 1), gradient(run, batch, [0, 2], None)
        for ours, theirs in zip(with_lost, without, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)
        assert any(part.abs().max() > 1e-4 for part in without)


@pytest.mark.parametrize("feedback", ["correction", "siblings"])
def test_a_step_and_an_evaluation_count_it(tiny_model: Path, tmp_path: Path, feedback: str) -> None:
    run = trainer(tiny_model, tmp_path / "run", feedback=feedback, eval_samples=3)
    calls = 0

    def verify(task: Task, problem: Problem, answer: str) -> Feedback:
        nonlocal calls
        calls += 1
        if calls % 4 == 0:
            raise JudgeFailed
        return Feedback(1.0, "Right.", answer)

    run.tutor.verifier = run.evaluator.tutor.verifier = verify
    run.tutor.verifies_any_text = False
    normalizers = []
    update = run.update
    run.update = lambda batches, normalizer, timer: normalizers.append(normalizer) or update(batches, normalizer, timer)
    with pytest.warns(UserWarning, match="2 of 8 answers have no verdict"):
        record = run.train_step()
    assert (record["num_without_verdict"], record["accuracy"], record["equal_score_groups"]) == (2, 1.0, 1.0)
    assert record["num_without_feedback"] >= 2 and normalizers == [6.0] and math.isfinite(record["grad_norm"])
    lines = read_lines(tmp_path / "run" / "rollouts.jsonl")
    lost = [line for line in lines if line["score"] is None]
    assert len(lines) == 8 and len(lost) == 2
    assert {(line["feedback"], line["has_feedback"]) for line in lost} == {("", False)}

    with pytest.warns(UserWarning, match="answers have no verdict"):
        result = run.evaluator.evaluate(run.student, run.teacher)
    assert result is not None and result.num_without_verdict >= 2
    assert (result.sampled, result.greedy, result.num_problems) == (1.0, 1.0, 2) and result.pass_at[1][0] == 1.0
    assert sum(result.num_correct) < 6


def test_a_step_without_any_verdict_learns_nothing(tiny_model: Path, tmp_path: Path) -> None:
    run = trainer(tiny_model, tmp_path / "run")

    def verify(task: Task, problem: Problem, answer: str) -> Feedback:
        raise JudgeFailed

    run.tutor.verifier = verify
    run.tutor.verifies_any_text = False
    with pytest.warns(UserWarning, match="8 of 8 answers have no verdict"):
        record = run.train_step()
    assert record["grad_norm"] == record["loss"] == 0.0 and record["num_without_verdict"] == 8
    assert math.isnan(record["accuracy"])
