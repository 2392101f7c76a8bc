"""Feedback that the student gives itself: what it reads to judge, what it says, and who reads that."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from runs import give_rollouts, metrics, sampled, train, trainer
from tiny import byte_tokenizer

from distil_kernels.train.__main__ import main
from distil_kernels.train.command_line import parse
from distil_kernels.train.config import Config
from distil_kernels.train.feedback.kinds import self_evaluation_feedback
from distil_kernels.train.feedback.prompts import JUDGE, Example, Prompts
from distil_kernels.train.feedback.self_evaluation import SelfEvaluation
from distil_kernels.train.rollouts.prompt_group import PromptGroup, Rollout
from distil_kernels.train.run.json_lines import read_lines
from distil_kernels.train.tasks import Feedback, Problem, make_task
from distil_kernels.train.trainer import Trainer

TOKENIZER = byte_tokenizer()
YES = Feedback(1.0, "Yes, the correct answer is 2.", "")
EXAMPLES = [Example(Problem("1, 2", "2", "2", ""), YES), Example(Problem("5, 3", "5", "5", ""), YES)]
PROBLEM = Problem("3, 9", "9", "9", "")


def test_worked_examples_carry_the_critique_of_a_right_answer(tiny_model: Path, tmp_path: Path) -> None:
    task = make_task("largest", 0)
    problem = task.problem(0)
    expected = (1.0, f"Yes, the correct answer is {problem.answer}.", "")
    assert self_evaluation_feedback(task, problem, f" {problem.answer}") == expected
    assert self_evaluation_feedback(task, problem, "0") == (0.0, "", "")
    run = trainer(tiny_model, tmp_path / "run", feedback="self_evaluation")
    problem = next(run.batches)[0].problem
    read = run.models.tokenizer.decode(run.tutor.prompts.teacher(problem, Feedback(0.0, "No, I think 12.", "")))
    assert read.count("Feedback: Yes, the correct answer is ") == 1
    assert read.endswith(f"Q: {problem.question}\nFeedback: No, I think 12.\nA:")


def test_what_the_model_reads_to_judge() -> None:
    read = Prompts(TOKENIZER, EXAMPLES).critic(PROBLEM, " 3")
    assert TOKENIZER.decode(read) == (
        "Q: 1, 2\nA: 2\nFeedback: Yes, the correct answer is 2.\n\n"
        "Q: 5, 3\nA: 2\nFeedback: No, the correct answer is 5.\n\n"
        "Q: 3, 9\nA: 3\nFeedback:"
    )
    chat = TOKENIZER.decode(Prompts(TOKENIZER, EXAMPLES[:1], layout="chat").critic(PROBLEM, "3"))
    assert chat == (
        f"<user>1, 2\n<assistant>2\n<user>{JUDGE}\n<assistant>Yes, the correct answer is 2.\n"
        f"<user>3, 9\n<assistant>3\n<user>{JUDGE}\n<assistant>"
    )
    assert Prompts(TOKENIZER, EXAMPLES, max_tokens=len(read) - 1).critic(PROBLEM, "3") is None
    assert Prompts(TOKENIZER, EXAMPLES, max_tokens=len(read)).critic(PROBLEM, "3") == read


def greedy(run: Trainer, prompt: list[int], count: int) -> list[int]:
    """By the model's own forward, token by token."""
    done: list[int] = []
    while len(done) < count and not (done and done[-1] in run.tutor.prompts.stop_ids()):
        with torch.no_grad():
            done.append(int(run.student.model(torch.tensor([prompt + done])).logits[0, -1].argmax()))
    return done


def group(problem: Problem, answers: list[str]) -> PromptGroup:
    return PromptGroup(
        problem, [], [Rollout([], [], None, text, Feedback(0.5, "by the task", "x")) for text in answers]
    )


@pytest.mark.parametrize("layout", ["examples", "chat"])
def test_it_says_what_the_student_says_now(
    tiny_model: Path, tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distil_kernels.train.feedback.self_evaluation.BATCH_ROWS", 2)
    run = trainer(tiny_model, tmp_path / "run", layout=layout, teacher="frozen", reading="padded")
    answers = [["12", "13", "12"], ["14", "", "15"]]
    problems = [make_task("largest", 1).problem(index) for index in range(2)]
    groups = [group(problem, texts) for problem, texts in zip(problems, answers, strict=True)]
    critic = SelfEvaluation(run.tutor.prompts, 6)
    for _ in range(2):
        found = critic(run.student, groups, 3)
        for problem, own, feedback in zip(problems, answers, found, strict=True):
            for text, (score, critique, demonstration) in zip(own, feedback, strict=True):
                expected = run.tutor.prompts.answer(greedy(run, run.tutor.prompts.critic(problem, text), 6)).strip()
                assert (score, critique, demonstration) == (0.5, expected, "")
        with torch.no_grad():  # the live weights, not the start's
            for parameter in run.student.model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    assert critic(run.student, groups, 1) == [feedback[:1] for feedback in critic(run.student, groups, 3)]
    assert all(parameter.grad is None for parameter in run.student.model.parameters())


def test_in_a_run_the_teacher_reads_it(tiny_model: Path, tmp_path: Path) -> None:
    run = trainer(tiny_model, tmp_path / "run", feedback="self_evaluation", max_critique_tokens=5)
    run.tutor.respond = lambda student, groups, count: [
        [
            Feedback(rollout.feedback.score, f"{rollout.answer} is nonsense." if index else "", "")
            for index, rollout in enumerate(group.rollouts)
        ]
        for group in groups
    ]
    batch = next(run.batches)
    give_rollouts(run, batch, [sampled([20], [21, 22]) for _ in batch])
    for judged in batch:  # an empty critique leaves out
        assert [rollout.has_feedback for rollout in judged.rollouts] == [False, True]
    decode = run.models.tokenizer.decode
    text = decode([21, 22])
    assert decode(batch[0].rollouts[1].teacher_prompt).endswith(f"\nFeedback: {text} is nonsense.\nA:")
    short = Prompts(run.models.tokenizer, [], max_tokens=10)
    (feedback,) = SelfEvaluation(short, 5)(run.student, [group(PROBLEM, ["12345"])], 1)
    assert feedback == [Feedback(0.5, "", "")]


def test_a_resumed_run_repeats_an_uninterrupted_one(tiny_model: Path, tmp_path: Path) -> None:
    credit = ("--credit_span", "sequence", "--discount", "1")
    extra = ("--feedback", "self_evaluation", "--max_critique_tokens", "6", *credit)
    whole = train(tiny_model, tmp_path, "whole", *extra, steps=4)
    parts = train(tiny_model, tmp_path, "parts", *extra, steps=2)
    assert main(["--resume", str(parts), "--steps", "4"]) == 0
    assert metrics(parts) == metrics(whole)
    records = read_lines(whole / "rollouts.jsonl")
    assert read_lines(parts / "rollouts.jsonl") == records
    assert {record["score"] for record in records} == {0.0}  # the task's, whatever the model says
    assert any(record["feedback"] for record in records)
    assert all(bool(record["feedback"]) == record["has_feedback"] for record in records)


def test_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert "credit_span future" in Config(feedback="self_evaluation").remarks()[0]
    assert Config(feedback="self_evaluation", credit_span="sequence", discount=1.0).remarks() == []
    with pytest.raises(SystemExit):
        parse(["--feedback", "self_evaluation", "--teacher_reads", "demonstration"])
    assert "[teacher_reads] feedback self_evaluation" in capsys.readouterr().err
