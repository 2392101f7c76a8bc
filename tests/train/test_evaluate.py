"""Evaluation: means and errors over problems, the same each time, nothing taken from training's generator."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

from distil_kernels.hf import split
from distil_kernels.train.evaluate import Evaluator, mean_and_error
from distil_kernels.train.feedback.kinds import FEEDBACK
from distil_kernels.train.feedback.prompts import Prompts
from distil_kernels.train.feedback.tutor import Tutor
from distil_kernels.train.models import loading
from distil_kernels.train.models.reading import Reader, reader
from distil_kernels.train.rollouts.prompt_group import Rollout
from distil_kernels.train.rollouts.sampling import Sampling
from distil_kernels.train.tasks import Problem, Task, make_task, problems
from distil_kernels.train.teachers.in_process import InProcessTeacher


def test_mean_and_standard_error() -> None:
    mean, error = mean_and_error([1.0, 0.0, 0.5, 0.5])
    assert mean == 0.5
    assert error == pytest.approx(math.sqrt((0.25 + 0.25) / 3 / 4))
    assert mean_and_error([1.0])[0] == 1.0 and math.isnan(mean_and_error([1.0])[1])


class Vowels:
    """Scores a known thing of the answer, so that the evaluation can be counted by hand."""

    def __init__(self, answers: list[str]) -> None:
        self.answers = answers

    def problem(self, index: int) -> Problem:
        return make_task("largest", 9).problem(index)

    def score(self, answer: str, entry: object) -> float:
        self.answers.append(answer)
        return float(len(answer) % 2)


def parts(tiny_model: Path) -> tuple[Reader, Prompts]:
    model, tokenizer = loading.load(str(tiny_model))
    return reader(split(model)), Prompts(tokenizer, [], end_ids=[0])


def corrector(task: Task, prompts: Prompts) -> Tutor:
    return Tutor.of(FEEDBACK["correction"], task, prompts, max_critique_tokens=1)


def test_every_problem_and_sample_counts_once(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distil_kernels.train.evaluate.BATCH_ROWS", 5)  # two problems a batch, the last batch not full
    lm, prompts = parts(tiny_model)
    answers: list[str] = []
    task = Vowels(answers)
    held_out = [problem for _, problem in islice(problems(task, held_out=True), 7)]
    evaluator = Evaluator(corrector(task, prompts), held_out, Sampling(5, prompts.stop_ids()), 2, seed=1)
    answers.clear()
    result = evaluator.evaluate(lm, InProcessTeacher(lm, "live", 0.0))
    assert result is not None and len(answers) == 7 * 3 + 7  # greedy, sampled, sampled; the teacher's
    odd = [float(len(answer) % 2) for answer in answers]
    by_problem = [(odd[3 * i + 1] + odd[3 * i + 2]) / 2 for i in range(7)]
    assert (result.sampled, result.sampled_se) == pytest.approx(mean_and_error(by_problem))
    assert (result.greedy, result.greedy_se) == pytest.approx(mean_and_error(odd[:21:3]))
    assert (result.teacher, result.teacher_se) == pytest.approx(mean_and_error(odd[21:]))
    assert result.num_correct == [2 * share for share in by_problem]
    assert result.num_problems == 7 and 1 <= result.length <= 5


def test_repeats_itself_and_leaves_the_generator_alone(tiny_model: Path) -> None:
    lm, prompts = parts(tiny_model)
    task = Vowels([])
    held_out = [problem for _, problem in islice(problems(task, held_out=True), 4)]
    evaluator = Evaluator(corrector(task, prompts), held_out, Sampling(5, prompts.stop_ids()), 3, seed=1)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = evaluator.evaluate(lm, InProcessTeacher(lm, "frozen", 0.0))
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert evaluator.evaluate(lm, InProcessTeacher(lm, "frozen", 0.0)) == first
    assert evaluator.evaluate(lm, InProcessTeacher(lm, "frozen", 0.0), stop=lambda: True) is None


def test_the_teacher_answers_at_its_own_temperature(tiny_model: Path) -> None:
    lm, prompts = parts(tiny_model)

    class Seen(InProcessTeacher):
        def generate(self, prompts: object, index: object, sampling: Sampling, ends: object) -> list[Rollout]:
            seen.append(sampling)
            return super().generate(prompts, index, sampling, ends)

    seen: list[Sampling] = []
    task, sampling = Vowels([]), Sampling(5, prompts.stop_ids(), temperature=0.9)
    held_out = [problem for _, problem in islice(problems(task, held_out=True), 4)]
    evaluator = Evaluator(corrector(task, prompts), held_out, sampling, 1, seed=1, teacher_temperature=0.25)
    assert evaluator.evaluate(lm, Seen(lm, "live", 0.0)) is not None
    assert seen == [replace(sampling, temperature=0.25)]


def test_problems_that_do_not_fit_are_an_error_when_none_does(tiny_model: Path) -> None:
    _, tokenizer = loading.load(str(tiny_model))
    prompts = Prompts(tokenizer, [], max_tokens=3, end_ids=[0])
    with pytest.raises(ValueError, match="max_prompt_tokens"):
        Evaluator(corrector(Vowels([]), prompts), [Vowels([]).problem(0)], Sampling(5, [0]), 1, 1)


def test_a_teacher_that_does_not_move_answers_equal_prompts_once(tiny_model: Path) -> None:
    """A resumed run, whose evaluator has not asked it yet, gets the same answers whatever the student now says."""
    lm, prompts = parts(tiny_model)
    asked = []

    class Counted(InProcessTeacher):
        def generate(self, prompts: list[list[int]], *rest: object) -> list[Rollout]:
            asked.append(len(prompts))
            return super().generate(prompts, *rest)

    task = Vowels([])
    held_out = [problem for _, problem in islice(problems(task, held_out=True), 4)]
    first, resumed = (
        Evaluator(corrector(task, prompts), held_out, Sampling(5, prompts.stop_ids()), 1, seed=1) for _ in range(2)
    )
    frozen, live = Counted(lm, "frozen", 0.0), Counted(lm, "live", 0.0)
    before = first.evaluate(lm, frozen)
    with torch.no_grad():
        lm.weight.mul_(1.5)  # an update
    after, by_resumed = first.evaluate(lm, frozen), resumed.evaluate(lm, frozen)
    assert asked == [4, 4] and before is not None and after is not None and by_resumed is not None
    assert before.teacher == after.teacher and before.sampled != after.sampled
    assert by_resumed == after
    for _ in range(2):
        resumed.evaluate(lm, live)
    assert asked == [4] * 4
