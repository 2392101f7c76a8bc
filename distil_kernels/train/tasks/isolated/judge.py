"""Judges one answer, in a process that holds the tests and never runs the model's code.

A job names its kind, the units of the answer's program, limits and tests; the reply says how many tests passed and what
happened in the first that did not:

    stdin    a program for each test: what it prints is compared with what it should print
    run      a program that no test judges: what it printed, and how it ended
    calls    one program; a function of it is called for each test and its result compared
    check    one program; the set's own test code runs here, with a proxy in the function's place
    plus     as calls, by EvalPlus's rules; what is right comes from the record's reference solution, which runs here

Comparisons are those of the public graders (LiveCodeBench's testing_util, APPS's, EvalPlus's).
"""

from __future__ import annotations

import ast
import builtins
import copy
import importlib
import math
import os
import resource
import signal
import socket
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from decimal import Decimal, DecimalException
from typing import Any, NoReturn

from . import wire
from .process import Program
from .walls import Limits, Walls, confine_judge

READ_SECONDS = 3.0
"""CPU time in which what a program sent must become a value."""
MEMORY_BYTES = 4 * 2**30
SHOWN, SHOWN_ERROR = 400, 2000
"""Characters of an input, output or value in a reply, and of an error."""


def main(walls: Walls, descriptors: list[int]) -> None:
    """Judges the job that comes over the first descriptor; the second is the server's socket of requests."""
    data, control = descriptors
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    os.close(nothing)
    job = wire.receive(data, 2**31)
    confine_judge(walls)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    sys.setrecursionlimit(10000)
    with socket.socket(fileno=control) as server:
        wire.send(data, KINDS[job["kind"]](job, server))


class Failure(Exception):
    """A test that is not passed; the arguments are the fields of the reply."""

    def __init__(self, **fields: str) -> None:
        super().__init__(fields)
        self.fields = fields


class ProgramEnded(BaseException):
    """The program died, ran out of time or sent no data; no test may catch it."""


class ProgramRaised(Exception):
    """The program raised an exception that tests need not know."""


RAISED = (
    ArithmeticError, IndexError, KeyError, LookupError, NotImplementedError, OverflowError, RecursionError,
    RuntimeError, TypeError, ValueError, ZeroDivisionError,
)  # fmt: skip
"""What a test may expect a program to raise. Others, StopIteration above all, would end a loop of the test's."""


# --- programs that read and print


def judge_stdin(job: dict[str, Any], server: socket.socket) -> dict[str, Any]:
    limits, left = Limits(*job["limits"]), job["problem_seconds"]
    tests = job["tests"]
    for number, (stdin, output) in enumerate(tests):
        limits = limits._replace(
            seconds=min(limits.seconds, left), output_bytes=max(limits.output_bytes, 2 * len(output.encode()) + 2**12)
        )
        with Program(server, job["units"], stdin, limits, is_script=True) as program:
            in_time = program.wait_for_end()
            left -= program.kill().seconds
            fields = {"input": stdin, "expected": output}
            error = _end_of_script(program, in_time)
            if error:
                return _reply(number, tests, fields | {"error": error, "got": program.output(1)})
            printed = program.output(1)
        if not (same_output(printed, output) or (job["is_lenient"] and almost_same_output(printed, output))):
            return _reply(number, tests, fields | {"got": printed})
        if left <= 0 and number + 1 < len(tests):
            return _reply(number + 1, tests, {"error": _late(job["problem_seconds"], "all tests together")})
    return _reply(len(tests), tests)


def _end_of_script(program: Program, in_time: bool) -> str:
    """Why a script did not end as it should; empty where it did."""
    if not in_time or program.kill().code == -signal.SIGXCPU:
        return _late(program.limits.seconds)
    try:
        has_raised = program.reply(0.1, 2**10)["has_raised"]
    except (EOFError, wire.NotPlain, TypeError, KeyError):
        return _death(program)
    return _death(program) if has_raised else ""


def _death(program: Program) -> str:
    code, error = program.kill().code, trimmed(program.output(2))
    if "[Errno 27]" in error or code == -signal.SIGXFSZ:
        return f"OSError: the program wrote more than {program.limits.output_bytes} bytes"
    if code < 0:
        return f"the program was ended by the signal {signal.Signals(-code).name}\n{error}".strip()
    return error or f"the program ended at once, with code {code}"


