"""Ctrl-C as a request to stop after the step."""

from __future__ import annotations

import signal

from rich.console import Console


class Interrupt:
    """A context in which the first Ctrl-C sets `requested`; the second one raises KeyboardInterrupt as usual."""

    def __init__(self, console: Console) -> None:
        self.requested = False
        self._console = console

    def __enter__(self) -> Interrupt:
        self._previous_handler = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGINT, self._previous_handler)

    def _on_signal(self, number: int, frame: object) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self._console.print("finishing this step, then writing the checkpoint (Ctrl-C again stops at once)")
