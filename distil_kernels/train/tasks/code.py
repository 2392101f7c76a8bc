"""Programming problems with tests; an answer's program is judged by processes of the sandbox's.

Score 1 where every test passes, else 0. The trace is what a programmer would see: the first test that fails, with
input, expected and got, or the traceback's own lines; of a contest's private tests only what the contest would say,
unless `shows_private_tests`. Records are those of the public sets (`code_records`).
"""

from __future__ import annotations

import ast
import re
import warnings
from pathlib import Path
from typing import Any

from distil_kernels.train.tasks.code_records import Suite, definition, read
from distil_kernels.train.tasks.problem import Problem
from distil_kernels.train.tasks.records import Records
from distil_kernels.train.tasks.sandbox import SANDBOX, JudgeFailed, Limits, Sandbox, cores, in_parallel

PROBLEM_SECONDS = 60.0
"""CPU time of all tests of an answer."""
_LANGUAGE = re.compile(r"(?:i?python|py|pypy|sage)[\d.]*$", re.IGNORECASE)


class Code(Records):
    """Programming problems.

    Args:
        limits: of one test; a record's own time limit, where it is longer, takes the place of the time.
        sandbox: where programs run.
        shows_private_tests: a trace shows private tests as it shows public ones.

    Raises:
        ValueError: as Records, or programs cannot be run safely on this machine.
    """

    def __init__(
        self,
        path: Path,
        seed: int,
        limits: Limits = Limits(),  # noqa: B008  (immutable)
        sandbox: Sandbox = SANDBOX,
        shows_private_tests: bool = False,
        skips_bad: bool = False,
    ) -> None:
        self._limits, self._sandbox, self._shows_private_tests = limits, sandbox, shows_private_tests
        self._path, self._is_sound = path, dict[str, bool]()
        sandbox.walls()
        super().__init__(path, read, seed, skips_bad)

    def is_sound(self, index: int) -> bool:
        """Whether the reference solution of the `index`-th problem, where it has one, passes its tests.

        It is run when its problem is first asked for, with those of the problems that come next, on all cores: all of
        a large set at the start would take the better part of an hour on two cores (APPS trains on 5,000 problems with
        some 20 tests each). A problem whose solution fails is counted and named in `left_out` and in a warning.
        """
        if self.problem(index).key not in self._is_sound:
            ahead = {problem.key: problem for problem in map(self.problem, range(index, index + 2 * cores()))}
            unknown = [problem for key, problem in ahead.items() if key not in self._is_sound]
            for problem, reason in zip(unknown, in_parallel(self._fault, unknown), strict=True):
                self._is_sound[problem.key] = not reason
                if reason:
                    self._leave_out(problem, reason)
        return self._is_sound[self.problem(index).key]

    def _fault(self, problem: Problem) -> str:
        """What is wrong with a problem's reference solution; empty where nothing is, or no judge lived to say it."""
        try:
            score, text = self.trace(problem.answer, problem.entry) if problem.answer else (1.0, "")
        except JudgeFailed:
            return ""
        return "" if score >= 1.0 else f"its reference solution fails its tests: {' '.join(text.split())}"

    def _leave_out(self, problem: Problem, reason: str) -> None:
        self.left_out.append(f"{self.places[self.all_problems.index(problem)]}: {reason}")
        warnings.warn(
            f"{self._path}, {self.left_out[-1]}; left out, with {len(self.left_out) - 1} records before", stacklevel=2
        )

    def state_dict(self) -> dict[str, Any]:
        """Which reference solutions have passed their tests so far, and which records were left out."""
        return {"is_sound": dict(self._is_sound), "left_out": list(self.left_out)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._is_sound.update(state["is_sound"])
        self.left_out[:] = state["left_out"]  # in place: the list is also that of the held-out problems

    def score(self, answer: str, entry: Suite) -> float:
        return self.trace(answer, entry)[0]

    def trace(self, answer: str, entry: Suite) -> tuple[float, str]:
        """1 and praise, or 0 and what happened in the first test that fails.

        Raises:
            JudgeFailed: the answer has no verdict.
        """
        code = code_of(answer, entry.defines)
        if not code.strip():
            return 0.0, "The answer holds no code."
        limits = self._limits._replace(seconds=max(self._limits.seconds, entry.seconds))
        job = {
            "kind": entry.kind,
            "tests": entry.tests,
            "units": units(code, entry),
            "limits": limits,
            "problem_seconds": max(PROBLEM_SECONDS, limits.seconds),
            **entry.settings,
        }
        if entry.kind == "calls":
            job["class"] = "Solution" if definition("Solution", code) else ""
        result = self._sandbox.judge(job)
        if result["failure"] is None:
            return 1.0, f"All tests pass ({result['total']})."
        is_shown = self._shows_private_tests or entry.num_public is None or result["passed"] < entry.num_public
        return 0.0, _told(entry.kind, result, is_shown)


def units(code: str, suite: Suite) -> list[list[str]]:
    """The answer's program, and what runs before it."""
    is_whole = not suite.header or definition(suite.defines, code)
    program = code if is_whole else suite.header + code
    return [["before.py", suite.before], ["program.py", program.encode(errors="replace").decode()]]


def code_of(answer: str, defines: str = "") -> str:
    """The code of an answer: its last block of Python; else its last block that is a program; else all of it.

    Of blocks, one that compiles and does something comes before one that does not (a run that is shown, an output), and
    one that defines `defines` before all.
    """
    blocks = _blocks(answer)
    python = [text for language, text in blocks if _LANGUAGE.match(language)]
    candidates = python or [text for _, text in blocks]
    if not candidates:
        return answer.strip("\n")
    if defines:
        defining = [text for text in candidates if definition(defines, text)]
        candidates = defining or candidates
    return next((text for text in reversed(candidates) if _is_program(text)), candidates[-1])


def _blocks(answer: str) -> list[tuple[str, str]]:
    """Language and text of each fenced block, also of a last one that is not closed."""
    blocks: list[tuple[str, list[str]]] = []
    fence = indent = ""
    for line in answer.splitlines():
        match = re.match(r"([ \t]*)(`{3,}|~{3,})[ \t]*([^\s`]*)", line)
        if match and (not fence or match[2].startswith(fence)):
            opens = not fence or bool(match[3])
            fence, indent = (match[2], match[1]) if opens else ("", "")
            if opens:
                blocks.append((match[3].strip("{}."), []))
        elif fence:
            blocks[-1][1].append(line.removeprefix(indent))
    return [(language, "\n".join(lines).strip("\n")) for language, lines in blocks]


def _is_program(text: str) -> bool:
    """Whether a text compiles and does something: `42` compiles too."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    calls = (ast.Call, ast.Await)
    return any(
        not isinstance(node, ast.Expr) or any(isinstance(part, calls) for part in ast.walk(node)) for node in tree.body
    )


def _told(kind: str, result: dict[str, Any], is_shown: bool) -> str:
    failure, title = result["failure"], f"Test {result['passed'] + 1} of {result['total']} fails"
    error, got, expected, called = (failure.get(name) for name in ("error", "got", "expected", "input"))
    if not is_shown:
        return f"{title}, which is private: {_verdict(error)}."
    if kind == "stdin":
        lines = [f"{title} on the input\n{called}" if called else title]
        return "\n".join([*lines, error or f"expected output\n{expected}\ngot\n{got}"])
    lines = [title]
    if "assertion" in failure:
        lines.append(f"AssertionError: assert {failure['assertion']}")
    if called and got is not None:
        lines.append(f"{called} gave {got}" + (f", expected {expected}" if expected is not None else ""))
    elif called:
        lines.append(f"in {called}")
    return "\n".join([*lines, *([error] if error else [])])


def _verdict(error: str | None) -> str:
    """What a contest says of a test that it does not show."""
    if not error:
        return "the answer is wrong"
    last = error.strip().splitlines()[-1]
    if last.startswith(("TimeoutError", "OSError: the program wrote", "the program ", "SystemExit", "The program ")):
        return last
    name = re.match(r"[\w.]+", last)
    return f"the program raised {name[0]}" if name else "the program failed"
