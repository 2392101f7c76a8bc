"""Distillation on a data set's own answers (`rollouts none`), and a teacher that reads what the student reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import QUICK, metrics, micro_batch, pack, train, trainer
from tiny import save_tiny_model

from distil_kernels.train.__main__ import main
from distil_kernels.train.config import Config

KD = {"rollouts": "none", "rollouts_per_prompt": 1, "feedback": "none", "credit_span": "none"}


@pytest.fixture(scope="module")
def expert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("expert"), initializer_range=0.15, hidden_size=48)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Answers of one to twelve letters; some records have two right ones, of which the first is shown."""
    path = tmp_path_factory.mktemp("data") / "records.jsonl"
    lines = [{"question": f"{n}?", "answer": "abcdefghijkl"[: 1 + n % 12] if n % 5 else ["xy", "z"]} for n in range(60)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_the_loss_is_that_of_the_records_own_answers(
    tiny_model: Path, expert: Path, records: Path, tmp_path: Path
) -> None:
    """Against both models' own logits: the mean over answers of the KL of their tokens, and its gradient."""
    run = trainer(
        tiny_model, tmp_path / "run", task=f"qa:{records}", teacher="local", teacher_model=str(expert), cost="kl",
        max_new_tokens=8, **KD,
    )  # fmt: skip
    groups = next(run.batches)
    run.roll_out(groups)
    tokenizer = run.models.tokenizer
    for group in groups:
        (rollout,) = group.rollouts
        whole = f" {group.problem.answer}\n"
        assert tokenizer.decode(rollout.tokens) == whole[:8] and all(rollout.by_model)
        assert rollout.teacher_prompt == group.prompt and rollout.logprobs is None
        assert (rollout.feedback.score == 1.0) == (len(whole) <= 8)
        assert rollout.feedback.text == ""
    assert {len(group.rollouts[0].tokens) for group in groups} != {8}

    loss, _ = micro_batch(run, groups, float(len(groups)))
    found = {name: p.grad.clone() for name, p in run.student.model.named_parameters()}
    run.student.model.zero_grad()
    expected = torch.zeros(())
    for group in groups:
        tokens = torch.tensor([group.prompt + group.rollouts[0].tokens])
        rows = slice(len(group.prompt) - 1, -1)
        ours, theirs = (
            model(tokens).logits[0, rows].log_softmax(-1) for model in (run.student.model, run.teacher.lm.model)
        )
        expected = expected + (theirs.exp() * (theirs - ours)).sum() / len(groups)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    for name, parameter in run.student.model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-5, rtol=1e-3)


def test_a_run_learns_the_teachers_distribution(tiny_model: Path, expert: Path, records: Path, tmp_path: Path) -> None:
    options = ["--preset", "kd", "--teacher", "local", "--teacher_model", str(expert), "--task", f"qa:{records}"]
    directory = train_kd(tiny_model, tmp_path, *options, "--learning_rate", "1e-2", steps=8)
    found = metrics(directory)
    steps = [record for record in found if record["kind"] == "step"]
    assert [record["accuracy"] for record in steps] == [1.0] * 8
    assert steps[-1]["kl"] < 0.7 * steps[0]["kl"] and all(record["credit_to_cost"] == 0 for record in steps)
    evaluations = [record for record in found if record["kind"] == "evaluation"]
    assert [record["step"] for record in evaluations] == [0, 8]
    # What is shown of held-out problems is the student's.
    shown = [json.loads(line) for line in (directory / "rollouts.jsonl").read_text().splitlines()]
    assert {record["score"] for record in shown if record["kind"] == "training"} == {1.0}
    assert 0.0 in {record["score"] for record in shown if record["kind"] == "held_out"}


def train_kd(model: Path, runs: Path, *options: str, steps: int) -> Path:
    """A run whose answers fit; the options of `QUICK` that a preset would set are its own."""
    given = [*QUICK]
    given[given.index("--rollouts_per_prompt") + 1] = "1"
    arguments = ["--model", str(model), "--runs_dir", str(runs), "--name", "run", "--steps", str(steps), *given]
    assert main([*arguments, "--max_new_tokens", "16", "--eval_every", "0", "--cost", "kl", *options]) == 0
    return runs / "run"


def test_a_chat_ends_with_its_end_token(tiny_model: Path, records: Path, tmp_path: Path) -> None:
    run = trainer(tiny_model, tmp_path / "run", task=f"qa:{records}", layout="chat", max_new_tokens=16,
                  **{**KD, "feedback": "correction"})  # fmt: skip
    groups = next(run.batches)
    run.roll_out(groups)
    for group in groups:
        (rollout,) = group.rollouts
        assert rollout.tokens[-1] == 0 and run.tutor.prompts.answer(rollout.tokens) == group.problem.answer
        assert rollout.teacher_prompt not in (None, group.prompt)  # it reads the correction
    assert pack(groups).learns.num_tokens == sum(len(group.rollouts[0].tokens) for group in groups)


def test_a_teacher_may_read_what_a_student_that_samples_reads(tiny_model: Path, expert: Path, tmp_path: Path) -> None:
    """Distillation on the student's own answers, without feedback."""
    options = ("--teacher", "local", "--teacher_model", str(expert), "--feedback", "none", "--eval_every", "0")
    directory = train(tiny_model, tmp_path, "run", *options, steps=1)
    (step,) = [record for record in metrics(directory) if record["kind"] == "step"]
    assert step["num_without_feedback"] == 0 and step["kl"] > 0 and step["credit_to_cost"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({**KD, "credit_span": "future"}, r"\[credit_span\] rollouts none takes none, got future"),
        ({**KD, "rollouts_per_prompt": 4}, r"\[rollouts_per_prompt\] rollouts none takes 1, got 4"),
        ({**KD, "updates_per_batch": 2}, r"\[updates_per_batch\] rollouts none takes 1, got 2"),
        ({**KD, "feedback": "trace"}, r"\[feedback\] rollouts none takes none or correction, got trace"),
        ({**KD, "tools": "python"}, r"\[tools\] rollouts none takes none, got python"),
        ({**KD, "teacher": "frozen", "teacher_model": ""}, r"\[teacher\] feedback none, .* takes local .*, got frozen"),
        ({"rollouts": "some"}, r"\[rollouts\] expected one of student, none, got 'some'"),
        ({"feedback": "none", "teacher_reads": "demonstration"}, r"\[teacher_reads\] feedback none takes text or both"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**{"teacher": "local", "teacher_model": "other", **options}).check()
    Config(teacher="local", teacher_model="other", **KD).check()  # type: ignore[arg-type]
    Config(feedback="none", objective="policy_gradient", teacher="live").check()


def test_records_without_answers_are_passed_over(tiny_model: Path, expert: Path, tmp_path: Path) -> None:
    run = trainer(tiny_model, tmp_path / "run", teacher="local", teacher_model=str(expert), **KD)
    poses = run.tutor.task.problem
    unanswered: list[int] = []

    def problem(index: int) -> Any:
        posed = poses(index)
        return posed._replace(answer="") if index in unanswered else posed

    run.tutor.task.problem = problem
    unanswered[:] = range(0, 10**6, 2)
    assert all(group.problem.answer for group in next(run.batches))
    assert run.batches.num_skipped > 0
    unanswered[:] = range(3000)
    with pytest.raises(ValueError, match=r"\[rollouts\] a thousand problems in a row have no answer"):
        next(run.batches)