def _late(seconds: float, what: str = "the program") -> str:
    return f"TimeoutError: {what} ran longer than {seconds:g} seconds"


def same_output(printed: str, right: str) -> bool:
    """LiveCodeBench's rule: the same lines but for space around them; a line that differs, as the same decimals."""
    lines, right_lines = ([line.strip() for line in text.strip().split("\n")] for text in (printed, right))
    return len(lines) == len(right_lines) and all(map(_same_line, lines, right_lines))


def _same_line(line: str, right: str) -> bool:
    if line == right:
        return True
    try:
        return [Decimal(word) for word in line.split()] == [Decimal(word) for word in right.split()]
    except (DecimalException, ValueError):
        return False


def almost_same_output(printed: str, right: str) -> bool:
    """The rule of APPS and TACO: the same words, line by line, or numbers as near as numpy.allclose asks."""
    lines, right_lines = (
        [line.split() for line in text.strip().splitlines() if line.strip()] for text in (printed, right)
    )
    if len(lines) != len(right_lines) or any(len(a) != len(b) for a, b in zip(lines, right_lines, strict=True)):
        return False
    pairs = [pair for line in zip(lines, right_lines, strict=True) for pair in zip(*line, strict=True)]
    return all(word == other or _near(word, other) for word, other in pairs)


def _near(word: str, right: str) -> bool:
    try:
        value, expected = float(word), float(right)
    except ValueError:
        return False
    if word.lstrip("+-").isdigit() and right.lstrip("+-").isdigit():
        return int(word) == int(right)  # as floats 50000000000000000 and ...1 are one
    return abs(value - expected) <= 1e-8 + 1e-5 * abs(expected)


# --- functions


class Calls:
    """A program whose functions are called, and what its last call was."""

    def __init__(self, job: dict[str, Any], server: socket.socket) -> None:
        limits = Limits(*job["limits"])
        self._left, self._problem_seconds = job["problem_seconds"], job["problem_seconds"]
        self._limit = max(2**20, 4 * job.get("expected_bytes", 0))
        self.program = Program(server, job["units"], "", limits._replace(output_bytes=2**20), is_script=False)
        self.last: dict[str, str] = {}
        """Input and result, or error, of the last call."""
        self.error = ""
        """What the program raised last, with its traceback; or why it ended."""

    def start(self) -> None:
        """Runs the program's text."""
        self._reply()

    def ask(self, **request: Any) -> Any:
        self.program.send(request)
        return self._reply()

    def _reply(self) -> Any:
        limits = self.program.limits
        seconds, before = min(limits.seconds, self._left), wire.clock(self.program.pid)
        try:
            reply = self.program.reply(seconds, self._limit)
        except EOFError:
            self._end(self._why_it_ended(seconds))
        except wire.NotPlain as error:
            self._end(f"The program returned {error}.")
        self._left -= wire.clock(self.program.pid) - before
        if type(reply) is not dict:
            self._end("The program sent something that cannot be read.")
        if reply.get("raised") == "SystemExit":
            self._end("SystemExit: the program ended before its tests")
        if "raised" in reply:
            self.error = trimmed(str(reply.get("text")))
            kind = getattr(builtins, str(reply["raised"]), None)
            raise (kind if kind in RAISED else ProgramRaised)(self.error.rpartition("\n")[2])
        if "not_plain" in reply:
            self._end(f"The program returned {reply['not_plain']}.")
        return reply.get("value")

    def _why_it_ended(self, seconds: float) -> str:
        ended = self.program.ended(1.0)
        if ended is None or self.program.met_limit or ended.code == -signal.SIGXCPU:
            is_problems = seconds < self.program.limits.seconds
            return _late(self._problem_seconds, "all tests together") if is_problems else _late(seconds)
        if ended.code >= 0:
            return "SystemExit: the program ended before its tests"
        return _death(self.program)

    def _end(self, error: str) -> NoReturn:
        self.error = error
        raise ProgramEnded(error)

    def function(self, name: str, of_class: str = "") -> Callable[..., Any]:
        """A function of the program's, or a method of a new object of a class."""
        number = self.ask(do="name", name=of_class or name)
        if number is None:
            self._end(f"NameError: the program defines no {of_class or name}")
        if not of_class:
            return Remote(self, number, name, is_plain=True)
        made = self.ask(do="call", of=number, arguments=[], named={"dict": []}, is_plain=False)
        method = self.ask(do="attribute", of=made["held"], name=name)
        return Remote(self, method["held"], name, is_plain=True)

    def call(self, number: int, name: str, arguments: tuple, named: dict, is_plain: bool) -> Any:
        parts = [*map(shown, map(_repr, arguments)), *(f"{key}={shown(_repr(value))}" for key, value in named.items())]
        self.last = {"input": f"{name}({', '.join(parts)})"}
        self.error = ""
        reply = self.ask(
            do="call", of=number, is_plain=is_plain,
            arguments=wire.encode(arguments, held_number), named=wire.encode(named, held_number),
        )  # fmt: skip
        value = self.value(reply, name)
        if not is_plain and type(value) is not Remote and value is not None:
            # Else an answer's own `isclose` or `sorted_equal` would be the judge.
            self._end(
                f"The test takes what {name} of the program gives for a value, and only the function asked for may"
            )
        self.last["got"] = _repr(value)
        return value

    def value(self, data: Any, name: str) -> Any:
        try:
            with _read_in_time():
                return wire.decode(data, lambda number: Remote(self, number, name, is_plain=False))
        except (wire.NotPlain, MemoryError, OverflowError) as error:
            self._end(f"The program returned {error or 'too much'}.")

    def close(self) -> None:
        self.program.close()


