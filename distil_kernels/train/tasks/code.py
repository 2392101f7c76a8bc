"""Programming problems with tests, in the formats of the public sets; answers are run in `sandbox`.

    HumanEval       prompt, entry_point, test (defines check(candidate)), canonical_solution
    LiveCodeBench   question_content, starter_code, public_test_cases, private_test_cases: JSON lists of input, output,
                    testtype (stdin: a whole program; functional: a method of class Solution, a JSON argument a line)

An answer's code is its last fenced block, or all of it. Score 1 where every test passes, else 0. The trace is what a
programmer would see: the first test that fails, with the error or the wrong output. What stands in a HumanEval prompt
before the function that is asked for (imports, helpers) is there for every answer. Private tests that are compressed
cannot be read and are left out, which is said once.
"""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import NamedTuple

from distil_kernels.train.tasks.problem import Problem
from distil_kernels.train.tasks.records import Record, Records, text_field
from distil_kernels.train.tasks.sandbox import Limits, run_python

_SHOWN = 200
"""Characters of an input or output in a trace."""


class Case(NamedTuple):
    """One test."""

    stdin: str
    output: str | None
    """What must be printed; None where `tests` say it."""
    tests: str = ""
    """What runs after the answer's code."""
    before: str = ""
    """What runs before the answer's code."""
    header: str = ""
    """What the answer's code goes on from, unless that defines the function `defines` itself."""
    defines: str = ""


class Code(Records):
    """Records of either format; `trace` runs an answer."""

    def __init__(self, path: Path, seed: int, limits: Limits = Limits()) -> None:  # noqa: B008  (immutable)
        self._limits = limits
        super().__init__(path, _read, seed)

    def score(self, answer: str, entry: tuple[Case, ...]) -> float:
        return self.trace(answer, entry)[0]

    def trace(self, answer: str, entry: tuple[Case, ...]) -> tuple[float, str]:
        """1 and praise, or 0 and what happened in the first test that fails."""
        code = code_of(answer)
        if not code:
            return 0.0, "The answer holds no code."
        for number, case in enumerate(entry, 1):
            whole = code if _definition(case.defines, code) else case.header + code
            run = run_python(whole, case.stdin, self._limits, case.before, case.tests)
            title = f"Test {number} of {len(entry)} fails"
            if case.stdin:
                title += f" on the input\n{_cut(case.stdin)}"
            if not run.is_ok:
                return 0.0, f"{title}\n{run.error}"
            if case.output is not None and _words(run.output) != _words(case.output):
                return 0.0, f"{title}\nexpected output\n{_cut(case.output)}\ngot\n{_cut(run.output)}"
        return 1.0, f"All tests pass ({len(entry)})."


def code_of(answer: str) -> str:
    """The last fenced block, also one that was cut off, or the whole answer."""
    blocks = re.findall(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", answer, re.DOTALL | re.IGNORECASE)
    return (blocks[-1] if blocks else answer).strip("\n")


def _read(record: Record) -> Problem:
    if "entry_point" in record:
        prompt, name = text_field(record, "prompt"), text_field(record, "entry_point")
        before, header = _parts(prompt, name)
        case = Case("", None, f"{text_field(record, 'test')}\ncheck({name})", before, header, name)
        solution = str(record.get("canonical_solution") or "")
        whole = solution if f"def {name}" in solution else prompt + solution
        question = f"Complete this Python function.\n```python\n{prompt.rstrip()}\n```"
        return Problem(question, f"```python\n{whole.strip()}\n```" if solution else "", (case,), key=prompt)
    statement, starter = text_field(record, "question_content"), str(record.get("starter_code") or "")
    tests = _tests(record["public_test_cases"]) + _tests(record.get("private_test_cases") or [])
    if not tests:
        raise ValueError("public_test_cases is empty")
    metadata = record.get("metadata") or {}
    metadata = json.loads(metadata) if isinstance(metadata, str) else metadata
    cases = tuple(_case(test, metadata.get("func_name", "")) for test in tests)
    asks = (
        f"\nUse this header.\n```python\n{starter.rstrip()}\n```" if starter else "\nRead from standard input, print."
    )
    solution = str(record.get("solution") or "")
    answer = f"```python\n{solution.strip()}\n```" if solution else ""
    return Problem(f"Write a Python program.\n{statement}{asks}", answer, cases, key=statement)


def _parts(prompt: str, name: str) -> tuple[str, str]:
    """What of a prompt stands before the function that it asks for, where that is code, and the rest."""
    found = _definition(name, prompt)
    begin = found.start() if found else 0
    try:
        compile(prompt[:begin], "before.py", "exec")
    except SyntaxError:
        return "", prompt[begin:]
    return prompt[:begin], prompt[begin:]


def _definition(name: str, code: str) -> re.Match[str] | None:
    return re.search(rf"^(?:async )?def {re.escape(name)}\b", code, re.MULTILINE)


def _tests(field: object) -> list[Record]:
    if not isinstance(field, str):
        return list(field)  # type: ignore[call-overload]
    try:
        return json.loads(field)
    except ValueError:
        warnings.warn("compressed private_test_cases cannot be read and are left out", stacklevel=2)
        return []


def _case(test: Record, function: str) -> Case:
    if test.get("testtype", "stdin") == "stdin":
        return Case(test["input"], test["output"])
    if not function:
        raise ValueError("a functional test needs metadata with func_name")
    arguments = [json.loads(line) for line in test["input"].splitlines() if line.strip()]
    right = json.loads(test["output"])
    call = f"{function}({', '.join(map(repr, arguments))}) gave "
    tests = (
        f"found, right = Solution().{function}(*{arguments!r}), {right!r}\n"
        f"assert found == right, {call!r} + repr(found) + ', expected ' + repr(right)"
    )
    return Case("", None, tests, before="from typing import Any, Dict, List, Optional, Set, Tuple")


def _words(text: str) -> list[str]:
    return text.split()


def _cut(text: str) -> str:
    text = text.strip("\n")
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(text)} characters)"
