"""Which problems a batch takes, and what is said when there are none."""

from __future__ import annotations

from pathlib import Path

import pytest

from distil_kernels.train.batches import Batches
from distil_kernels.train.evaluate import Evaluator
from distil_kernels.train.feedback.kinds import Prompts, Verifier, correct
from distil_kernels.train.feedback.siblings import as_verified
from distil_kernels.train.models import loading
from distil_kernels.train.rollouts.sampling import Sampling
from distil_kernels.train.run.distributed import ALONE
from distil_kernels.train.tasks import Feedback, Problem, is_held_out


class Lengths:
    """One question in `every` is short."""

    def __init__(self, every: int) -> None:
        self._every = every

    def problem(self, index: int) -> Problem:
        return Problem(f"{index}?" + " and so on" * (10 * (index % self._every > 0)), "1", None, str(index))

    def score(self, answer: str, entry: object) -> float:
        return float(answer == "1")


def batches(model: Path, task: Lengths, count: int, verify: Verifier = correct, worked: int = 0) -> Batches:
    prompts = Prompts(loading.load(str(model))[1], [], max_tokens=60, end_ids=[0])
    return Batches(task, verify, prompts, {str(index) for index in range(worked)}, count, ALONE)


def test_a_batch_may_pass_over_more_than_a_thousand(tiny_model: Path) -> None:
    next_batch = batches(tiny_model, Lengths(every=25), 64)
    keys = [entry.problem.key for _ in range(2) for entry in next_batch()]
    assert len(keys) == len(set(keys)) == 128 and not any(int(key) % 25 for key in keys)
    assert next_batch.skipped > 2 * 1000


@pytest.mark.parametrize(
    ("every", "worked", "message"),
    [(10**6, 1, r"\[max_prompt_tokens\] .*raise the limit"), (1, 2000, r"\[num_examples\] .*worked .*fewer")],
)
def test_a_thousand_in_a_row_end_the_run_with_advice(tiny_model: Path, every: int, worked: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        batches(tiny_model, Lengths(every), 1, worked=worked)()


def test_a_users_judge_is_asked_of_answers_only(tiny_model: Path) -> None:
    """One that counts, say, fails on the empty answer that a correction is tried with."""

    def judge(task: object, problem: Problem, answer: str) -> Feedback:
        return Feedback(float(int(answer) == 1), "No." * 100, "")

    task = Lengths(every=1)
    prompts = Prompts(loading.load(str(tiny_model))[1], [], max_tokens=60, end_ids=[0])
    (entry,) = batches(tiny_model, task, 1, judge)()
    read = prompts.teacher(entry.problem, judge(task, entry.problem, "2"))
    assert read is not None and len(read) <= 60  # as much as fits
    held_out = [task.problem(index) for index in range(40) if is_held_out(task.problem(index))]
    evaluate = Evaluator(task, judge, as_verified, prompts, held_out, Sampling(5, [0]), 1, seed=1)
    assert [problem for problem, _ in evaluate.student_prompts] == held_out
