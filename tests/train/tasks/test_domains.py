"""Science, mathematics, code, any JSON Lines file: every shipped record, the public formats, verifiers, errors."""

from __future__ import annotations

import base64
import json
import os
import pickle
import random
import subprocess
import sys
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from runs import QUICK, give_rollouts, micro_batch, sampled, train, trainer

from distil_kernels.train.__main__ import main
from distil_kernels.train.feedback.kinds import feedback_kind
from distil_kernels.train.run.json_lines import read_lines
from distil_kernels.train.tasks import (
    Feedback,
    answered_problems,
    expressions,
    held_out_problems,
    is_held_out,
    make_task,
)
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


def test_a_pass_is_shuffled_once(tmp_path: Path) -> None:
    file = tmp_path / "set.jsonl"
    file.write_text("".join(f'{{"question": "{number}", "answer": "1"}}\n' for number in range(20000)))
    task = make_task(f"qa:{file}", seed=3)
    order = list(range(20000))
    random.Random("3/1").shuffle(order)
    began = time.perf_counter()
    assert [task.problem(20000 + place).question for place in range(2000)] == [str(record) for record in order[:2000]]
    assert time.perf_counter() - began < 2  # 12 s where each problem shuffles
    assert task.problem(20000 + 7) == make_task(f"qa:{file}", seed=3).problem(20000 + 7) != task.problem(7)


def test_held_out_problems_are_different_ones() -> None:
    task = make_task("science", seed=0)
    found = held_out_problems(task, 48)
    assert len({problem.key for problem in found}) == len(found) == sum(map(is_held_out, records(task)))
    assert len(held_out_problems(make_task("largest", seed=0), 5)) == 5


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("B", 1), ("b) Carbon dioxide", 1), ("B. Carbon dioxide", 1), ("(B)", 1), ("The answer is B.", 1),
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


UNCOUNTABLE = [
    "9^{9^{9^{9}}}", "10^{10^{10}}", "100000!!", "2^{2^{40}}", "(10^9)!", "\\binom{10^9}{5*10^8}",
]  # fmt: skip


