"""Runs a Python program that a model wrote: in a process of its own, in a folder of its own, with limits on everything.

    limits       wall and CPU seconds, memory, size of any file and of the output (setrlimit; the whole group is killed)
    refused      other processes, signals to them and their limits, sockets, foreign functions, files outside the folder
                 (those of the interpreter may be read): an audit hook, or a function in the place of one that CPython
                 does not audit, raises PermissionError, which the program sees as its error
    environment  empty; no user site-packages
    network      on Linux also a namespace without any, where the system lets this process make one

This holds off mistakes, which is what models make, and lazy mischief. It is no security boundary: a program that is
built to break out of CPython gets out, and a compiled package that is installed beside the trainer may write any file.
Run training on such tasks in a container or virtual machine of its own. `ctypes` has its data types and no functions:
sympy works with that, scipy does not.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import secrets
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000  # sched.h
_UNSHARE = ctypes.CDLL(None).unshare if sys.platform.startswith("linux") else None

_RUNNER = """
import _posixsubprocess, ctypes, os, posix, signal, sys, types
nonce = sys.argv.pop()
sys.orig_argv = sys.argv = ["program.py"]
folder = os.path.realpath(os.getcwd())
readable = tuple({os.path.realpath(path) + os.sep for path in (sys.prefix, sys.base_prefix, *sys.path) if path})
refused = ("socket.", "subprocess.", "ctypes.", "os.system", "os.fork", "os.exec", "os.posix_spawn", "os.spawn",
           "os.kill", "os.startfile", "pty.", "signal.pthread_kill", "resource.prlimit", "mmap.", "fcntl.", "syslog.",
           "os.setxattr", "os.removexattr", "sqlite3.", "sys.setprofile", "sys.settrace", "gc.", "code.__new__",
           "cpython.run")
not_audited = ("mkfifo", "mknod", "chroot", "sched_setaffinity", "sched_setparam", "sched_setscheduler", "setpriority",
               "setpgid", "pidfd_open", "pidfd_send_signal", "fork_exec")
# These reach files or memory in C. Those that are imported already, without their functions, stay.
not_imported = {"_ctypes", "_posixsubprocess", "posix", "readline", "_dbm", "_gdbm", "_posixshmem"}
AF_UNIX, coroutine = 1, types.coroutine.__code__
looks = {"open", "os.listdir", "os.scandir", "os.chdir"}
changes = {"os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.chown",
           "os.utime", "os.truncate", "shutil.rmtree", "shutil.move"}

written = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

def refusing(name):
    def refuse(*arguments, **named):
        raise PermissionError(f"{name} is not allowed here")
    return refuse

def inside(path):
    return (os.path.realpath(os.fspath(path)) + os.sep).startswith(folder + os.sep)

def hook(event, arguments):
    # asyncio needs two things that reach nothing: a socket.socketpair (connect, bind and sendto have their own events)
    # and a flag that types.coroutine sets.
    if event.startswith(refused) and not (
            event == "socket.__new__" and arguments[1] == AF_UNIX
            or event == "code.__new__" and sys._getframe(1).f_code is coroutine):
        raise PermissionError(f"{event} is not allowed here")
    if event == "import" and arguments[0] in not_imported:
        raise ImportError(f"{arguments[0]} is not allowed here")
    if event in looks or event in changes:
        for path in arguments[:2] if event in ("os.rename", "os.link", "os.symlink", "shutil.move") else arguments[:1]:
            if path is None or isinstance(path, int) and event in looks:
                continue
            path = f"/proc/self/fd/{path}" if isinstance(path, int) else os.fsdecode(path)
            writes = event in changes or event == "open" and (  # os.open has no mode, fopen in C no flags
                set(arguments[1] or "") & set("wax+") or arguments[2] & written)
            if inside(path) or not writes and (os.path.realpath(path) + os.sep).startswith(readable):
                continue
            raise PermissionError(f"{path} is outside of this program's folder")

units = []
for name in ("before.py", "program.py", "tests.py") if nonce else ("program.py",):
    with open(name) as file:
        units.append(compile(file.read(), name, "exec"))
for name in not_audited:
    for module in (os, posix, signal, _posixsubprocess):
        if hasattr(module, name):
            setattr(module, name, refusing(name))
