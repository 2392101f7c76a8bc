"""A time limit of a function in this process, whatever it waits for or computes in Python.

A thread of the limit's sends this process a signal that nobody else uses, whose handler raises in the main thread. (A
judge may itself use SIGALRM, as math-verify does, and so stays in the main thread.)
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
from collections.abc import Iterator

SIGNAL = getattr(signal, "SIGRTMAX", signal.SIGUSR2)
AGAIN = 1.0
"""Seconds after which the signal is sent again, to a function that has caught what it raised."""


class TookTooLong(BaseException):
    """The function took longer than its limit. No Exception, which the function itself may catch."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """A context that TookTooLong leaves after `seconds`; without a limit outside of the main thread.

    Code that does not return to Python, in C, is not interrupted.
    """
    if seconds == math.inf or threading.current_thread() is not threading.main_thread():
        yield
        return
    is_done, main_thread = threading.Event(), threading.get_ident()

    def expire(number: int, frame: object) -> None:
        if not is_done.is_set():  # else the signal came as the function returned
            raise TookTooLong

    def watch() -> None:
        wait = seconds
        while not is_done.wait(wait):
            signal.pthread_kill(main_thread, SIGNAL)
            wait = AGAIN

    previous = signal.signal(SIGNAL, expire)
    watcher = threading.Thread(target=watch, daemon=True)
    try:
        watcher.start()
        try:
            yield
        finally:
            is_done.set()
    finally:
        is_done.set()  # again: the signal may have come before the line above
        watcher.join()  # no signal comes later
        signal.signal(SIGNAL, previous)
