"""The pages of a run, plot.svg and report.html, current while the run goes on."""

from __future__ import annotations

import time
from pathlib import Path

from distil_kernels.train.config import Config
from distil_kernels.train.report.chart import charts, plot
from distil_kernels.train.report.html import page
from distil_kernels.train.run.directory import write_text
from distil_kernels.train.run.json_lines import read_lines, with_nan

SECONDS = 30.0
"""Least time between two refreshments."""
SHARE = 0.01
"""Share of a run's time that they may take."""


class Pages:
    """The pages in a run's directory, which the main process alone writes."""

    def __init__(self, config: Config, directory: Path, is_main: bool) -> None:
        self._config, self._directory, self._is_main = config, directory, is_main
        self._next = time.perf_counter() + SECONDS

    def refresh(self) -> None:
        """Writes the pages unless they were written a short while ago."""
        if time.perf_counter() >= self._next:
            self.write()

    def write(self) -> None:
        """Writes the pages of the records so far.

        Raises:
            WriteError: the disk did not take them.
        """
        if not self._is_main:
            return
        began = time.perf_counter()
        config, directory = self._config, self._directory
        metrics, rollouts = (with_nan(read_lines(directory / f"{name}.jsonl")) for name in ("metrics", "rollouts"))
        if not metrics:
            return
        title = f"{config.task}, {config.objective}, {config.teacher} teacher"
        write_text(directory / "plot.svg", plot(charts(metrics), title), is_forced=False)
        write_text(
            directory / "report.html", page(config, directory.resolve().name, metrics, rollouts), is_forced=False
        )
        now = time.perf_counter()
        self._next = now + max(SECONDS, (now - began) / SHARE)
