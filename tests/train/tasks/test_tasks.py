"""Problems are repeatable, verified, and never on both sides of the split."""

from __future__ import annotations

import operator
from itertools import islice

import pytest

from distil_kernels.train.tasks import OWN_TASKS, Problem, is_held_out, make_task, problems


@pytest.mark.parametrize("name", OWN_TASKS)
def test_own_tasks_accept_the_experts_answer_only(name: str) -> None:
    task = make_task(name, seed=3)
    for index in range(20):
        problem = task.problem(index)
        assert problem == make_task(name, seed=3).problem(index)
        assert task.score(problem.answer, problem.entry) == 1.0
        assert task.score(problem.answer + "0", problem.entry) == 0.0
    assert make_task(name, seed=3).problem(0) != make_task(name, seed=4).problem(0)


def test_answers_are_right() -> None:
    largest = make_task("largest", 0).problem(5)
    assert largest.answer == str(max(int(word) for word in largest.question.split(", ")))
    added = make_task("add", 0).problem(5)
    assert added.answer == str(sum(int(word) for word in added.question.split(" + ")))
    ordered = make_task("sort", 0).problem(5)
    assert ordered.answer.split(", ") == sorted(ordered.question.split(", "))
    for name, sign, calculate in (("product", " * ", operator.mul), ("remainder", " modulo ", operator.mod)):
        problem = make_task(name, 0).problem(5)
        assert int(problem.answer) == calculate(*map(int, problem.question.split(sign)))
    turned = make_task("reverse", 0).problem(5)
    assert turned.answer == "".join(reversed(turned.question)) and len(turned.answer) == 4


def test_splits_are_disjoint_whatever_the_seeds() -> None:
    training = {
        problem.key for seed in (0, 1234) for _, problem in islice(problems(make_task("add", seed), False), 400)
    }
    held_out = {problem.key for seed in (0, 1234) for _, problem in islice(problems(make_task("add", seed), True), 400)}
    assert not training & held_out
    one = Problem("97, 12", "97", "97", key="[12, 97]")
    assert is_held_out(one) == is_held_out(one._replace(question="12, 97"))
    question, *_, key = make_task("largest", 0).problem(0)
    assert key == str(sorted(int(word) for word in question.split(", ")))  # its permutations have the same


def test_a_stream_goes_on_from_its_position() -> None:
    task = make_task("largest", 0)
    whole = list(islice(problems(task, False), 20))
    position = whole[9][0]
    assert list(islice(problems(task, False, start=position), 10)) == whole[10:]


def test_too_few_different_problems_is_an_error_not_a_loop() -> None:
    class Same:
        def problem(self, index: int) -> Problem:
            return make_task("largest", 0).problem(0)

        def score(self, answer: str, entry: object) -> float:
            return 0.0

    missing = not is_held_out(Same().problem(0))
    with pytest.raises(ValueError, match="one in 8 is held out, by its hash: the task has too few"):
        next(problems(Same(), missing))


def test_reasoning_gym_scores_with_its_own_verifier() -> None:
    task = make_task("reasoning_gym:basic_arithmetic", 0)
    problem = task.problem(1500)  # in the second block
    assert task.score(problem.answer, problem.entry) == 1.0
    assert task.score("no number", problem.entry) < 1.0
    assert problem == make_task("reasoning_gym:basic_arithmetic", 1000).problem(500)


def test_an_answer_that_a_reasoning_gym_verifier_cannot_read_is_wrong() -> None:
    task = make_task("reasoning_gym:prime_factorization", 0)
    problem = task.problem(0)
    assert task.score(problem.answer, problem.entry) == 1.0
    assert task.score("2 x many", problem.entry) == 0.0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("largst", "did you mean largest"),
        ("reasoning_gym:basic_arithmetics", "did you mean basic_arithmetic"),
        ("reasoning_gym:rush_hour", "hold no answer"),
        ("reasoning_gym:composite", "cannot make 'composite'"),
    ],
)
def test_tasks_that_cannot_be_used_say_why(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_task(name, 0)