def test_an_expression_that_cannot_be_evaluated_is_wrong_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in threads, where a signal could not end it; what comes after it is scored as before."""
    monkeypatch.setattr(expressions, "SECONDS", 0.5)
    worker = expressions.Worker()
    monkeypatch.setattr(expressions, "_WORKER", worker)
    task = make_task("math", seed=0)
    began = time.perf_counter()
    with pytest.warns(UserWarning, match=r"could not be evaluated in 0.5 seconds"):
        assert [task.score(answer, "5") for answer in UNCOUNTABLE] == [0.0] * len(UNCOUNTABLE)
    with ThreadPoolExecutor(4) as threads, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = threads.map(task.score, ["5.0", UNCOUNTABLE[0], "10/2", "6"] * 4, ["5"] * 16)
        assert list(found) == [1.0, 0.0, 1.0, 0.0] * 4
    assert time.perf_counter() - began < 30
    worker.close()
    assert task.score(UNCOUNTABLE[0], UNCOUNTABLE[0]) == 1.0 and worker._process is None  # the same words


def test_expressions_are_compared_in_one_process_that_forks_do_not_share() -> None:
    task = make_task("math", seed=0)
    assert task.score("10/2", "5") == 1.0
    worker = expressions._WORKER._process
    assert task.score("10/2", "6") == 0.0 and expressions._WORKER._process is worker
    fork = get_context("fork").Pool(2)
    with fork:
        assert fork.starmap(task.score, [("10/2", str(right)) for right in range(40)]) == [
            float(right == 5) for right in range(40)
        ]
    worker.kill()
    worker.wait()
    assert task.score("10/2", "5") == 1.0


def test_the_process_that_compares_does_not_run_the_callers_main(tmp_path: Path) -> None:
    """It ends with the caller."""
    script = tmp_path / "caller.py"
    script.write_text(
        "from distil_kernels.train.tasks import expressions, make_task\n"
        "print('ran', make_task('math', 0).score('10/2', '5'), expressions._WORKER._process.pid)\n"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    callers = [
        subprocess.Popen([sys.executable, *command], cwd=tmp_path, **pipes) for command in ([script], ["-m", "caller"])
    ]
    for caller in callers:
        output, errors = caller.communicate()
        ran, score, pid = output.split()
        assert (ran, score, errors) == ("ran", "1.0", "")
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


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
    trace = feedback_kind("trace").verifier
    wrong = trace(task, problem, "Here:\n```python\ndef digit_sum(number):\n    return sum(map(int, str(number)))\n```")
    assert wrong.score == 0.0 and wrong.demonstration == ""
    assert "Test 1 of 1 fails" in wrong.text and "ValueError: invalid literal for int() with base 10: '-'" in wrong.text
    assert "sandbox" not in wrong.text and len(wrong.text.splitlines()) < 15
    body_only = trace(task, problem, "```python\n    return sum(int(digit) for digit in str(abs(number)))\n```")
    assert (body_only.score, body_only.text) == (1.0, "All tests pass (1).")
    assert "no code" in trace(task, problem, "").text
    shown = feedback_kind("both").verifier(task, problem, "")
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


@pytest.mark.parametrize("leave", ["raise SystemExit", "import sys\n    sys.exit(0)", "import os\n    os._exit(0)"])
def test_an_answer_that_exits_passes_no_test(leave: str) -> None:
    for name, answer in (
        ("digit_sum", f"def digit_sum(number):\n    {leave}"),
        ("Return whether two entries", f"class Solution:\n  def hasPair(self, numbers, target):\n    {leave}"),
    ):
        task, problem = code_problem(name)
        score, said = task.trace(answer, problem.entry)
        assert score == 0.0 and "the program ended before its tests" in said
    task, problem = code_problem("One line holds integers")
    assert task.score("import sys\nprint(sum(map(int, input().split())))\nsys.exit()", problem.entry) == 1.0


def test_what_an_answer_does_as_a_script_is_no_part_of_its_function() -> None:
    task, problem = code_problem("digit_sum")
    right = "def digit_sum(number):\n    return sum(int(digit) for digit in str(abs(number)))\n"
    for rest in (
        "if __name__ == '__main__':\n    print(digit_sum(int(input())))\n    raise SystemExit",
        "print(end='x')",
    ):
        assert task.trace(right + rest, problem.entry) == (1.0, "All tests pass (1).")
    assert task.score(right + "raise SystemExit", problem.entry) == 0.0


def human_eval(tmp_path: Path, prompt: str, test: str) -> tuple:
    file = tmp_path / "set.jsonl"
    file.write_text(json.dumps({"prompt": prompt, "entry_point": "decode", "test": test}) + "\n")
    task = make_task(f"code:{file}", seed=0)
    return task, task.problem(0).entry


def test_what_stands_before_the_function_in_a_prompt_is_there_for_its_answer(tmp_path: Path) -> None:
    header = 'def decode(words: List[str]) -> str:\n    """The reverse of encode."""\n'
    before = "from typing import List\n\n\ndef encode(text: str) -> List[str]:\n    return text.split()\n\n\n"
    task, entry = human_eval(tmp_path, before + header, "def check(f):\n    assert f(encode('a b')) == 'a b'\n")
    body = "    return ' '.join(words)"
    for answer in (body, header + body, before + header + body, f"from __future__ import annotations\n{header}{body}"):
        assert task.trace(answer, entry) == (1.0, "All tests pass (1).")
    score, said = task.trace(header + "    return words", entry)
    assert score == 0.0 and "assert f(encode('a b')) == 'a b'" in said and "AssertionError" in said
    task, entry = human_eval(tmp_path, "Join the words:\n" + header, "def check(f):\n    assert f(['a']) == 'a'\n")
    assert task.score("from typing import List\n" + header + body, entry) == 1.0  # words are nothing to execute


def test_methods_may_begin_with_a_future_import() -> None:
    task, problem = code_problem("Return whether two entries")
    answer = problem.answer.replace("```python\n", "```python\nfrom __future__ import annotations\n")
    assert task.trace(answer, problem.entry)[0] == 1.0


def test_code_of_an_answer() -> None:
    assert code_of("a\n```python\nfirst\n```\nb\n```py\nsecond\n```") == "second"
    assert code_of("```\ncut off") == "cut off"
    assert code_of("plain") == "plain"


def compressed(value: object) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()


def livecodebench(tmp_path: Path, private: str, **fields: object) -> object:
    public = [{"input": "1\n", "output": "1\n", "testtype": "stdin"}]
    record = {"question_content": "?", "public_test_cases": json.dumps(public), "private_test_cases": private}
    file = tmp_path / "set.jsonl"
    file.write_text(json.dumps(record | fields) + "\n")
    return make_task(f"code:{file}", seed=0)


def test_compressed_private_tests_are_read(tmp_path: Path) -> None:
    task = livecodebench(tmp_path, compressed(json.dumps([{"input": "2\n", "output": "2\n", "testtype": "stdin"}])))
    problem = task.problem(0)
    assert problem.answer == "" and task.trace("print(1)", problem.entry) == (
        0.0,
        "Test 2 of 2 fails, which is private: the answer is wrong.",
    )
    assert feedback_kind("both").verifier(task, problem, "print(input())") == Feedback(1.0, "All tests pass (2).", "")
    with pytest.raises(ValueError, match="expected --feedback trace"):
        feedback_kind("correction").verifier(task, problem, "")


class Harmful:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("harmed",)


@pytest.mark.parametrize(
    ("private", "reason"),
    [
        (compressed(Harmful()), "asks for posix.mkdir, where a string was expected"),
        (compressed(["[]"]), "a pickle of type list"),
        (compressed({"a": 1}), "a pickle of type dict"),
        ("eJxrYJ0aDQAE", "incomplete or truncated stream"),
        ("no base64", "incorrect header check"),
    ],
)
def test_private_tests_are_strings_or_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, private: str, reason: str
) -> None:
    """By the public tests alone, whose outputs stand in the question, an answer cannot be judged."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf"line 1: private_test_cases cannot be read: .*{reason}"):
        livecodebench(tmp_path, private)
    assert not (tmp_path / "harmed").exists()


