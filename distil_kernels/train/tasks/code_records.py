"""Reads the records of the public sets of programming problems, as they are, into a question and a suite of tests.

HumanEval       prompt, entry_point, test (defines check(candidate)), canonical_solution; HumanEval+ alike
MBPP            text or prompt, code, test_list, test_setup_code or test_imports; MBPP+ has its test beside them
EvalPlus        prompt, entry_point, canonical_solution, base_input, plus_input, atol: its own files
LiveCodeBench   question_content, starter_code, public_test_cases, private_test_cases: JSON lists of input, output,
                testtype (stdin: a whole program; functional: a method of class Solution, a JSON argument a line);
                private ones are JSON, or that pickled, compressed and in base64
APPS, TACO      question, input_output (inputs, outputs, perhaps fn_name), solutions
"""

from __future__ import annotations

import ast
import base64
import builtins
import io
import json
import pickle
import re
import zlib
from typing import Any, NamedTuple

from distil_kernels.train.tasks.isolated import wire
from distil_kernels.train.tasks.problem import Problem
from distil_kernels.train.tasks.records import NotJudgeable, Record, text_field

_STARRED = (
    "string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random", "statistics", "itertools",
    "functools", "operator", "io", "sys", "json", "builtins", "typing",
)  # fmt: skip
PRELUDE = "\n".join(
    [f"from {name} import *" for name in _STARRED]
    + [f"import {name}" for name in _STARRED if name not in ("builtins", "typing")]
    + ["sys.setrecursionlimit(50000)"]
)
"""What LiveCodeBench puts before every answer."""


class Suite(NamedTuple):
    """The tests of a problem, and all else that a judge needs but the answer."""

    kind: str
    """Which of the judge's: stdin, calls, check, plus."""
    tests: list[Any]
    settings: dict[str, Any] = {}  # noqa: RUF012  (never changed)
    """Further fields of the job."""
    num_public: int | None = None
    """Tests that a contest would show, which come first; None: all."""
    before: str = ""
    """Code that runs before the answer's, as a unit of its own."""
    header: str = ""
    """Code that the answer goes on from, unless it defines the function `defines` itself."""
    defines: str = ""
    """Function or class that the answer must define."""
    seconds: float = 0.0
    """The record's own time limit for a test, where it has one that is longer than the sandbox's; else 0."""


def read(record: Record) -> Problem:
    """A problem of a record of any of the sets.

    Raises:
        NotJudgeable: it has no tests.
        KeyError, TypeError, ValueError: it is no such record.
    """
    if "base_input" in record:
        return _evalplus(record)
    if "test_list" in record:
        return _mbpp(record)
    if "entry_point" in record:
        return _humaneval(record)
    if "input_output" in record:
        return _apps(record)
    return _livecodebench(record)


def _fenced(code: str) -> str:
    return f"```python\n{code.strip(chr(10))}\n```" if code.strip() else ""


# --- HumanEval, MBPP, EvalPlus


def _humaneval(record: Record) -> Problem:
    prompt, name = text_field(record, "prompt"), text_field(record, "entry_point")
    before, header = _parts(prompt, name)
    test = text_field(record, "test")
    if not re.search(r"^\s*def check\b", test, re.MULTILINE):
        raise NotJudgeable("test defines no check")
    settings = {"function": name, "before": before, "setup": ""}
    suite = Suite("check", [f"{test}\ncheck({name})"], settings, None, before, header, name)
    return Problem(_complete(prompt), _fenced(_solution(record, prompt, name)), suite, key=prompt)


def _complete(prompt: str) -> str:
    return f"Complete this Python function.\n```python\n{prompt.rstrip()}\n```"


def _solution(record: Record, prompt: str, name: str) -> str:
    solution = str(record.get("canonical_solution") or "")
    return solution if not solution or definition(name, solution) else prompt + solution


def _parts(prompt: str, name: str) -> tuple[str, str]:
    """What of a prompt stands before the function that it asks for, where that is code, and the rest."""
    match = definition(name, prompt)
    begin = match.start() if match else 0
    try:
        compile(prompt[:begin], "before.py", "exec")
    except SyntaxError:
        return "", prompt[begin:]
    return prompt[:begin], prompt[begin:]


def definition(name: str, code: str) -> re.Match[str] | None:
    """Where a function or class is defined at the outermost level."""
    return re.search(rf"^(?:(?:async )?def|class) {re.escape(name)}\b", code, re.MULTILINE)


