"""Which problems a batch takes, and what is said when there are none."""

from __future__ import annotations

from pathlib import Path

import pytest

from distil_kernels.train.batches import Batches
from distil_kernels.train.evaluate import Evaluator
from distil_kernels.train.feedback.kinds import FEEDBACK, FeedbackKind, users_kind
from distil_kernels.train.feedback.prompts import Prompts
from distil_kernels.train.feedback.tutor import Tutor
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


def tutor(model: Path, task: Lengths, kind: FeedbackKind) -> Tutor:
    prompts = Prompts(loading.load(str(model))[1], [], max_tokens=60, end_ids=[0])
    return Tutor.of(kind, task, prompts, max_critique_tokens=1)


def batches(model: Path, task: Lengths, count: int, worked: int = 0) -> Batches:
    example_keys = {str(index) for index in range(worked)}
    return Batches(tutor(model, task, FEEDBACK["correction"]), example_keys, count, ALONE)


def test_a_batch_may_pass_over_more_than_a_thousand(tiny_model: Path) -> None:
    endless = batches(tiny_model, Lengths(every=25), 64)
    keys = [group.problem.key for _ in range(2) for group in next(endless)]
    assert len(keys) == len(set(keys)) == 128 and not any(int(key) % 25 for key in keys)
    assert endless.num_skipped > 2 * 1000


@pytest.mark.parametrize(
    ("every", "worked", "message"),
    [(10**6, 1, r"\[max_prompt_tokens\] .*raise the limit"), (1, 2000, r"\[num_examples\] .*worked .*fewer")],
)
def test_a_thousand_in_a_row_end_the_run_with_advice(tiny_model: Path, every: int, worked: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        next(batches(tiny_model, Lengths(every), 1, worked=worked))


def test_a_users_judge_is_asked_of_answers_only(tiny_model: Path) -> None:
    """One that counts, say, fails on the empty answer that a correction is tried with."""

    def judge(task: object, problem: Problem, answer: str) -> Feedback:
        return Feedback(float(int(answer) == 1), "No." * 100, "")

    task = Lengths(every=1)
    judged = tutor(tiny_model, task, users_kind(judge))
    (group,) = next(Batches(judged, set(), 1, ALONE))
    read = judged.prompts.teacher(group.problem, judge(task, group.problem, "2"))
    assert read is not None and len(read) <= 60  # as much as fits
    held_out = [task.problem(index) for index in range(40) if is_held_out(task.problem(index))]
    evaluator = Evaluator(judged, held_out, Sampling(5, [0]), 1, seed=1)
    assert [group.problem for group in evaluator.groups()] == held_out
