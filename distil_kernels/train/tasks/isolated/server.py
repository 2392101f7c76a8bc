"""The server: forks programs and judges from one warm interpreter that never read a model's text or a test.

A request is one datagram: a role, and descriptors, of which the first is a socket for the child's life. Over it go the
child's pid when it was forked and its exit status and CPU seconds when it ended; where the other side closes it, or
writes to it, the child is killed. The other descriptors are the child's. The server ends, and with it every child,
where its standard input does: with the trainer.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import socket
from collections.abc import Callable

from . import judge, program, wire
from .walls import (
    Walls,
    enter_namespaces,
    has_seccomp,
    landlock_version,
    restrict_server,
    thread_limit,
)

ROLES: dict[bytes, Callable[[Walls, list[int]], None]] = {b"program": program.main, b"judge": judge.main}
WARM = (
    "array", "bisect", "collections", "copy", "dataclasses", "datetime", "decimal", "fractions", "functools", "heapq",
    "io", "itertools", "json", "math", "operator", "os", "queue", "random", "re", "statistics", "string", "struct",
    "sys", "threading", "time", "traceback", "types", "typing",
)  # fmt: skip
"""Modules that programs import and that cost time."""


def main(control: int, new_root: str, kinds: list[str]) -> None:
    """Serves until standard input ends. Says first, on standard output, which walls there are.

    Args:
        control: the socket of requests.
        new_root: an empty folder.
        kinds: the walls that may be put up, of "namespaces", "landlock" and "seccomp".
    """
    for name in WARM:
        __import__(name)
    has_namespaces = "namespaces" in kinds and enter_namespaces(new_root)
    walls = Walls(
        has_namespaces,
        landlock_version() if "landlock" in kinds else 0,
        "seccomp" in kinds and has_seccomp(),
        thread_limit(has_namespaces),
    )
    restrict_server(walls)
    wire.send(1, walls)
    gc.collect()
    gc.freeze()  # a fork's collections do not touch, and so copy, what it shares with this process
    serve(socket.socket(fileno=control), walls)


def serve(control: socket.socket, walls: Walls) -> None:
    lives: dict[int, socket.socket] = {}  # by pid
    waking, woken = os.pipe()
    os.set_blocking(woken, False)
    signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    poll = select.poll()
    for descriptor in (0, control.fileno(), waking):
        poll.register(descriptor, select.POLLIN)
    while True:
        ready = {descriptor for descriptor, _ in poll.poll()}
        if 0 in ready:
            for pid in lives:
                os.kill(pid, signal.SIGKILL)
            return
        if waking in ready:
            os.read(waking, 4096)
            for pid, status, cpu in _ended():
                life = lives.pop(pid, None)
                if life is None:  # a judge's own child
                    continue
                with contextlib.suppress(KeyError):
                    poll.unregister(life)
                _tell(life, wire.ENDED.pack(os.waitstatus_to_exitcode(status), cpu))
                life.close()
        for pid, life in lives.items():
            if life.fileno() in ready:
                os.kill(pid, signal.SIGKILL)  # it is not reaped yet
                poll.unregister(life)
                with contextlib.suppress(ConnectionResetError):
                    life.recv(1)  # a socket closed over unread words loses those that it sent
        if control.fileno() in ready:
            role, descriptors, _, _ = socket.recv_fds(control, 16, 8)
            if not descriptors:  # nobody can ask any more
                poll.unregister(control)
                continue
            life = socket.socket(fileno=descriptors[0])
            pid = os.fork()
            if pid == 0:
                _be(role, descriptors[1:], walls)
            for descriptor in descriptors[1:]:
                os.close(descriptor)
            lives[pid] = life
            poll.register(life, select.POLLIN)
            _tell(life, wire.BORN.pack(pid))


def _ended() -> list[tuple[int, int, float]]:
    """Pid, status and CPU seconds of the children that ended."""
    ended: list[tuple[int, int, float]] = []
    while True:
        try:
            pid, status, usage = os.wait4(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if pid == 0:
            return ended
        ended.append((pid, status, usage.ru_utime + usage.ru_stime))


def _tell(life: socket.socket, words: bytes) -> None:
    with contextlib.suppress(OSError):  # nobody asks any more
        life.send(words, socket.MSG_DONTWAIT)


def _be(role: bytes, descriptors: list[int], walls: Walls) -> None:
    """In the child: never returns."""
    code = 70
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        kept = sorted(descriptors)
        for low, high in zip([2, *kept], [*kept, 2**16], strict=True):
            os.closerange(low + 1, high)
        ROLES[role](walls, descriptors)
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)
