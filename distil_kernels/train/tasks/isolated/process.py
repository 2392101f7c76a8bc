"""A process forked by the server, as the one that asked for it sees it."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from . import wire
from .walls import Limits

WALL_SHARE = 2.0
"""Wall time that a program has for each second of CPU time: it may sleep, and other processes may run."""


class Ended(NamedTuple):
    """How a process ended."""

    code: int
    """Its exit code, or minus the signal that ended it."""
    seconds: float
    """CPU time."""


class ServerGone(RuntimeError):
    """The server does not answer."""


class Process:
    """One process of the server's; `close` ends it.

    Args:
        server: the socket of requests.
        role: "program" or "judge".
        descriptors: what the process gets; they stay open here.
    """

    def __init__(self, server: socket.socket, role: str, descriptors: Sequence[int]) -> None:
        self._life, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._ended: Ended | None = None
        try:
            with theirs:
                socket.send_fds(server, [role.encode()], [theirs.fileno(), *descriptors])
            self.pid = wire.BORN.unpack(self._words(wire.BORN.size))[0]
            """As the server's pid namespace has it."""
        except OSError as error:
            self._life.close()
            raise ServerGone(f"the server of programs is gone: {error}") from error

    def _words(self, size: int) -> bytes:
        try:
            words = self._life.recv(size)
        except ConnectionResetError:  # it ended while it was to be killed; its words are still there
            words = self._life.recv(size)
        if len(words) < size:
            self._life.close()
            raise ServerGone("the server of programs ended")
        return words

    def wait(self, until: int | None, seconds: float) -> bool:
        """Whether, within some seconds, the process ended or `until` (a descriptor) can be read."""
        waited = [self._life.fileno()] + ([] if until is None else [until])
        return bool(select.select(waited, [], [], max(0.0, seconds))[0])

    def ended(self, seconds: float = 0.0) -> Ended | None:
        """How it ended, where it does within some seconds."""
        if self._ended is None and self.wait(None, seconds):
            self._ended = Ended(*wire.ENDED.unpack(self._words(wire.ENDED.size)))
        return self._ended

    def kill(self) -> Ended:
        """Ends it, if it runs, and says how it ended."""
        if self._ended is None:
            with contextlib.suppress(OSError):
                self._life.send(b"k")
            self._ended = Ended(*wire.ENDED.unpack(self._words(wire.ENDED.size)))
        return self._ended

    def close(self) -> None:
        """Ends it without waiting."""
        self._life.close()


class Program(Process):
    """A model's program.

    Args:
        units: pairs of a name and source text, run one after the other in one namespace.
        stdin: what it reads.
        is_script: it runs as `__main__`; else it stays and answers what is sent.
    """

    def __init__(
        self, server: socket.socket, units: Sequence[Sequence[str]], stdin: str, limits: Limits, is_script: bool
    ) -> None:
        self.limits = limits
        self.met_limit = False
        """Whether it was killed because it ran too long."""
        self._data, theirs = socket.socketpair()
        self._files = [os.memfd_create(name) for name in ("stdin", "stdout", "stderr")]
        text = memoryview(stdin.encode(errors="replace"))
        while text:
            text = text[os.write(self._files[0], text) :]
        os.lseek(self._files[0], 0, os.SEEK_SET)
        with theirs:
            super().__init__(server, "program", [*self._files, theirs.fileno()])
        self.send({"units": units, "is_script": is_script, "limits": limits})

    def send(self, message: Any) -> None:
        """Sends a message; one that has ended reads nothing, and `reply` will say so."""
        with contextlib.suppress(OSError):
            wire.send(self._data.fileno(), message)

    def wait_for_end(self) -> bool:
        """Whether it ended within its limits."""
        return self._wait(None, *self._deadlines(self.limits.seconds))

    def reply(self, seconds: float, limit: int) -> Any:
        """Its next message, which may take it some CPU seconds.

        Raises:
            EOFError: it ended, or ran out of time (`met_limit`).
            NotPlain: as `wire.receive`.
        """
        deadlines, data = self._deadlines(seconds), self._data.fileno()
        return wire.receive(data, limit, lambda: self._wait(data, *deadlines) and wire.is_readable(data, 0))

    def _deadlines(self, seconds: float) -> tuple[float, float]:
        """Of its CPU clock and of the wall's."""
        return wire.clock(self.pid) + seconds, time.monotonic() + WALL_SHARE * seconds

    def _wait(self, until: int | None, cpu_deadline: float, wall_deadline: float) -> bool:
        while True:
            left = min(cpu_deadline - wire.clock(self.pid), wall_deadline - time.monotonic())
            if left <= 0:
                self.met_limit = True
                self.kill()
                return False
            if self.wait(until, left + 0.001):
                return True

    def output(self, stream: int) -> str:
        """What it wrote, 1 output, 2 errors; all of it only once it has ended."""
        return os.pread(self._files[stream], self.limits.output_bytes + 1, 0).decode(errors="replace")

    def close(self) -> None:
        super().close()
        self._data.close()
        for file in self._files:
            os.close(file)

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
