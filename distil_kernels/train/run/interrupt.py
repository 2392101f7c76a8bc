"""Ctrl-C as a request to stop after the step."""

from __future__ import annotations

import signal

from rich.console import Console


class Interrupt:
    """Turns the first Ctrl-C into a request; the second one is Python's own."""

    def __init__(self, console: Console) -> None:
        self.requested = False
        self._console = console

    def __enter__(self) -> Interrupt:
        self._before = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _on_signal(self, number: int, frame: object) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self._console.print("finishing this step, then writing the checkpoint (Ctrl-C again stops at once)")