for name in set(vars(ctypes)) - {"Array", "Structure", "Union", "alignment", "byref", "sizeof"}:
    if not name.startswith(("__", "c_")):
        delattr(ctypes, name)
del sys.modules["_ctypes"]
module = types.ModuleType("program" if nonce else "__main__")
sys.modules[module.__name__] = module
write = os.write
sys.addaudithook(hook)
for unit in units:
    exec(unit, vars(module))
write(1, nonce.encode())
"""


class Limits(NamedTuple):
    """Of one program."""

    seconds: float = 4.0
    """Wall time; CPU time is the same, rounded up."""
    memory_bytes: int = 512 * 2**20
    output_bytes: int = 2**16


class Run(NamedTuple):
    """What became of a program."""

    exit_code: int
    """0, the program's own, or minus the signal that ended it."""
    output: str
    error: str
    """Its traceback, or in words which limit it met; empty where it ended well."""

    @property
    def is_ok(self) -> bool:
        return self.exit_code == 0


def run_python(
    program: str,
    stdin: str = "",
    limits: Limits = Limits(),  # noqa: B008  (immutable)
    before: str = "",
    tests: str = "",
) -> Run:
    """Runs `program` as a script that reads `stdin`; never raises for what the program does.

    With `tests` it is a module, run after `before` and tested by what runs after it, each compiled by itself and all in
    one namespace. It ends well where the tests do: a program that exits has not passed them.
    """
    nonce = secrets.token_hex(16) if tests else ""
    with tempfile.TemporaryDirectory(prefix="program-") as name:
        folder = Path(name)
        for file, text in (("program.py", program), ("before.py", before), ("tests.py", tests)):
            (folder / file).write_text(text, errors="replace")
        (folder / ".stdin").write_text(stdin, errors="replace")
        with (
            (folder / ".stdin").open("rb") as source,
            (folder / ".stdout").open("wb") as out,
            (folder / ".stderr").open("wb") as err,
        ):
            process = subprocess.Popen(
                [sys.executable, "-I", "-B", "-c", _RUNNER, nonce],
                cwd=folder, stdin=source, stdout=out, stderr=err, env={}, start_new_session=True,
                preexec_fn=lambda: _confine(limits),
            )  # fmt: skip
            try:
                exit_code, late = process.wait(timeout=limits.seconds), False
            except subprocess.TimeoutExpired:
                exit_code, late = -signal.SIGKILL, True
            finally:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output = _text(folder / ".stdout", limits.output_bytes)
        error = _text(folder / ".stderr", limits.output_bytes)
    if late or exit_code in (-signal.SIGXCPU, -signal.SIGKILL):
        error = f"TimeoutError: the program ran longer than {limits.seconds:g} seconds"
    elif exit_code == -signal.SIGXFSZ or "[Errno 27]" in error:
        error = f"OSError: the program wrote more than {limits.output_bytes} bytes"
    elif exit_code == 0 and nonce not in output:
        exit_code, error = 1, "SystemExit: the program ended before its tests"
    said = "" if exit_code == 0 else _trimmed(error) or f"the program ended with code {exit_code}"
    return Run(exit_code, output.replace(nonce, ""), said)


def _confine(limits: Limits) -> None:
    """In the child, before the interpreter starts."""
    _leave_network()
    seconds = int(limits.seconds) + 1
    for limit, value in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, limits.memory_bytes),
        (resource.RLIMIT_FSIZE, limits.output_bytes),
        (resource.RLIMIT_NOFILE, 32),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))


def _leave_network() -> bool:
    """System calls only: this runs between fork and exec."""
    return _UNSHARE is not None and (_UNSHARE(_CLONE_NEWNET) == 0 or _UNSHARE(_CLONE_NEWUSER | _CLONE_NEWNET) == 0)


def _text(path: Path, size: int) -> str:
    try:
        with path.open("rb") as file:
            return file.read(size).decode(errors="replace")
    except OSError:  # the program removed its own files
        return ""


def _trimmed(error: str) -> str:
    """A traceback without the frames of the runner, at most its last dozen lines."""
    lines = [line for line in error.strip().splitlines() if 'File "<string>"' not in line]
    own = next((i for i, line in enumerate(lines) if line.startswith('  File "')), 0)
    return "\n".join(lines[own:][-12:])