def test_records_that_cannot_be_judged_are_counted_and_named(tmp_path: Path) -> None:
    test = [{"input": "1\n", "output": "1\n", "testtype": "stdin"}]
    good = {"question_content": "?", "public_test_cases": test}
    lines = [good, {"question_content": "?", "public_test_cases": []}, good | {"private_test_cases": "?"}]
    file = tmp_path / "set.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    with pytest.warns(UserWarning, match=r"set.jsonl: line 2: public.* 2 of 3 records cannot be used; they are left"):
        task = make_task(f"code:{file}", seed=0, skip_bad_records=True)
    assert len(task.all_problems) == 1 and [text.partition(":")[0] for text in task.left_out] == ["line 2", "line 3"]


def test_worked_examples_have_an_answer(tmp_path: Path) -> None:
    file = tmp_path / "set.jsonl"
    test = [{"input": "1\n", "output": "1\n", "testtype": "stdin"}]
    solved = [{"solution": "print(input())"} if number % 20 == 0 else {} for number in range(200)]
    lines = [
        json.dumps({"question_content": f"{number}?", "public_test_cases": test} | own)
        for number, own in enumerate(solved)
    ]
    file.write_text("\n".join(lines))
    task = make_task(f"code:{file}", seed=0)
    found = answered_problems(task, 3)
    assert len({problem.key for problem in found}) == 3 and all(problem.answer for problem in found)
    assert not any(map(is_held_out, found))
    file.write_text("\n".join(line for line in lines if "solution" not in line))
    assert answered_problems(make_task(f"code:{file}", seed=0), 2) == []
    assert answered_problems(make_task("largest", seed=0), 0) == []


def shout(problem: object, answer: str) -> tuple[float, str]:
    return float(answer == ""), "EMPTY" if answer == "" else "FULL"


def test_feedback_by_a_function_of_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_task("largest", seed=0).problem(0)
    found = feedback_kind(f"{__name__}:shout").verifier(None, problem, "")
    assert found == Feedback(1.0, "EMPTY", problem.answer)
    wrong_results = (
        2.0, (2.0, ""), ("good", ""), (None, "", ""), [1.0, ""], (0.5, None), ("0.5", ""), (0.5, "", None), (0.5,),
        None,
    )  # fmt: skip
    for wrong in wrong_results:
        monkeypatch.setitem(globals(), "shout", lambda problem, answer, wrong=wrong: wrong)
        with pytest.raises(ValueError, match=r"\[feedback\] .*:shout gave .*, expected \(score") as caught:
            feedback_kind(f"{__name__}:shout").verifier(None, problem, "")
        assert "distil_kernels.train.tasks.Feedback(score" in str(caught.value)
    monkeypatch.setitem(globals(), "shout", lambda problem, answer: 1 / 0)
    with pytest.raises(RuntimeError, match=rf"\[feedback\] {__name__}:shout raised ZeroDivisionError: ") as raised:
        feedback_kind(f"{__name__}:shout").verifier(None, problem, "")
    assert isinstance(raised.value.__cause__, ZeroDivisionError)
    for path, message in (("nowhere", "expected one of"), ("nowhere:f", "cannot import"), (f"{__name__}:g", "cannot")):
        with pytest.raises(ValueError, match=rf"\[feedback\] .*{message}"):
            feedback_kind(path)
    with pytest.raises(ValueError, match="answers of this task are not run"):
        feedback_kind("trace").verifier(make_task("largest", seed=0), problem, "")


