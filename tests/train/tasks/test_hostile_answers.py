# ruff: noqa: E501
"""Answers that go for their judge: each fools a grader that runs tests in the answer's process, and none scores here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from distil_kernels.train.tasks.code import Code
from distil_kernels.train.tasks.sandbox import Limits, Sandbox, in_parallel

EQUAL = "    def __eq__(self, other): return True\n    def __ne__(self, other): return False\n    __hash__ = None\n"
ANSWERS = {
    "equal to everything": f"class A:\n{EQUAL}def f(n): return A()",
    "an int that is equal": f"class A(int):\n{EQUAL}def f(n): return A(5)",
    "a str that is equal": f"class A(str):\n{EQUAL}def f(n): return A()",
    "a float that is equal": f"class A(float):\n{EQUAL}def f(n): return A()",
    "a list that is equal": f"class A(list):\n{EQUAL}def f(n): return A()",
    "a tuple that is equal": f"class A(tuple):\n{EQUAL}def f(n): return A()",
    "a dict that is equal": f"class A(dict):\n{EQUAL}def f(n): return A()",
    "a type that is equal": f"class M(type):\n{EQUAL}class A(metaclass=M): pass\ndef f(n): return A",
    "another class claimed": f"class A:\n    __class__ = int\n{EQUAL}def f(n): return A()",
    "a mock": "from unittest.mock import ANY\ndef f(n): return ANY",
    "reflected": "class A:\n    def __req__(self, o): return True\n    def __eq__(self, o): return o == o\ndef f(n): return A()",
    "exit of the process": "import os, sys\ndef f(n): print('PASSED', flush=True); os._exit(0)",
    "exit": "import sys\ndef f(n): print('PASSED'); sys.exit(0)",
    "at exit": "import atexit\ndef f(n): atexit.register(print, 'PASSED'); raise SystemExit(0)",
    "printed marker at once": "print('PASSED', flush=True)\ndef f(n): return None",
    "signal's default": "import signal, os\ndef f(n): print('PASSED', flush=True); os.kill(os.getpid(), signal.SIGALRM)",
    "thread": "import threading\nthreading.Thread(target=lambda: print('PASSED', flush=True)).start()\ndef f(n): return None",
    "patched print": "import builtins, sys\nreal = print\ndef f(n): real('PASSED', flush=True); sys.stdout = None; return None",
    "trace function": "import sys\ndef f(n):\n    def trace(frame, *a):\n        frame.f_trace_lines = True\n        return trace\n"
    "    print('PASSED', flush=True); sys.settrace(trace); return None",
    "display of the source": "import inspect, sys\ndef f(n):\n    try: text = inspect.getsource(sys._getframe(1))\n"
    "    except OSError: text = ''\n    print('PASSED'); return 5 if 'f(2)' in text else None",
    "stack walked for what is right": "import sys\ndef f(n):\n    frame = sys._getframe()\n    while frame:\n"
    "        for scope in (frame.f_locals, frame.f_globals):\n            if 'right' in scope: return scope['right']\n"
    "        frame = frame.f_back",
    "memory searched for what is right": "import gc\ndef f(n):\n    for o in gc.get_objects():\n"
    "        if isinstance(o, dict) and 'right' in o: return o['right']",
    "replaced module": "import sys, types\nm = types.ModuleType('math')\nm.isclose = lambda *a, **k: True\nsys.modules['math'] = m\n"
    "def f(n): print('PASSED'); return 0",
    "patched builtins": "import builtins\nbuiltins.isinstance = builtins.all = lambda *a: True\n"
    "builtins.len = lambda x: 1\ndef f(n): print('PASSED')",
    "patched AssertionError": "import builtins\nclass Quiet(Exception): pass\nbuiltins.AssertionError = SystemExit\n"
    "import atexit\natexit.register(print, 'PASSED')\ndef f(n): return None",
    "generator": "print('PASSED')\ndef f(n):\n    yield 5",
    "endless iterator": "import itertools\ndef f(n): print('PASSED'); return itertools.repeat(5)",
    "cycle": "def f(n):\n    a = []\n    a.append(a)\n    print('PASSED')\n    return a",
    "deep": "def f(n):\n    a = 5\n    for _ in range(10**5): a = [a]\n    print('PASSED')\n    return a",
    "huge": "def f(n):\n    print('PASSED')\n    return 'x' * (3 * 10**7)",
    "coroutine": "async def f(n): return 5\nprint('PASSED')",
    "writes to every descriptor": "import os\ndef f(n):\n    print('PASSED', flush=True)\n    for d in range(3, 64):\n"
    "        try: os.write(d, b'\\x0c' + bytes(7) + b'{\"value\": 7}')\n        except OSError: pass\n    return None",
    "endless length": "import os\ndef f(n):\n    print('PASSED', flush=True)\n    for d in range(3, 64):\n"
    "        try: os.write(d, b'\\xff' * 99)\n        except OSError: pass\n    return None",
    "silence": "import os\nos.closerange(3, 64)\nprint('PASSED', flush=True)\ndef f(n): return 5",
    "forged encoding": "import sys, json\nprint('PASSED')\nfor m in list(sys.modules.values()):\n"
    "    if hasattr(m, 'encode') and hasattr(m, 'NotPlain'): m.encode = lambda *a: {'set': [[1]]}\ndef f(n): return None",
    "colliding members": "p = 2**61 - 1\nprint('PASSED')\ndef f(n): return {k * p for k in range(3000)}",
    "stop of a loop": "def f(n): print('PASSED'); raise StopIteration",
    "keyboard": "def f(n): print('PASSED'); raise KeyboardInterrupt",
    "an exception like the test's": "class E(Exception):\n    def __str__(self): raise KeyError\ndef f(n): print('PASSED'); raise E",
}
"""Answers that print PASSED, or pass where tests run beside them."""

TESTS = "def check(f):\n    for n in (2, 3):\n        right = 2 * n + 1\n        assert f(n) == right, n\n"
NAIVE = "{answer}\n" + TESTS.replace("right = 2 * n + 1", "case = {'right': 2 * n + 1, 'n': []}; right = case['right']")
NAIVE += "check(f)\nprint('PASSED')\n"


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    sandbox = Sandbox()
    yield sandbox
    sandbox.close()


@pytest.fixture(scope="module")
def code_tasks(tmp_path_factory: pytest.TempPathFactory, sandbox: Sandbox) -> list[Code]:
    """The same problem as HumanEval, MBPP, EvalPlus, LiveCodeBench and APPS pose it."""
    prompt = "def f(n):\n    '''Twice n, and one.'''\n"
    functional = [
        {"input": "2", "output": "5", "testtype": "functional"},
        {"input": "3", "output": "7", "testtype": "functional"},
    ]
    right = "def f(n): return 2 * n + 1"
    records = [
        {"prompt": prompt, "entry_point": "f", "test": TESTS, "canonical_solution": "    return 2 * n + 1\n"},
        {"text": "?", "code": right, "test_list": ["assert f(2) == 5", "assert f(3) == 7"], "test_setup_code": ""},
        {"prompt": prompt, "entry_point": "f", "canonical_solution": "    return 2 * n + 1\n", "base_input": [[2]], "plus_input": [[3]], "atol": 0},
        {"question_content": "?", "starter_code": "def f(n):", "public_test_cases": functional, "metadata": {"func_name": "f"}},
        {"question": "?", "input_output": {"fn_name": "f", "inputs": [[2], [3]], "outputs": [[5], [7]]}, "starter_code": "def f(n):"},
    ]  # fmt: skip
    tasks = []
    for number, record in enumerate(records):
        file: Path = tmp_path_factory.mktemp("sets") / f"{number}.jsonl"
        file.write_text(json.dumps(record) + "\n")
        tasks.append(Code(file, 0, Limits(seconds=2.0), sandbox))
    return tasks


@pytest.mark.parametrize("name", ANSWERS, ids=lambda name: name.replace(" ", "_"))
def test_no_answer_fools_its_judge(sandbox: Sandbox, code_tasks: list[Code], name: str) -> None:
    answer = ANSWERS[name]
    for score, text in in_parallel(lambda task: task.trace(answer, task.problem(0).entry), code_tasks):
        assert score == 0.0 and len(text.splitlines()) >= 2, text
    run = sandbox.run(NAIVE.replace("{answer}", answer))
    assert "PASSED" in run.output, run.error


def test_right_answers_pass(code_tasks: list[Code]) -> None:
    for answer in ("def f(n): return 2 * n + 1", "import numpy\ndef f(n): return numpy.int64(2 * n + 1)"):
        assert (
            in_parallel(lambda task, answer=answer: task.score(answer, task.problem(0).entry), code_tasks) == [1.0] * 5
        )
