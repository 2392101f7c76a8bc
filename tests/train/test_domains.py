"""Science, mathematics, code, any JSON Lines file: every shipped record, the public formats, verifiers, errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_run import QUICK, train, trainer, written

from distil_kernels.train.__main__ import main
from distil_kernels.train.checkpoint import read_lines
from distil_kernels.train.feedback import verifier
from distil_kernels.train.tasks import Feedback, held_out_problems, is_held_out, make_task
from distil_kernels.train.tasks.answers import boxed
from distil_kernels.train.tasks.code import code_of


def records(task: object) -> list:
    return task._problems


@pytest.mark.parametrize("domain", ["science", "math", "code"])
def test_every_shipped_record_is_right_and_a_wrong_answer_is_wrong(domain: str) -> None:
    task = make_task(domain, seed=0)
    problems = records(task)
    assert len(problems) >= 20 and len({problem.key for problem in problems}) == len(problems)
    for problem in problems:
        assert task.score(problem.answer, problem.entry) == 1.0, problem
        assert task.score("```python\npass\n```" if domain == "code" else "Z 999", problem.entry) == 0.0, problem
    assert any(map(is_held_out, problems)) and not all(map(is_held_out, problems))


def test_a_pass_over_a_file_shows_every_record_once() -> None:
    task = make_task("math", seed=3)
    size = len(records(task))
    first, second = ([task.problem(turn * size + i).key for i in range(size)] for turn in (0, 1))
    assert sorted(first) == sorted(second) and len(set(first)) == size and first != second
    assert [make_task("math", seed=3).problem(i).key for i in range(size)] == first


def test_held_out_problems_are_different_ones() -> None:
    task = make_task("science", seed=0)
    found = held_out_problems(task, 48)
    assert len({problem.key for problem in found}) == len(found) == sum(map(is_held_out, records(task)))
    assert len(held_out_problems(make_task("largest", seed=0), 5)) == 5


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("B", 1), ("b) Carbon dioxide", 0), ("B. Carbon dioxide", 1), ("(B)", 1), ("The answer is B.", 1),
        ("A or B? The answer is (B)", 1), ("I first thought answer A, but the answer is: B", 1), ("\\boxed{B}", 1),
        ("C", 0), ("", 0), ("Because oxygen", 0), ("Option C, not B", 0),
    ],
)  # fmt: skip
def test_choices(answer: str, right: int) -> None:
    task = make_task("science", seed=0)
    problem = next(problem for problem in records(task) if "photosynthesis?\n" in problem.question)
    assert problem.answer == "B" and "B. Carbon dioxide" in problem.question
    assert task.score(answer, problem.entry) == right


def test_mathematics_is_compared_as_such(tmp_path: Path) -> None:
    file = tmp_path / "set.jsonl"
    file.write_text(json.dumps({"problem": "?", "solution": "so it is $\\boxed{\\frac{3}{4}}$."}) + "\n")
    task = make_task(f"math:{file}", seed=0)
    problem = task.problem(0)
    assert problem.answer == "\\frac{3}{4}" == boxed("x \\boxed{1} y \\boxed{\\frac{3}{4}}")
    for answer, score in (("0.75", 1), ("6/8", 1), ("We get \\boxed{3/4}", 1), ("0.7", 0), ("", 0), ("cat", 0)):
        assert task.score(answer, problem.entry) == score, answer


def test_any_questions(tmp_path: Path) -> None:
    file = tmp_path / "set.jsonl"
    file.write_text('{"question": "Capital of France?", "answer": "Paris", "note": 1}\n\n')
    task = make_task(f"qa:{file}", seed=0)
    assert task.score("  paris. ", task.problem(0).entry) == 1.0
    assert task.score("Paris, France", task.problem(0).entry) == 0.0


@pytest.mark.parametrize(
    ("domain", "line", "message"),
    [
        ("qa", '{"question": "?"}', "line 2: the field 'answer' is missing"),
        ("qa", "{", "line 2: Expecting property name"),
        (
            "science",
            '{"question": "?", "choices": {"label": ["A"], "text": ["x"]}, "answerKey": "B"}',
            "expected one of A",
        ),
        ("math", '{"problem": "?", "answer": "\\\\boxed{1"}', "not closed"),
        ("code", '{"question_content": "?", "public_test_cases": "[]"}', "public_test_cases is empty"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, domain: str, line: str, message: str) -> None:
    file = tmp_path / "set.jsonl"
    file.write_text(f"\n{line}\n")
    with pytest.raises(ValueError, match=rf"\[task\] .*set.jsonl, .*{message}"):
        make_task(f"{domain}:{file}", seed=0)
    file.write_text("")
    with pytest.raises(ValueError, match="holds no records"):
        make_task(f"{domain}:{file}", seed=0)
    with pytest.raises(ValueError, match=r"\[task\] cannot read .*missing.jsonl"):
        make_task(f"{domain}:{tmp_path / 'missing.jsonl'}", seed=0)


def code_problem(name: str) -> tuple:
    task = make_task("code", seed=0)
    return task, next(problem for problem in records(task) if name in problem.question)


def test_a_trace_shows_the_first_failing_test() -> None:
    task, problem = code_problem("digit_sum")
    trace = verifier("trace")
    wrong = trace(task, problem, "Here:\n```python\ndef digit_sum(number):\n    return sum(map(int, str(number)))\n```")
    assert wrong.score == 0.0 and wrong.demonstration == ""
    assert "Test 1 of 1 fails" in wrong.text and "ValueError: invalid literal for int() with base 10: '-'" in wrong.text
    assert "sandbox" not in wrong.text and len(wrong.text.splitlines()) < 15
    body_only = trace(task, problem, "```python\n    return sum(int(digit) for digit in str(abs(number)))\n```")
    assert (body_only.score, body_only.text) == (1.0, "All tests pass (1).")
    assert "no code" in trace(task, problem, "").text
    shown = verifier("both")(task, problem, "")
    assert "The correct answer is ```python" in shown.text and shown.demonstration == problem.answer


def test_traces_of_whole_programs_and_methods() -> None:
    task, problem = code_problem("One line holds integers")
    found = task.trace("```\nprint(max(map(int, input().split())))\n```", problem.entry)
    assert found == (0.0, "Test 1 of 3 fails on the input\n1 2 3\nexpected output\n6\ngot\n3")
    task, problem = code_problem("Return whether two entries")
    found = task.trace(
        "class Solution:\n    def hasPair(self, numbers: List[int], target):\n        return False", problem.entry
    )
    assert found[0] == 0.0 and "hasPair([1, 2, 4], 6) gave False, expected True" in found[1]


def test_code_of_an_answer() -> None:
    assert code_of("a\n```python\nfirst\n```\nb\n```py\nsecond\n```") == "second"
    assert code_of("```\ncut off") == "cut off"
    assert code_of("plain") == "plain"


def test_compressed_private_tests_are_left_out_and_said(tmp_path: Path) -> None:
    test = [{"input": "1\n", "output": "1\n", "testtype": "stdin"}]
    record = {"question_content": "?", "public_test_cases": json.dumps(test), "private_test_cases": "eJxrYJ0aDQAE"}
    file = tmp_path / "set.jsonl"
    file.write_text(json.dumps(record) + "\n")
    with pytest.warns(UserWarning, match="left out"):
        task = make_task(f"code:{file}", seed=0)
    problem = task.problem(0)
    assert problem.answer == "" and task.score("print(input())", problem.entry) == 1.0
    with pytest.raises(ValueError, match="expected --feedback trace"):
        verifier("correction")(task, problem, "")


def shout(problem: object, answer: str) -> tuple[float, str]:
    return float(answer == ""), "EMPTY" if answer == "" else "FULL"


def test_feedback_by_a_function_of_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_task("largest", seed=0).problem(0)
    found = verifier(f"{__name__}:shout")(None, problem, "")
    assert found == Feedback(1.0, "EMPTY", problem.answer)
    monkeypatch.setitem(globals(), "shout", lambda problem, answer: 2.0)
    with pytest.raises(ValueError, match=r"\[feedback\] .*gave 2.0, expected Feedback"):
        verifier(f"{__name__}:shout")(None, problem, "")
    for path, message in (("nowhere", "expected one of"), ("nowhere:f", "cannot import"), (f"{__name__}:g", "cannot")):
        with pytest.raises(ValueError, match=rf"\[feedback\] .*{message}"):
            verifier(path)
    with pytest.raises(ValueError, match="answers of this task are not run"):
        verifier("trace")(make_task("largest", seed=0), problem, "")


@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("science", ["--feedback", f"{__name__}:shout"]),
        ("math", ["--teacher_reads", "both"]),
        ("code", ["--feedback", "trace", "--layout", "chat", "--credit_span", "sequence", "--discount", "1"]),
    ],
)
def test_a_run_of_each_domain(tiny_model: Path, tmp_path: Path, task: str, options: list[str]) -> None:
    directory = train(tiny_model, tmp_path, "run", "--task", task, "--max_prompt_tokens", "4000", *options, steps=1)
    rollouts = [record for record in read_lines(directory / "rollouts.jsonl") if record["kind"] == "training"]
    assert len(rollouts) == 6
    if task == "code":
        assert all("Test 1 of" in record["feedback"] or "no code" in record["feedback"] for record in rollouts)


def test_a_task_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--task", "sceince", "--runs_dir", str(tmp_path), *QUICK]) == 2
    assert "did you mean science?" in capsys.readouterr().err


def test_examples_are_no_training_problems_and_what_is_biased_is_said(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [
        "--task",
        "math",
        "--max_prompt_tokens",
        "4000",
        "--feedback",
        f"{__name__}:shout",
        "--num_examples",
        "9",
    ]
    directory = train(tiny_model, tmp_path, "run", *options, steps=6)
    assert "note: feedback" in capsys.readouterr().out
    rollouts = [record for record in read_lines(directory / "rollouts.jsonl") if record["kind"] == "training"]
    task = make_task("math", seed=0)
    own = (problem for problem in map(task.problem, range(1000)) if not is_held_out(problem))
    examples = {next(own).question for _ in range(9)}
    assert examples.isdisjoint({record["question"] for record in rollouts})


def test_a_rollout_whose_teacher_reads_nothing_is_left_out(tiny_model: Path, tmp_path: Path) -> None:
    """Its gradient is that of the others alone, over the same normaliser."""
    gradients = []
    for keep in (True, False):
        run = trainer(tiny_model, tmp_path / str(keep), credit_span="none")
        batch = run.next_batch()
        run.roll_out(batch)
        if keep:  # the second problem's rollouts count nothing
            batch[1].taught = [False, False]
        else:
            del batch[1]
        run.micro_batch(batch, 8.0, {})
        gradients.append([parameter.grad.clone() for parameter in run.student.model.parameters()])
        assert run.prompts.teacher(batch[0].problem, Feedback(0.0, "", "")) is None
        run.answered(batch[:1], [written(*batch[0].completions)])
        assert batch[0].taught == [True, True]
    for masked, without in zip(*gradients, strict=True):
        torch.testing.assert_close(masked, without, rtol=1e-3, atol=1e-6)


def test_the_teacher_is_evaluated_on_what_is_said_of_the_greedy_answer(tiny_model: Path, tmp_path: Path) -> None:
    """Feedback from the rollout must come from one; a correction is the same for any answer."""
    seen = []

    def spy(task: object, problem: object, answer: str) -> Feedback:
        seen.append(answer)
        return Feedback(0.5, f"You said {answer!r}.", problem.answer)

    run = trainer(tiny_model, tmp_path / "run", teacher="live", num_examples=0)
    run.evaluate._verify = spy
    read = []
    original = run.evaluate._prompts.teacher
    run.evaluate._prompts.teacher = lambda problem, said: read.append(said.text) or original(problem, said)
    result = run.evaluate(run.student, run.teacher)
    assert result.sampled == result.teacher == 0.5
    greedy = seen[2 * run.config.eval_samples :][: len(read)]
    assert read == [f"You said {answer!r}." for answer in greedy] and len(read) == 2