@contextmanager
def _read_in_time() -> Iterator[None]:
    def late(number: int, frame: object) -> None:
        raise wire.NotPlain("something that takes too long to read")

    before = signal.signal(signal.SIGVTALRM, late)
    signal.setitimer(signal.ITIMER_VIRTUAL, READ_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _refuse(self: Remote, *arguments: object) -> NoReturn:
    raise ProgramEnded(f"{self._name} gave an object, which is no plain data")


class Remote:
    """An object in the program's process. It can be called, handed back and asked for attributes, and is equal to
    nothing: comparing it, or taking it for a value, fails the test."""

    def __init__(self, calls: Calls, number: int, name: str, is_plain: bool) -> None:
        for key, value in (("_calls", calls), ("_number", number), ("_name", name), ("_is_plain", is_plain)):
            object.__setattr__(self, key, value)

    _calls: Calls
    _number: int
    _name: str
    _is_plain: bool

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._calls.call(self._number, self._name, arguments, named, self._is_plain)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._calls.value(self._calls.ask(do="attribute", of=self._number, name=name), name)

    def __setattr__(self, name: str, value: Any) -> None:
        encoded = wire.encode(value, held_number)
        self._calls.ask(do="set", of=self._number, name=name, value=encoded)

    def __repr__(self) -> str:
        return f"<{self._name}>"

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __hash__ = _refuse  # type: ignore[assignment]
    __bool__ = __len__ = __iter__ = __getitem__ = __contains__ = __index__ = __int__ = __float__ = __str__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __abs__ = __neg__ = __round__ = __next__ = _refuse


def held_number(value: Any) -> int:
    if type(value) is Remote:
        return value._number
    raise wire.NotPlain(f"a test hands over an object of type {type(value).__name__}")


def judge_calls(job: dict[str, Any], server: socket.socket) -> dict[str, Any]:
    tests = [(wire.decode(arguments), wire.decode(right)) for arguments, right in job["tests"]]

    def run(calls: Calls, at: Callable[[int], None]) -> None:
        function = calls.function(job["function"], job["class"])
        for number, (arguments, right) in enumerate(tests):
            at(number)
            calls.last = {}
            result = function(*arguments)
            result = list(result) if type(result) is tuple else result  # LiveCodeBench: JSON has no tuples
            is_one = job["is_lenient"] and type(right) is list and len(right) == 1 and result == right[0]  # APPS
            if not (result == right or is_one):
                raise Failure(expected=_repr(right))

    return _judge(job, server, tests, run)


def judge_check(job: dict[str, Any], server: socket.socket) -> dict[str, Any]:
    tests = job["tests"]

    def run(calls: Calls, at: Callable[[int], None]) -> None:
        scope: dict[str, Any] = {"__name__": "tests"}
        exec(compile(job["before"], "before.py", "exec"), scope)
        scope[job["function"]] = calls.function(job["function"])
        sources = [compile(test, "tests.py", "exec") for test in tests]
        setup = compile(job["setup"], "setup.py", "exec")
        for name in sorted(set().union(*map(_names, [setup, *sources])) - set(scope) - set(vars(builtins))):
            if name in sys.stdlib_module_names:
                scope[name] = importlib.import_module(name)
                continue
            number = calls.ask(do="name", name=name)
            if number is not None:  # else an attribute's name, or the test's own
                scope[name] = Remote(calls, number, name, is_plain=False)
        exec(setup, scope)
        for number, (test, source) in enumerate(zip(tests, sources, strict=True)):
            at(number)
            calls.last = {}
            try:
                exec(source, scope)
            except AssertionError as error:
                raise Failure(**_assertion(error, test, calls)) from None

    return _judge(job, server, tests, run)


def _names(code: types.CodeType) -> set[str]:
    inner = [_names(part) for part in code.co_consts if isinstance(part, types.CodeType)]
    return set(code.co_names).union(*inner)


def _assertion(error: AssertionError, source: str, calls: Calls) -> dict[str, str]:
    """What a failed assertion says: its line, and what it compares the last result with."""
    trace = error.__traceback__
    frames = []
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "tests.py":
            frames.append((trace.tb_frame, trace.tb_lineno))
        trace = trace.tb_next
    frame, line = frames[-1]
    statement = next(
        (
            node
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.Assert) and node.lineno <= line <= (node.end_lineno or node.lineno)
        ),
        None,
    )
    fields = dict(calls.last)
    if statement is None:
        return fields
    fields["assertion"] = ast.unparse(statement.test)
    if str(error):
        fields["error"] = f"AssertionError: {error}"
    test = statement.test
    if isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], ast.Eq):
        for side in (test.comparators[0], test.left):
            if not any(isinstance(node, ast.Call) for node in ast.walk(side)):
                try:
                    expected = _repr(
                        eval(compile(ast.Expression(side), "tests.py", "eval"), frame.f_globals, frame.f_locals)
                    )
                except Exception:
                    continue
                if expected != fields.get("got"):
                    fields["expected"] = expected
                    break
    return fields


