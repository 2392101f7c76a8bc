"""What a run says and writes as it goes: metrics.jsonl, rollouts.jsonl, the tracker, and warnings in words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from rich.console import Console

from distil_kernels.train.config import Config
from distil_kernels.train.run import checkpoint, health, trackers


class Journal:
    """Of the run in `directory`. Every process keeps the records; the main one alone writes and warns."""

    def __init__(self, config: Config, directory: Path, console: Console, accelerator: Accelerator) -> None:
        self._config, self._directory, self._console, self._accelerator = config, directory, console, accelerator
        self.records: list[dict[str, Any]] = []
        """Those of metrics.jsonl so far."""
        self._warned: set[str] = set()

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def add(self, record: dict[str, Any], rollouts: Sequence[dict[str, Any]]) -> None:
        """A step or an evaluation, and rollouts that it had."""
        self.records.append(record)
        if not self._accelerator.is_main_process:
            return
        checkpoint.append_lines(self._directory / "rollouts.jsonl", rollouts)
        checkpoint.append_lines(self._directory / "metrics.jsonl", [record])
        trackers.log(self._accelerator, record)
        for kind, text in health.warnings(self.records, self._config):
            if kind not in self._warned:
                self._warned.add(kind)
                self.say(f"warning: {text}")
