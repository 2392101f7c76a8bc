"""Programs that a model may write, hostile ones too: each ends in time, harms nothing, and says what happened."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from distil_kernels.train.tasks.sandbox import Limits, run_python

LIMITS = Limits(seconds=2.0)


def test_a_good_program() -> None:
    run = run_python("import math, re, json, collections\nprint(math.factorial(int(input())))", "5\n", LIMITS)
    assert run == (0, "120\n", "") and run.is_ok


@pytest.mark.parametrize(
    ("program", "error"),
    [
        ("while True: pass", "TimeoutError: the program ran longer than 2 seconds"),
        ("import time\ntime.sleep(60)", "TimeoutError"),
        ("import os\nwhile True: os.fork()", "PermissionError: os.fork"),
        ("x = 'a' * 10**10", "MemoryError"),
        ("while True: print('x' * 1000)", "OSError: the program wrote more than 65536 bytes"),
        ("open('big', 'wb').write(bytes(10**8))", "OSError: the program wrote more"),
        ("open('/etc/passwd').read()", "PermissionError: /etc/passwd is outside"),
        ("import os\nos.open('/etc/hostname', os.O_RDONLY)", "PermissionError"),
        ("import os\nos.listdir('/')", "PermissionError"),
        ("import os\nos.symlink('/etc/passwd', 'x')\nopen('x').read()", "PermissionError"),
        ("import sys\nopen(sys.prefix + '/x', 'w')", "PermissionError"),
        ("import os, sys\nos.open(sys.prefix + '/x', os.O_WRONLY | os.O_CREAT)", "PermissionError"),
        ("import socket\nsocket.socket()", "PermissionError: socket"),
        ("import urllib.request\nurllib.request.urlopen('http://localhost:1')", "not allowed"),
        ("import os\nos.kill(os.getppid(), 9)", "PermissionError: os.kill"),
        ("import subprocess\nsubprocess.run(['ls'])", "not allowed"),
        ("import os\nos.system('ls')", "PermissionError"),
        ("import ctypes\nctypes.CDLL(None).system(b'ls')", "has no attribute 'CDLL'"),
        ("import _ctypes", "not allowed"),
        ("import sys\ndel sys.modules['ctypes']\nimport ctypes", "not allowed"),
        ("import _posixsubprocess\n_posixsubprocess.fork_exec()", "PermissionError: fork_exec is not allowed"),
        ("import sys\ndel sys.modules['_posixsubprocess']\nimport _posixsubprocess", "not allowed"),
        ("import os\nos.truncate(os.__file__, 10**9)", "PermissionError"),
        ("import os\nos.fchmod(os.open(os.__file__, os.O_RDONLY), 0o644)", "PermissionError"),
        ("import os\nos.pidfd_open(os.getppid())", "PermissionError: pidfd_open"),
        ("import os\nos.sched_setaffinity(os.getppid(), {0})", "PermissionError: sched_setaffinity"),
        ("import posix\nposix.setpriority(posix.PRIO_PROCESS, 0, 1)", "PermissionError: setpriority"),
        ("import resource\nresource.prlimit(0, resource.RLIMIT_CPU, (1, 1))", "PermissionError: resource.prlimit"),
        ("import socket\nsocket.socket(socket.AF_UNIX).connect('/tmp/x')", "PermissionError: socket.connect"),
        ("import sys\nsys.exit(3)", "the program ended with code 3"),
        ("input()", "EOFError"),
        ("def f(n): return f(n)\nf(1)", "RecursionError"),
        ("hello world", "SyntaxError"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
    ],
)
def test_a_bad_program(program: str, error: str) -> None:
    began = time.perf_counter()
    run = run_python(program, "", LIMITS)
    assert not run.is_ok and error in run.error, run
    assert time.perf_counter() - began < 10
    assert len(run.error.splitlines()) <= 12 and "<string>" not in run.error and len(run.output) <= LIMITS.output_bytes


@pytest.mark.parametrize(
    "program",
    [
        "import sqlite3\nsqlite3.connect('{}').execute('create table a(b)')",
        "import readline\nreadline.write_history_file('{}')",
        "import os\nos.mkfifo('{}')",
        "import os\nos.mknod('{}')",
        "import os\nos.setxattr(os.path.dirname('{}'), 'user.a', b'b')",
        "import os\nos.removexattr(os.path.dirname('{}'), 'user.a')",
    ],
)
def test_nothing_outside_is_made(program: str, tmp_path: Path) -> None:
    run = run_python(program.format(tmp_path / "x"), "", LIMITS)
    assert "not allowed here" in run.error and not list(tmp_path.iterdir()) and not os.listxattr(tmp_path)


@pytest.mark.parametrize(
    "program",
    [
        "import asyncio\nasync def f(): await asyncio.sleep(0); return 'done'\nprint(asyncio.run(f()))",
        "import subprocess, multiprocessing, concurrent.futures, ctypes, numpy\nprint('done')",
        "import sympy\nx = sympy.Symbol('x')\nprint('done' if sympy.integrate(2 * x, x) == x**2 else '')",
        "import os\nos.truncate('program.py', 0)\nos.chmod(os.open('program.py', os.O_RDONLY), 0o600)\nprint('done')",
        "from dataclasses import dataclass\n@dataclass\nclass A:\n    n: 'int'\nprint('done' if A(1).n else '')",
    ],
)
def test_what_harms_nothing_is_allowed(program: str) -> None:
    assert run_python(program, "", Limits()) == (0, "done\n", "")


def test_its_own_folder_is_its_own_and_goes_away() -> None:
    run = run_python("import os\nopen('a', 'w').write('hi')\nprint(open('a').read(), os.getcwd())", "", LIMITS)
    said, folder = run.output.split()
    assert said == "hi" and not Path(folder).exists()


def test_the_environment_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_KEY", "hunter2")
    assert "hunter2" in str(os.environ)
    assert "hunter2" not in run_python("import os\nprint(os.environ)", "", LIMITS).output


def test_what_it_leaves_running_is_killed() -> None:
    """A thread that goes on keeps the process; the process does not outlive its time."""
    program = "import threading, time\nthreading.Thread(target=lambda: time.sleep(60)).start()"
    assert "TimeoutError" in run_python(program, "", LIMITS).error