def _mbpp(record: Record) -> Problem:
    text, tests = text_field(record, "text", "prompt"), [str(test) for test in record["test_list"]]
    if not tests:
        raise NotJudgeable("test_list is empty")
    code = str(record.get("code") or "")
    name = _called(tests[0], code)
    imports = "\n".join(map(str, record.get("test_imports") or []))
    settings = {"function": name, "before": imports, "setup": str(record.get("test_setup_code") or "")}
    graded = (
        [str(record["test"])] if record.get("test") else [*tests, *map(str, record.get("challenge_test_list") or [])]
    )
    shown = "\n".join(tests)
    question = f"{text}\nYour code should pass these tests:\n```python\n{shown}\n```"
    return Problem(question, _fenced(code), Suite("check", graded, settings, defines=name), key=text)


def _called(test: str, code: str) -> str:
    """The function that a test is of: the first that it calls, before all one that the solution defines."""
    calls = [
        node.func.id
        for node in ast.walk(ast.parse(test))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    ]
    calls = [name for name in calls if not hasattr(builtins, name)]
    if not calls:
        raise NotJudgeable(f"no function is called in the test {test!r}")
    functions = [name for name in calls if re.search(rf"^def {re.escape(name)}\b", code, re.MULTILINE)]
    return (functions or calls)[0]


def _evalplus(record: Record) -> Problem:
    prompt, name = text_field(record, "prompt"), text_field(record, "entry_point")
    solution = str(record.get("canonical_solution") or "")
    inputs = [*record["base_input"], *(record.get("plus_input") or [])]
    if not (solution and inputs):
        raise NotJudgeable("canonical_solution is empty" if inputs else "base_input and plus_input are empty")
    reference = prompt + solution
    is_function = definition(name, prompt) is not None
    before, header = _parts(prompt, name) if is_function else ("", "")
    examples = _literal_arguments(str(record.get("assertion") or ""), name)
    tests = [wire.encode(_arguments(examples, values)) for values in inputs]
    settings = {"function": name, "reference": reference, "tolerance": float(record.get("atol") or 0)}
    question = _complete(prompt) if is_function else prompt.strip().strip('"').strip()
    answer = _fenced(reference if is_function else solution)
    return Problem(question, answer, Suite("plus", tests, settings, None, before, header, name), key=prompt)


def _literal_arguments(assertions: str, name: str) -> list[Any]:
    """The arguments of the first call of a function in assertions, which JSON has without their tuples."""
    try:
        tree = ast.parse(assertions)
    except SyntaxError:
        return []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name:
            try:
                return [ast.literal_eval(argument) for argument in node.args]
            except ValueError:
                return []
    return []


def _like(example: Any, value: Any) -> Any:
    """A value of JSON with tuples and sets where an example of the same kind has them."""
    if isinstance(value, list) and isinstance(example, (list, tuple, set)):
        members = list(example)
        nested = next((member for member in members if isinstance(member, (list, tuple, set, dict))), None)
        if len(members) != len(value):
            members = [nested] * len(value)
        items = [
            _like(member if isinstance(member, (list, tuple, set, dict)) else nested, item)
            for member, item in zip(members, value, strict=True)
        ]
        return type(example)(items) if value or type(example) is tuple else [] if type(example) is list else {}
    if isinstance(value, dict) and isinstance(example, dict):
        first = next(iter(example.values()), None)
        return {key: _like(first, item) for key, item in value.items()}
    return value


def _arguments(examples: list[Any], values: list[Any]) -> list[Any]:
    """The arguments of a test, as those of an example are: complex numbers are stored as text."""
    if len(examples) != len(values):
        return values
    return [
        _number(value, example) if isinstance(value, str) and isinstance(example, (int, float, complex)) else value
        for example, value in zip(examples, map(_like, examples, values), strict=True)
    ]


def _number(text: str, example: complex) -> complex:
    number = complex(text)
    return number if isinstance(example, complex) or number.imag else number.real


# --- LiveCodeBench, APPS, TACO