def judge_plus(job: dict[str, Any], server: socket.socket) -> dict[str, Any]:
    scope: dict[str, Any] = {"__name__": "reference"}
    exec(compile(job["reference"], "reference.py", "exec"), scope)
    tests = [wire.decode(arguments) for arguments in job["tests"]]

    def run(calls: Calls, at: Callable[[int], None]) -> None:
        function = calls.function(job["function"])
        for number, arguments in enumerate(tests):
            at(number)
            calls.last = {}
            right = scope[job["function"]](*copy.deepcopy(arguments))
            name, tolerance = job["function"], job["tolerance"]
            try:
                result = function(*arguments)
            except ProgramEnded:
                if name not in _NOT_NONE or "no plain data" not in calls.error:
                    raise
                result = True  # a match object: anything but None
            if not plus_equal(name, result, right, arguments, tolerance):
                raise Failure(expected=_repr(right))

    return _judge(job, server, tests, run)


# EvalPlus: functions whose results are compared as sets, or only with None, or with a second right answer.
_SETS = ("similar_elements", "find_char_long", "common_in_nested_lists", "extract_singly", "larg_nnum",
         "intersection_array", "find_dissimilar", "Diff")  # fmt: skip
_NOT_NONE = ("check_str", "text_match_three", "text_starta_endb")


