"""The log of a run: records to metrics.jsonl, rollouts.jsonl and the tracker, sentences to the console."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from rich.console import Console

from distil_kernels.train.config import Config
from distil_kernels.train.run import health, trackers
from distil_kernels.train.run.json_lines import append_lines


class RunLog:
    """The log of the run in `directory`. Every process has the records; the main one alone writes and warns."""

    def __init__(self, config: Config, directory: Path, console: Console, accelerator: Accelerator) -> None:
        self._config, self._directory, self._console, self._accelerator = config, directory, console, accelerator
        self.records: list[dict[str, Any]] = []
        """The records of metrics.jsonl so far."""
        self._warned: set[str] = set()

    def print(self, text: str) -> None:
        """Prints a sentence as it is, without colours or markup."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def add(self, record: dict[str, Any], rollouts: Sequence[dict[str, Any]]) -> None:
        """Writes the record of a step or an evaluation and those of its rollouts, and warns of what they show."""
        self.records.append(record)
        if not self._accelerator.is_main_process:
            return
        append_lines(self._directory / "rollouts.jsonl", rollouts)
        append_lines(self._directory / "metrics.jsonl", [record])
        trackers.log(self._accelerator, record)
        for kind, text in health.warnings(self.records, self._config):
            if kind not in self._warned:
                self._warned.add(kind)
                self.print(f"warning: {text}")