@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("science", ["--feedback", f"{__name__}:shout"]),
        ("math", ["--teacher_reads", "both"]),
        ("code", ["--feedback", "trace", "--layout", "chat", "--credit_span", "sequence", "--discount", "1"]),
    ],
)
def test_a_run_of_each_domain(tiny_model: Path, tmp_path: Path, task: str, options: list[str]) -> None:
    few = ["--eval_problems", "1", "--eval_samples", "1", "--eval_rollouts", "1"]
    options = ["--task", task, "--max_prompt_tokens", "4000", *few, *options]
    directory = train(tiny_model, tmp_path, "run", *options, steps=1)
    rollouts = [record for record in read_lines(directory / "rollouts.jsonl") if record["kind"] == "training"]
    assert len(rollouts) == 6
    if task == "code":
        assert all("Test 1 of" in record["feedback"] or "no code" in record["feedback"] for record in rollouts)


def test_a_task_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--task", "sceince", "--runs_dir", str(tmp_path), *QUICK]) == 2
    assert "did you mean science?" in capsys.readouterr().err


def test_examples_are_no_training_problems_and_what_is_biased_is_said(tiny_model: Path, tmp_path: Path) -> None:
    options = {"task": "math", "max_prompt_tokens": 4000, "feedback": f"{__name__}:shout", "num_examples": 9}
    run = trainer(tiny_model, tmp_path / "run", **options)
    assert any(remark.startswith("feedback") for remark in run.config.remarks())
    drawn = {group.problem.question for _ in range(20) for group in next(run.batches)}
    task = make_task("math", seed=0)
    training = (problem for problem in map(task.problem, range(1000)) if not is_held_out(problem))
    examples = {next(training).question for _ in range(9)}
    assert len(drawn) > 9 and examples.isdisjoint(drawn)


def test_a_rollout_whose_teacher_reads_nothing_is_left_out(tiny_model: Path, tmp_path: Path) -> None:
    """Its gradient is that of the others alone, over the same normaliser."""
    gradients = []
    for keep in (True, False):
        run = trainer(tiny_model, tmp_path / str(keep), credit_span="none")
        batch = next(run.batches)
        run.roll_out(batch)
        if keep:  # the second problem's rollouts count nothing
            for rollout in batch[1].rollouts:
                rollout.teacher_prompt = None
        else:
            del batch[1]
        micro_batch(run, batch, 8.0)
        gradients.append([parameter.grad.clone() for parameter in run.student.model.parameters()])
        assert run.tutor.prompts.teacher(batch[0].problem, Feedback(0.0, "", "")) is None
        give_rollouts(run, batch[:1], [sampled(*(rollout.tokens for rollout in batch[0].rollouts))])
        assert [rollout.has_feedback for rollout in batch[0].rollouts] == [True, True]
    for masked, without in zip(*gradients, strict=True):
        torch.testing.assert_close(masked, without, rtol=1e-3, atol=1e-6)


def test_the_teacher_is_evaluated_on_what_is_said_of_the_greedy_answer(tiny_model: Path, tmp_path: Path) -> None:
    """Feedback from the rollout must come from one; a correction is the same for any answer."""
    seen = []

    def spy(task: object, problem: object, answer: str) -> Feedback:
        seen.append(answer)
        return Feedback(0.5, f"You said {answer!r}.", problem.answer)

    run = trainer(tiny_model, tmp_path / "run", teacher="live", num_examples=0)
    tutor = run.evaluator.tutor
    tutor.verifier = spy
    read = []
    original = tutor.prompts.teacher
    tutor.prompts.teacher = lambda problem, said: read.append(said.text) or original(problem, said)
    result = run.evaluator.evaluate(run.student, run.teacher)
    assert result.sampled == result.teacher == 0.5
    greedy = seen[: 2 * (run.config.eval_samples + 1) : run.config.eval_samples + 1]  # the first of each problem
    assert read == [f"You said {answer!r}." for answer in greedy] and len(read) == 2