def plus_equal(name: str, result: Any, right: Any, arguments: list[Any], tolerance: float) -> bool:
    """EvalPlus's rule for one result."""
    try:
        if name == "find_zero":
            return bool(abs(sum(c * math.pow(result, i) for i, c in enumerate(arguments[0]))) <= tolerance)
        if name in _SETS:
            return set(result) == set(right)
        if name in _NOT_NONE:
            return (result if type(result) is bool else result is not None) == (
                right is not None and right is not False
            )
        if result == right or name == "are_equivalent" or (name == "sum_div" and result == 0):
            return True
        if name == "surface_Area" and abs(result - _second_surface_area(*arguments)) <= tolerance:
            return True
        if name == "digit_distance_nums" and result == _second_digit_distance(*arguments):
            return True
        if tolerance == 0 and _is_floats(right):
            tolerance = 1e-6
        return tolerance != 0 and type(result) is type(right) and _all_near(result, right, tolerance)
    except (TypeError, ValueError, OverflowError):
        return False


def _is_floats(value: Any) -> bool:
    return isinstance(value, float) or (
        isinstance(value, (list, tuple)) and bool(value) and all(isinstance(item, float) for item in value)
    )


def _all_near(result: Any, right: Any, tolerance: float) -> bool:
    if isinstance(right, (list, tuple)):
        return len(result) == len(right) and all(_all_near(a, b, tolerance) for a, b in zip(result, right, strict=True))
    if result == right:
        return True
    return bool(abs(result - right) <= tolerance + 1e-7 * abs(right))


def _second_surface_area(base: float, height: float) -> int:
    """The height is the distance from the base to the apex."""
    return round(base**2 + 2 * base * math.sqrt((base / 2) ** 2 + height**2))


def _second_digit_distance(first: int, second: int) -> int:
    """Of numbers of as many digits, with zeros before the shorter one."""
    size = max(len(str(first)), len(str(second)))
    return sum(abs(int(a) - int(b)) for a, b in zip(str(first).zfill(size), str(second).zfill(size), strict=True))


def _judge(
    job: dict[str, Any],
    server: socket.socket,
    tests: list[Any],
    run: Callable[[Calls, Callable[[int], None]], None],
) -> dict[str, Any]:
    passed = 0

    def at(number: int) -> None:
        nonlocal passed
        passed = number

    calls = Calls(job, server)
    try:
        calls.start()
        run(calls, at)
    except Failure as failure:
        return _reply(passed, tests, calls.last | failure.fields)
    except ProgramEnded as error:
        return _reply(passed, tests, calls.last | {"error": str(error)})
    except Exception as error:
        # The program's own, or the tests' about what it returned: len(5).
        return _reply(passed, tests, calls.last | {"error": calls.error or f"{type(error).__name__}: {error}"})
    finally:
        calls.close()
    return _reply(len(tests), tests)


def run_script(job: dict[str, Any], server: socket.socket) -> dict[str, Any]:
    """Runs a script that nothing judges."""
    with Program(server, job["units"], job["stdin"], Limits(*job["limits"]), is_script=True) as program:
        in_time = program.wait_for_end()
        code = program.kill().code
        error = _end_of_script(program, in_time)
        if not error and code:
            error = trimmed(program.output(2)) or f"the program ended with code {code}"
        return {"code": code or int(bool(error)), "output": program.output(1), "error": error}


KINDS = {"run": run_script, "stdin": judge_stdin, "calls": judge_calls, "check": judge_check, "plus": judge_plus}


# --- replies


def _reply(passed: int, tests: list[Any], failure: dict[str, str] | None = None) -> dict[str, Any]:
    sizes = {"error": SHOWN_ERROR}
    cut = {name: shown(text, sizes.get(name, SHOWN)) for name, text in (failure or {}).items()}
    return {"passed": passed, "total": len(tests), "failure": cut if failure is not None else None}


def shown(text: str, size: int = SHOWN) -> str:
    """A text, or its beginning and how long it is."""
    text = text.strip("\n")
    return text if len(text) <= size else f"{text[:size]}... ({len(text)} characters)"


def trimmed(error: str) -> str:
    """A traceback, at most its last dozen lines, with what was left out said."""
    lines = error.strip().splitlines()
    if len(lines) <= 12:
        return "\n".join(lines)
    return "\n".join([f"... ({len(lines) - 11} lines)", *lines[-11:]])


def _repr(value: Any) -> str:
    try:
        return repr(value)
    except ValueError:  # an int of more digits than Python prints
        return f"<{type(value).__name__} with a very large int>"
