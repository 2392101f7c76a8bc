"""TensorBoard, Weights & Biases or Trackio beside metrics.jsonl, through accelerate."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from distil_kernels.train.config import Config


def check_installed(tracker: str) -> None:
    """Raises ValueError where the package of a tracker is not installed."""
    if tracker != "none" and importlib.util.find_spec(tracker) is None:
        raise ValueError(f"[tracker] {tracker} is not installed: pip install {tracker}")


def start(accelerator: Accelerator, config: Config, directory: Path) -> None:
    """Opens the tracker's run, named like the run directory where the tracker has names."""
    if config.tracker != "none":
        options = {config.tracker: {"name": directory.name}} if config.tracker in ("wandb", "trackio") else {}
        accelerator.init_trackers("distil_kernels", config=asdict(config), init_kwargs=options)


def log(accelerator: Accelerator, record: dict[str, Any]) -> None:
    """Logs the numbers of a record of metrics.jsonl, as step/loss or evaluation/greedy."""
    numbers = {
        f"{record['kind']}/{name}": value
        for name, value in record.items()
        if isinstance(value, (int, float)) and name != "step"
    }
    accelerator.log(numbers, step=record["step"])
