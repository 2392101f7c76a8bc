"""Standard output that a run outlives: a terminal that is closed, or `| tee` that Ctrl-C ends first."""

from __future__ import annotations

import os
from typing import Any, TextIO


class LastingOutput:
    """A stream of which nothing is heard when it is gone: what it no longer takes goes nowhere."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            return self._lost(len(text))

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._lost(0)

    def _lost(self, length: int) -> int:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())  # with what the stream still holds, and for who writes past this class
        os.close(nowhere)
        return length
