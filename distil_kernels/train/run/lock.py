"""One writer for a run directory: a lock that the main process holds as long as it lives.

    RUN/lock      locked by the kernel, which drops the lock with the process, however it ends;
                  its text names the owner, and is written anew every BEAT seconds

Network file systems carry the kernel's lock from one machine to another as far as they can. Where they do not, or where
there are no locks at all, the text says whether the owner lives: one that another machine left is watched for PATIENCE
seconds, and taken over if nothing is written in that time. What is compared are contents, not two machines' clocks.

The lock is POSIX's (`lockf`) and not `flock`'s: processes that the owner forks do not keep it when the owner is gone.
It is on one byte far behind the text, which anybody may then read where such locks are mandatory (SMB).
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LOCK = "lock"
BEAT = 5.0
"""Seconds between two signs of life."""
PATIENCE = 20.0
"""Seconds without one, after which an owner on another machine is taken for gone."""
SIZE = 512
"""Bytes of the text, whatever it says: it has its place when the disk is full, and nothing stays of a longer one."""
LOCKED_BYTE = 1 << 30
NOT_SUPPORTED = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}
"""What a file system without locks answers."""


class RunLock:
    """The lock of a run directory, which the constructor takes.

    Args:
        option: the option that asks for the directory, for the message.
        say: is told of a wait.

    Raises:
        ValueError: another process has the lock; names it and its machine.
    """

    def __init__(self, directory: Path, option: str, say: Callable[[str], None] = print) -> None:
        self._directory, self._option, self._say = directory, option, say
        self._owner = {**_this_machine(), "process": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        self._handle = self._opened()
        try:
            self._take()
        except BaseException:
            os.close(self._handle)
            raise
        self._is_released = threading.Event()
        self._pulse = threading.Thread(target=self._show_life, daemon=True)
        self._pulse.start()

    def moved(self, directory: Path) -> None:
        """Tells the lock that its directory has another name now."""
        self._directory = directory

    def release(self) -> None:
        """Gives the lock up and removes its file; a second call does nothing."""
        if self._is_released.is_set():
            return
        self._is_released.set()
        self._pulse.join()
        if self._is_in_place():
            (self._directory / LOCK).unlink()
        os.close(self._handle)

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def _opened(self) -> int:
        return os.open(self._directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_DSYNC, 0o644)

    def _take(self) -> None:
        self._lock_unless_left_alive()
        while not self._is_in_place():  # the owner before removed its file after this process had opened it
            os.close(self._handle)
            self._handle = self._opened()
            self._lock_unless_left_alive()
        self._write(beat=0)

    def _lock_unless_left_alive(self) -> None:
        is_carried, left = self._lock(), _text(self._handle)
        if left and not (is_carried and _owner(left).items() >= _this_machine().items()):
            self._watch(left)
            self._lock()  # reading the file anew has dropped the lock: POSIX's goes with any handle that is closed

    def _lock(self) -> bool:
        """Locks the file; returns False where the file system has no locks."""
        try:
            return _locked(self._handle)
        except BlockingIOError:
            raise self._held(_text(self._handle)) from None

    def _watch(self, left: str) -> None:
        """Waits PATIENCE seconds for a sign of life of the owner who left this text."""
        self._say(f"{self._directory} was left by {_named(left)}: watching for {PATIENCE:.0f} s whether it still lives")
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            time.sleep(min(1.0, PATIENCE))
            try:  # opened anew: a network file system may answer an open handle from its cache
                text = (self._directory / LOCK).read_text()
            except FileNotFoundError:  # the owner lived, and has ended
                return
            if text != left:
                raise self._held(text)

    def _show_life(self) -> None:
        beat = 0
        while not self._is_released.wait(BEAT):
            beat += 1
            try:
                self._write(beat)
                self._lock()  # dropped if anything in this process has opened and closed the file
            except (OSError, ValueError):  # a full disk, say: the lock stays
                pass

    def _write(self, beat: int) -> None:
        text = json.dumps({**self._owner, "beat": beat})
        os.pwrite(self._handle, text.encode().ljust(SIZE), 0)

    def _is_in_place(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._handle), os.stat(self._directory / LOCK))
        except FileNotFoundError:
            return False

    def _held(self, text: str) -> ValueError:
        return ValueError(
            f"[{self._option}] {self._directory} is in use by {_named(text)}: expected no other writer, stop that one "
            "first"
        )


def holder(directory: Path) -> str | None:
    """Returns which process has the lock of a run directory, in words; None where the kernel knows of none."""
    try:
        handle = os.open(directory / LOCK, os.O_RDWR)
    except OSError:
        return None
    try:
        _locked(handle)
    except BlockingIOError:
        return _named(_text(handle))
    finally:
        os.close(handle)
    return None


def _locked(handle: int) -> bool:
    """Locks a file; returns False where the file system has no locks.

    Raises:
        BlockingIOError: another process has the lock.
    """
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, LOCKED_BYTE)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise BlockingIOError from None
        if error.errno not in NOT_SUPPORTED:
            raise
        return False
    return True


def _text(handle: int) -> str:
    return os.pread(handle, SIZE, 0).decode(errors="replace")


def _this_machine() -> dict[str, Any]:
    """Returns the name of this machine, and an id of the kernel's start, which no other machine has."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return {"host": socket.gethostname(), "boot": boot.read_text().strip() if boot.exists() else ""}


def _owner(text: str) -> dict[str, Any]:
    """Returns the owner that a lock file names; an empty one where its text was cut short."""
    try:
        owner = json.loads(text)
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _named(text: str) -> str:
    owner = _owner(text)
    if not owner:
        return "another process"
    return f"process {owner.get('process')} on {owner.get('host')} (since {owner.get('since')})"
