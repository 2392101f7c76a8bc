"""Mathematics and multiple choice as the public graders judge them, and the public sets' records as they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from answer_tables import AIME, CHOICES, FOUR, GPQA, GSM8K, HMMT, MATHEMATICS, MMLU_PRO, SCIENCE, TEN

from distil_kernels.train.tasks import make_task
from distil_kernels.train.tasks.answers import chosen
from distil_kernels.train.tasks.expressions import is_equal


def test_mathematics_is_judged_as_in_the_table() -> None:
    task = make_task("math", seed=0)
    assert len(MATHEMATICS) >= 40
    verdicts = {(right, answer): task.score(answer, right) for right, answer, _, _ in MATHEMATICS}
    assert verdicts == {(right, answer): verdict for right, answer, verdict, _ in MATHEMATICS}


def test_the_tables_public_verdicts_are_those_of_math_verify() -> None:
    rows = [(right, answer, public) for right, answer, _, public in MATHEMATICS if public is not None]
    found = [int(is_equal(f"\\boxed{{{right}}}", f"\\boxed{{{answer}}}")) for right, answer, _ in rows]
    assert found == [public for _, _, public in rows]


@pytest.mark.parametrize("rows", [AIME, HMMT, GSM8K], ids=["AIME", "HMMT", "GSM8K"])
def test_a_sets_answers_are_judged_as_in_its_table(rows: list[tuple]) -> None:
    task = make_task("math", seed=0)
    assert len(rows) >= 40
    found = [(row, task.score(row[1], row[0])) for row in rows]
    assert not [(row, score) for row, score in found if score != row[-1]]


@pytest.mark.parametrize(
    ("rows", "choices"), [(SCIENCE, CHOICES), (MMLU_PRO, TEN), (GPQA, FOUR)], ids=["SciKnowEval", "MMLU-Pro", "GPQA"]
)
def test_choices_are_read_as_in_their_table(rows: list[tuple], choices: dict[str, str]) -> None:
    assert len(rows) >= 40
    found = [(row, chosen(row[0], choices)) for row in rows]
    assert not [(row, label) for row, label in found if label != row[-1]]


def task_of(tmp_path: Path, domain: str, *records: dict[str, object]) -> object:
    file = tmp_path / "set.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return make_task(f"{domain}:{file}", seed=0)


@pytest.mark.parametrize(
    ("record", "right"),
    [
        ({"problem": "?", "level": "Level 1", "type": "Algebra", "solution": "so $\\boxed{\\frac{1}{2}}$."}, "0.5"),
        ({"problem": "?", "solution": "long", "answer": "12", "subject": "Algebra", "unique_id": "a"}, "\\boxed{12}"),
        ({"ID": "2024-I-1", "Problem": "?", "Solution": "long", "Answer": 204}, "204"),
        ({"problem_idx": 1, "problem": "?", "answer": "1-\\frac{2}{\\pi}", "problem_type": ["a"]}, "1 - 2/\\pi"),
        ({"question": "?", "answer": "48/2 = <<48/2=24>>24\n#### 1,272"}, "so 1272 eggs.\n#### 1272"),
    ],
    ids=["MATH", "MATH-500", "AIME", "HMMT", "GSM8K"],
)
def test_records_of_mathematics_are_read_as_they_are(tmp_path: Path, record: dict[str, object], right: str) -> None:
    task = task_of(tmp_path, "math", record)
    problem = task.problem(0)
    assert task.score(problem.answer, problem.entry) == task.score(right, problem.entry) == 1.0
    assert task.score("\\boxed{7}", problem.entry) == 0.0


def test_gsm8k_as_questions(tmp_path: Path) -> None:
    task = task_of(tmp_path, "qa", {"question": "?", "answer": "24 + 48 = 72\n#### 72"})
    problem = task.problem(0)
    for answer, score in (("72", 1), (problem.answer, 1), ("it is\n#### 72", 1), ("73", 0), ("", 0)):
        assert task.score(answer, problem.entry) == score


@pytest.mark.parametrize(
    ("record", "texts"),
    [
        (
            {
                "question": "?",
                "choices": {"text": ["x", "y"], "label": ["A", "B"]},
                "answerKey": "B",
                "type": "mcq-4-choices",
            },
            ["x", "y"],
        ),
        (
            {
                "question_id": 1,
                "question": "?",
                "options": ["x", "y", "N/A"],
                "answer": "B",
                "answer_index": 1,
                "src": "a",
            },
            ["x", "y"],
        ),
        (
            {"Question": "?", "Correct Answer": "y", "Incorrect Answer 1": "x", "Incorrect Answer 2": "z"},
            ["x", "y", "z"],
        ),
    ],
    ids=["SciKnowEval", "MMLU-Pro", "GPQA"],
)
def test_records_of_science_are_read_as_they_are(tmp_path: Path, record: dict[str, object], texts: list[str]) -> None:
    task = task_of(tmp_path, "science", record)
    problem = task.problem(0)
    assert sorted(problem.entry.texts.values()) == texts and problem.entry.texts[problem.answer] == "y"
    for answer, score in ((problem.answer, 1), (f"({problem.answer.lower()})", 1), ("y", 1), ("x", 0)):
        assert task.score(answer, problem.entry) == score


def test_choices_of_gpqa_stand_in_an_order_of_their_own(tmp_path: Path) -> None:
    records = [
        {"Question": f"{number}?", "Correct Answer": "y", "Incorrect Answer 1": "x", "Incorrect Answer 2": "z"}
        for number in range(40)
    ]
    task = task_of(tmp_path, "science", *records)
    assert {problem.answer for problem in task.all_problems} == {"A", "B", "C"}
    assert task.all_problems == task_of(tmp_path, "science", *records).all_problems


@pytest.mark.parametrize(
    ("domain", "record", "reason"),
    [
        ("math", {"problem": "?", "answer": ""}, "answer is empty"),
        ("qa", {"question": "?", "answer": " "}, "answer is empty"),
        (
            "science",
            {"question": "?", "choices": {"text": ["x"], "label": ["A"]}, "answerKey": ""},
            "answerKey is empty",
        ),
    ],
)
def test_records_without_an_answer_are_named(
    tmp_path: Path, domain: str, record: dict[str, object], reason: str
) -> None:
    with pytest.raises(ValueError, match=f"line 1: {reason}; .* no record of it can be used"):
        task_of(tmp_path, domain, record)
