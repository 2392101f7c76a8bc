"""Many answers at once; those without a verdict; every record's own answer judged by its own verifier."""

from __future__ import annotations

import json
import threading
import time
from itertools import islice
from pathlib import Path

import pytest

from distil_kernels.train.__main__ import main
from distil_kernels.train.feedback.kinds import correction_feedback
from distil_kernels.train.tasks import NO_VERDICT, Feedback, Problem, expressions, make_task, problems
from distil_kernels.train.tasks.check import check
from distil_kernels.train.tasks.sandbox import JudgeFailed, cores
from distil_kernels.train.tasks.verdicts import verified

PROBLEM = Problem("?", "a", "a", "?")


class Runs:
    """A task whose answers are run."""

    def trace(self, answer: str, entry: str) -> tuple[float, str]:
        return 0.0, ""


def test_answers_that_are_run_are_judged_at_once_and_in_order() -> None:
    threads = set()

    def verify(task: object, problem: Problem, answer: str) -> Feedback:
        threads.add(threading.get_ident())
        time.sleep(0.02)
        return Feedback(float(answer), answer, "")

    answers = [(Runs(), PROBLEM, answer) for answer in ("1", "0", "0", "0", "1")]
    for may_thread, number in ((True, cores()), (False, 1)):
        threads.clear()
        feedback = verified(verify, answers, may_thread)
        assert [said.text for said in feedback] == ["1", "0", "0", "0", "1"]
        assert len(threads) == number


def test_an_answer_without_a_verdict_is_left_out_and_counted() -> None:
    def verify(task: object, problem: Problem, answer: str) -> Feedback:
        if answer == "dies":
            raise JudgeFailed
        return Feedback(float(answer), "right", "a")

    with pytest.warns(UserWarning, match="2 of 5 answers have no verdict"):
        found = verified(verify, [(Runs(), PROBLEM, answer) for answer in ("1", "dies", "0", "1", "dies")], True)
    assert [said.has_verdict for said in found] == [True, False, True, True, False]
    assert found[1] == found[4] == NO_VERDICT


def test_expressions_that_no_process_lived_to_compare_have_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(expressions._WORKER, "ask", lambda *texts: asked.append(texts) or "")
    problem, task = Problem("?", "5", "5", "?"), make_task("math", seed=0)
    with pytest.warns(UserWarning, match="1 of 2 answers have no verdict"):
        first, second = verified(correction_feedback, [(task, problem, "10/2"), (task, problem, "5")], False)
    assert first == NO_VERDICT and second.score == 1.0 and len(asked) == 3


def test_every_reference_is_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    test = [{"input": "1\n", "output": "1\n", "testtype": "stdin"}]
    good = {"question_content": "?", "public_test_cases": test, "solution": "print(input())"}
    wrong, unanswered = good | {"solution": "print(2)"}, good | {"solution": ""}
    file = tmp_path / "set.jsonl"
    file.write_text("\n".join(map(json.dumps, [good, wrong, unanswered, good | {"public_test_cases": []}])))
    with pytest.warns(UserWarning, match="1 of 4 records"):
        report = check(make_task(f"code:{file}", seed=0, skip_bad_records=True))
    assert (report.right, report.unanswered, report.is_ok) == (["line 1"], ["line 3"], False)
    assert [name for name, _ in report.wrong] == ["line 2"] and "expected output\n1\ngot\n2" in report.wrong[0][1]
    assert report.unjudgeable == ["line 4: public_test_cases is empty"]
    with pytest.warns(UserWarning):
        assert main(["check", f"code:{file}"]) == 1
    assert "wrong, line 2: Test 1 of 1 fails" in capsys.readouterr().out


def test_a_record_whose_reference_solution_fails_is_left_out_when_it_is_first_asked_for(tmp_path: Path) -> None:
    lines = []
    for number in range(24):
        test = {"input": f"{number}\n", "output": f"{number}\n", "testtype": "stdin"}
        solution = "" if number % 3 == 0 else "print(input())" if number % 3 == 1 else "print(0 * '!')"
        lines.append({"question_content": f"{number}?", "public_test_cases": [test], "solution": solution})
    file = tmp_path / "set.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    task = make_task(f"code:{file}", seed=0)
    assert task.left_out == []
    with pytest.warns(UserWarning, match=r"line \d+: its reference solution fails its tests: Test 1 of 1 fail"):
        found = {problem.question.split()[4] for _, problem in islice(problems(task, held_out=False), 60)}
    assert found and all(int(number[:-1]) % 3 < 2 for number in found)
    numbers = {int(text.split(":")[0].split()[1]) for text in task.left_out}
    assert len(task.left_out) == len(numbers) == 8 and {number % 3 for number in numbers} == {0}  # from 1
    resumed = make_task(f"code:{file}", seed=0)
    resumed.load_state_dict(task.state_dict())
    assert resumed.left_out == task.left_out
    assert [next(problems(resumed, held_out=False, start=i)) for i in range(24)] == [
        next(problems(task, held_out=False, start=i)) for i in range(24)
    ]  # without a warning: nothing is run again


def test_a_reference_solution_without_a_verdict_is_no_fault_of_its_record(monkeypatch: pytest.MonkeyPatch) -> None:
    task = make_task("code", seed=0)

    def dies(answer: str, entry: object) -> tuple[float, str]:
        raise JudgeFailed

    monkeypatch.setattr(task, "trace", dies)
    assert all(map(task.is_sound, range(8))) and task.left_out == []


@pytest.mark.parametrize("task", ["code", "math", "science", "add", "reasoning_gym:basic_arithmetic"])
def test_the_answers_of_what_is_shipped_are_right(task: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", task]) == 0
    assert (
        "0 whose own answer is wrong\n0 without an answer of their own, 0 that cannot be judged"
        in capsys.readouterr().out
    )
