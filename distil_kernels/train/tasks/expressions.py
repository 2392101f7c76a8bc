"""Compares mathematical expressions with math-verify, in a process of its own: nothing else ends 9^{9^{9^{9}}}.

One process, which has imported math-verify, takes all comparisons, a line of JSON each way, and hands them to a fork of
its own, whose caches grow. While that compares, an alarm is set whose default action ends it, in C code too; the next
comparison then costs a new fork and no import (2 s). A process that dies is started again; after three times
`JudgeFailed` says that this answer has no verdict. The process runs none of the caller's main module, has a session
of its own, so that Ctrl-C does not reach it, and ends where its input does: with the caller.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import subprocess
import sys
import threading
import warnings

from distil_kernels.train.tasks.sandbox import ATTEMPTS, JudgeFailed

SECONDS = 5.0
"""CPU time of one comparison."""
MEMORY_BYTES = 2**31

_PROGRAM = """
import sys
seconds, memory_bytes, sys.path[:] = float(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
import json, logging, os, resource, signal
from math_verify import parse, verify
logging.disable()
signal.signal(signal.SIGPROF, signal.SIG_DFL)
replies, sys.stdout = sys.stdout, sys.stderr
resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
print("ready", file=replies, flush=True)

def serve(asked, answered):
    for line in open(asked, closefd=False):
        signal.setitimer(signal.ITIMER_PROF, seconds)
        right, found = (parse(text, parsing_timeout=None) for text in json.loads(line))
        is_equal = bool(found) and verify(right, found, timeout_seconds=None)
        signal.setitimer(signal.ITIMER_PROF, 0)
        os.write(answered, b"1" if is_equal else b"0")

child = 0
for line in sys.stdin:
    if not child:
        (asked, ask), (answer, answered) = os.pipe(), os.pipe()
        child = os.fork()
        if child == 0:
            os.close(ask)
            os.close(answer)
            try:
                serve(asked, answered)
            finally:
                os._exit(0)
        os.close(asked)
        os.close(answered)
    os.write(ask, line.encode())
    reply = os.read(answer, 1).decode()
    if not reply:
        os.close(ask)
        os.close(answer)
        os.waitpid(child, 0)
        child = 0
    print(reply or "late", file=replies, flush=True)
"""


class Worker:
    """The process, started by the first comparison, and again where something ended it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._owner = 0  # a fork has its parent's process, which it must not talk to

    def ask(self, right: str, found: str) -> str:
        """The process's reply; empty where it ended instead."""
        with self._lock:
            process, self._process = self._process, None  # back below, unless an interrupt leaves a reply unread
            if process is None or process.poll() is not None or self._owner != os.getpid():
                process, self._owner = _started(), os.getpid()
            assert process.stdin and process.stdout
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps([right, found]) + "\n")
                process.stdin.flush()
            reply = process.stdout.readline()
            self._process = process
            if not reply:
                self.close()
            return reply

    def close(self) -> None:
        """Ends the process."""
        process, self._process = self._process, None
        if process:
            with contextlib.suppress(BrokenPipeError), process:
                pass


def is_equal(right: str, found: str) -> bool:
    """Whether two texts with LaTeX in them are the same expression; not where that takes longer than SECONDS.

    Raises:
        JudgeFailed: no process lived to say so.
    """
    for _ in range(ATTEMPTS):
        reply = _WORKER.ask(right, found)
        if reply == "late\n":
            warnings.warn(f"an answer that could not be evaluated in {SECONDS:g} seconds is wrong", stacklevel=2)
        if reply:
            return reply == "1\n"
    raise JudgeFailed(f"no process lived to compare an answer with {right!r}, {ATTEMPTS} times")


def _started() -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, str(SECONDS), str(MEMORY_BYTES), *sys.path],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout
    if not process.stdout.readline():
        raise RuntimeError(f"[task] the process that compares expressions ended at once, with code {process.wait()}")
    return process


_WORKER = Worker()
atexit.register(_WORKER.close)