def _livecodebench(record: Record) -> Problem:
    statement, starter = text_field(record, "question_content"), str(record.get("starter_code") or "")
    public, private = test_cases(record["public_test_cases"]), test_cases(record.get("private_test_cases") or [])
    tests = public + private
    if not tests:
        raise NotJudgeable("public_test_cases is empty")
    metadata = record.get("metadata") or {}
    function = str((json.loads(metadata) if isinstance(metadata, str) else metadata).get("func_name") or "")
    if tests[0].get("testtype", "stdin") == "stdin":
        suite = _stdin_suite([(test["input"], test["output"]) for test in tests], len(public), is_lenient=False)
    else:
        if not function:
            raise ValueError("a functional test needs metadata with func_name")
        cases = []
        for test in tests:
            arguments = [json.loads(line) for line in str(test["input"]).split("\n") if line.strip()]
            cases.append((arguments, json.loads(test["output"])))
        suite = _calls_suite(cases, len(public), function, starter, is_lenient=False)
    asks = (
        f"\nUse this header.\n```python\n{starter.rstrip()}\n```" if starter else "\nRead from standard input, print."
    )
    return Problem(
        f"Write a Python program.\n{statement}{asks}", _fenced(str(record.get("solution") or "")), suite, key=statement
    )


def _stdin_suite(tests: list[tuple[str, str]], num_public: int | None, is_lenient: bool, seconds: float = 0.0) -> Suite:
    settings = {"is_lenient": is_lenient}
    return Suite("stdin", [list(test) for test in tests], settings, num_public, PRELUDE, seconds=seconds)


def _calls_suite(
    tests: list[tuple[list[Any], Any]], num_public: int | None, function: str, starter: str, is_lenient: bool,
    seconds: float = 0.0,
) -> Suite:  # fmt: skip
    settings = {"function": function, "is_lenient": is_lenient}
    encoded = [[wire.encode(arguments), wire.encode(right)] for arguments, right in tests]
    defines = "Solution" if "class Solution" in starter or not starter else function
    return Suite("calls", encoded, settings, num_public, PRELUDE, defines=defines, seconds=seconds)


def test_cases(field: object) -> list[Record]:
    """The tests of a field of LiveCodeBench's: a list, its JSON, or that pickled, compressed and in base64.

    Raises:
        NotJudgeable: it is none of these.
    """
    if not isinstance(field, str):
        return list(field)  # type: ignore[call-overload]
    try:
        return list(json.loads(field))
    except ValueError:
        pass
    try:
        return list(json.loads(_Strings(io.BytesIO(zlib.decompress(base64.b64decode(field)))).load()))
    except Exception as error:  # of any kind: a pickle may hold anything
        raise NotJudgeable(f"private_test_cases cannot be read: {type(error).__name__}: {error}") from None


class _Strings(pickle.Unpickler):
    """Reads a pickled string, and refuses whatever would call or import something."""

    def find_class(self, module: str, name: str) -> Any:
        raise ValueError(f"a pickle that asks for {module}.{name}, where a string was expected")

    def persistent_load(self, pid: Any) -> Any:
        raise ValueError("a pickle with a persistent id, where a string was expected")

    def load(self) -> str:
        value = super().load()
        if type(value) is not str:
            raise ValueError(f"a pickle of type {type(value).__name__}, where a string was expected")
        return value


def _apps(record: Record) -> Problem:
    question, starter = text_field(record, "question"), str(record.get("starter_code") or "")
    tests = _json(record["input_output"]) or {}
    inputs, outputs = tests.get("inputs") or [], tests.get("outputs") or []
    if not inputs or len(inputs) != len(outputs):
        raise NotJudgeable(f"input_output has {len(inputs)} inputs and {len(outputs)} outputs")
    solutions = _json(record.get("solutions") or "[]")
    limit = re.search(r"\d+(?:\.\d+)?", str(record.get("time_limit") or ""))
    seconds = float(limit[0]) if limit else 0.0
    function = str(tests.get("fn_name") or "")
    if function:
        suite = _calls_suite(list(zip(inputs, outputs, strict=True)), None, function, starter, True, seconds)
    else:
        pairs = [(_joined(stdin), _joined(output)) for stdin, output in zip(inputs, outputs, strict=True)]
        suite = _stdin_suite(pairs, None, True, seconds)
    asks = f"\nUse this header.\n```python\n{starter.rstrip()}\n```" if starter.strip() else ""
    asks = asks or ("" if function else "\nRead from standard input, print.")
    answer = _fenced(str(solutions[0])) if solutions else ""
    return Problem(f"Write a Python program.\n{question}{asks}", answer, suite, key=question)


def _json(field: Any) -> Any:
    return (json.loads(field) if field.strip() else None) if isinstance(field, str) else field


def _joined(lines: Any) -> str:
    return "\n".join(map(str, lines)) if isinstance(lines, list) else str(lines)
