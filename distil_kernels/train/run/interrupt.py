"""Ctrl-C, SIGTERM and SIGHUP as a request to stop after the step."""

from __future__ import annotations

import signal
import time

from rich.console import Console

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Ctrl-C, what a scheduler or a spot machine sends before it takes the machine away, and a terminal that is closed."""
ONE_REQUEST = 1.0
"""Seconds; a Ctrl-C that follows sooner is the same one: torchrun passes on what the terminal sends to all."""


class Interrupt:
    """A context in which the first signal sets `requested`; a later Ctrl-C raises KeyboardInterrupt as usual."""

    def __init__(self, console: Console) -> None:
        self.requested = False
        self._console = console

    def __enter__(self) -> Interrupt:
        self._previous_handlers = {number: signal.getsignal(number) for number in SIGNALS}
        for number, handler in self._previous_handlers.items():
            # What nohup ignores stays ignored. A shell lets its background jobs ignore Ctrl-C, which kill may send.
            if handler is not signal.SIG_IGN or number == signal.SIGINT:
                signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _on_signal(self, number: int, frame: object) -> None:
        if not self.requested:
            self.requested, self._requested_at = True, time.monotonic()
            self._console.print("finishing this step, then writing the checkpoint (Ctrl-C again stops at once)")
        elif number == signal.SIGINT and time.monotonic() - self._requested_at > ONE_REQUEST:
            raise KeyboardInterrupt
