"""Programming problems of the public sets: every answer of the tables is judged as the public grader judges it."""

from __future__ import annotations

import json
from pathlib import Path

import code_tables as tables
import pytest

from distil_kernels.train.tasks.code import Code, code_of
from distil_kernels.train.tasks.sandbox import Limits, in_parallel

SETS = {
    "LiveCodeBench": (tables.LIVECODEBENCH_ANSWERS, tables.livecodebench_record),
    "HumanEval": (tables.HUMANEVAL_ANSWERS, lambda name: {"task_id": name, **tables.HUMANEVAL[name]}),
    "MBPP": (tables.MBPP_ANSWERS, lambda name: tables.MBPP[name]),
    "APPS": (tables.APPS_ANSWERS, tables.apps_record),
    "HumanEval+": (tables.HUMANEVAL_PLUS_ANSWERS, tables.evalplus_record),
    "MBPP+": (tables.MBPP_PLUS_ANSWERS, tables.evalplus_record),
}


@pytest.mark.parametrize("name", SETS)
def test_answers_are_judged_as_the_public_grader_judges_them(tmp_path: Path, name: str) -> None:
    answers, record = SETS[name]
    assert len(answers) >= 40
    problems = {}
    for problem in {row[0] for row in answers}:
        file = tmp_path / f"{problem.replace('/', '_')}.jsonl"
        file.write_text(json.dumps(record(problem)) + "\n")
        problems[problem] = Code(file, 0, Limits(seconds=1.0))

    def verdict(row: tuple) -> float:
        task = problems[row[0]]
        return task.score(f"```python\n{row[1]}\n```", task.problem(0).entry)

    verdicts = in_parallel(verdict, answers)
    different = [(row, found) for row, found in zip(answers, verdicts, strict=True) if found != row[-1]]
    assert not different


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("```python3\nprint(1)\n```", "print(1)"),
        ("```Python\nprint(1)\n```\nIt prints\n```\n1\n```", "print(1)"),
        ("```py\nprint(1)\n```\nRun it:\n```bash\npython a.py\n```", "print(1)"),
        ("```python\nprint(1)\n```\n```python\n>>> f(1)\n2\n```", "print(1)"),
        ("```\nprint(1)\n```\n```\n1\n```", "print(1)"),
        ("```\nprint(1)\n```\n```\n$ python a.py\n```", "print(1)"),
        ("```python\nprint(1)\n```\nbetter:\n```python\nprint(2)\n```", "print(2)"),
        ("```cpp\nint main() {}\n```\n```python\nprint(1)\n```", "print(1)"),
        ("```python\nprint(1)\n```\n```cpp\nint main() {}\n```", "print(1)"),
        ("~~~python\nprint(1)\n~~~", "print(1)"),
        ("````python\nprint('''```''')\n````", "print('''```''')"),
        ("1. do\n   ```python\n   print(1)\n   ```", "print(1)"),
        ("```python\nprint(1)", "print(1)"),
        ("```python\nprint(1)\n```python\nprint(2)\n```", "print(2)"),
        ("```{.python}\nprint(1)\n```", "print(1)"),
        ("print(1)", "print(1)"),
        ("```python\nx = (\n```", "x = ("),
        ("", ""),
    ],
)
def test_code_of_an_answer_is_its_last_block_of_python(answer: str, code: str) -> None:
    assert code_of(answer) == code


def test_a_block_that_defines_the_function_goes_before_one_that_calls_it() -> None:
    answer = "```python\ndef f(n): return n\n```\nFor example\n```python\nprint(f(3))\n```"
    assert code_of(answer, "f") == "def f(n): return n" and code_of(answer) == "print(f(3))"
