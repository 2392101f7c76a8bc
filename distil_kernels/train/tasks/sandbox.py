"""Runs and judges programs that a model wrote, behind the walls of the kernel (`isolated`).

    run_python(program, stdin)      what a script prints
    SANDBOX.judge(job)              what tests say of an answer; a verdict formed by a judge's process

A server process is started by the first call and serves all of them; calls from several threads run at once, as many as
there are cores. A judge that hangs or dies is started again, with a new server; after three times `JudgeFailed` says
that this answer has no verdict, which is not the answer's fault.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from distil_kernels.train.tasks.isolated import wire
from distil_kernels.train.tasks.isolated.process import WALL_SHARE, Process, ServerGone
from distil_kernels.train.tasks.isolated.walls import Limits, Walls

__all__ = ["SANDBOX", "JudgeFailed", "Limits", "Run", "Sandbox", "in_parallel", "run_python"]

ATTEMPTS = 3
"""Judges that may hang or die over one answer."""
JUDGE_SECONDS = 20.0
"""Wall time of a judge beside that of the programs."""
WALLS = ("namespaces", "landlock", "seccomp")

_BOOT = """
import sys, types
folder, control, new_root, kinds = sys.argv[1:]
package = types.ModuleType("isolated")
package.__path__ = [folder]
sys.modules["isolated"] = package
from isolated import server
server.main(int(control), new_root, kinds.split())
"""
_ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
"""Of programs: threads cost address space, which is limited."""
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def cores() -> int:
    """Number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class JudgeFailed(RuntimeError):
    """An answer has no verdict: its judge hung or died each time. It is neither right nor wrong."""


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


class Sandbox:
    """A server of programs and judges, started when it is first needed.

    Args:
        kinds: the walls to put up, of WALLS; fewer are for tests.
    """

    def __init__(self, kinds: Sequence[str] = WALLS) -> None:
        self._kinds = kinds
        self._lock, self._slots = threading.Lock(), threading.Semaphore(cores())
        self._server: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._walls = Walls(False, 0, False, 0)
        self.is_unsafe_allowed = False
        """The user does without walls (--unsafe_sandbox)."""
        self._has_warned = False

    def walls(self) -> Walls:
        """The walls of this machine; the server runs afterwards.

        Raises:
            ValueError: there are too few, and `is_unsafe_allowed` is False.
        """
        self._running()
        return self._walls

    def judge(self, job: dict[str, Any]) -> dict[str, Any]:
        """A judge's verdict on `job` (see `isolated.judge`).

        Raises:
            JudgeFailed: no judge lived to give one.
        """
        seconds = WALL_SHARE * job["problem_seconds"] + JUDGE_SECONDS
        with self._slots:
            for _ in range(ATTEMPTS):
                server = self._running()
                with contextlib.suppress(ServerGone, EOFError, wire.NotPlain, BrokenPipeError, ConnectionResetError):
                    return self._judged(server, job, seconds)
                self._restart_if_ended()
        raise JudgeFailed(f"no judge lived through an answer's {job['kind']} tests, {ATTEMPTS} times")

    def _judged(self, server: socket.socket, job: dict[str, Any], seconds: float) -> dict[str, Any]:
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                process = Process(server, "judge", [theirs.fileno(), server.fileno()])
            try:
                wire.send(ours.fileno(), job)
                return dict(wire.receive(ours.fileno(), wait=lambda: wire.is_readable(ours.fileno(), seconds)))
            finally:
                process.close()

    def _running(self) -> socket.socket:
        with self._lock:
            if self._server is None:
                self._start()
            assert self._server is not None
            return self._server

    def _start(self) -> None:
        if sys.platform != "linux":
            raise ValueError("[task] programs of a model are run on Linux only")
        control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        folder = Path(__file__).parent / "isolated"
        kept = {name: value for name, value in os.environ.items() if name == "LD_LIBRARY_PATH"}
        with theirs, tempfile.TemporaryDirectory(prefix="root-") as new_root:
            process = subprocess.Popen(
                [sys.executable, "-I", "-B", "-X", "utf8", "-c", _BOOT,
                 str(folder), str(theirs.fileno()), new_root, " ".join(self._kinds)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[theirs.fileno()], start_new_session=True,
                env=kept | _ENVIRONMENT, cwd="/",
            )  # fmt: skip
            assert process.stdout
            try:
                walls = Walls(*wire.receive(process.stdout.fileno()))
            except EOFError:
                raise RuntimeError(f"[task] the server of programs ended at once, code {process.wait()}") from None
        self._server, self._process, self._walls = control, process, walls
        if walls.are_enough:
            return
        about = "this machine offers neither Landlock nor namespaces, or no seccomp, to hold a model's programs off"
        if not self.is_unsafe_allowed:
            self._close()
            raise ValueError(
                f"[unsafe_sandbox] {about}: use another machine, or --unsafe_sandbox in a container of its own"
            )
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(f"{about}: they can read and change what this user can", stacklevel=4)

    def _restart_if_ended(self) -> None:
        with self._lock:
            if self._process is not None and self._process.poll() is not None:
                self._close()

    def _close(self) -> None:
        if self._process is not None:
            assert self._process.stdin and self._process.stdout and self._server
            self._server.close()
            self._process.stdout.close()
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
            self._process.wait()
        self._server = self._process = None

    def close(self) -> None:
        """Ends the server and every process of its."""
        with self._lock:
            self._close()

    def run(self, program: str, stdin: str = "", limits: Limits = Limits()) -> Run:  # noqa: B008  (immutable)
        """Runs `program` as a script that reads `stdin`; never raises for what the program does."""
        units = [["program.py", _sendable(program)]]
        job = {"kind": "run", "units": units, "stdin": stdin, "limits": limits, "problem_seconds": limits.seconds}
        result = self.judge(job)
        return Run(result["code"], result["output"], result["error"])


SANDBOX = Sandbox()
"""This process's; forks of this process share its server."""
atexit.register(SANDBOX.close)


def run_python(program: str, stdin: str = "", limits: Limits = Limits()) -> Run:  # noqa: B008  (immutable)
    """Runs `program` as a script that reads `stdin`, in this process's sandbox."""
    return SANDBOX.run(program, stdin, limits)


def in_parallel(function: Callable[[_Item], _Result], items: Iterable[_Item]) -> list[_Result]:
    """`function` of each item, for functions that wait for a sandbox: at once, as many as there are cores."""
    with ThreadPoolExecutor(cores()) as threads:
        return list(threads.map(function, items))


def _sendable(text: str) -> str:
    """Text without lone surrogates, which no source may hold."""
    return text.encode(errors="replace").decode()
