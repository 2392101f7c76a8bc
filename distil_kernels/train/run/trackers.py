"""TensorBoard, Weights & Biases or Trackio beside metrics.jsonl, through accelerate."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from distil_kernels.train.config import Config


def accelerator(config: Config, directory: Path) -> Accelerator:
    """The run's accelerator; TensorBoard writes into the run directory.

    Raises:
        ValueError: the tracker's package is not installed (accelerate would go on without it).
    """
    if config.tracker != "none" and importlib.util.find_spec(config.tracker) is None:
        raise ValueError(f"[tracker] {config.tracker} is not installed: pip install {config.tracker}")
    return Accelerator(
        cpu=not torch.accelerator.is_available(),  # else accelerate overlooks the other processes that torchrun started
        mixed_precision="bf16" if _computes_in_bfloat16(config) else "no",
        log_with=None if config.tracker == "none" else config.tracker,
        project_dir=str(directory),
    )


def start(accelerator: Accelerator, config: Config, directory: Path) -> None:
    """Opens the tracker's run, named like the run directory where the tracker has names."""
    if config.tracker != "none":
        named = {config.tracker: {"name": directory.name}} if config.tracker in ("wandb", "trackio") else {}
        accelerator.init_trackers("distil_kernels", config=asdict(config), init_kwargs=named)


def log(accelerator: Accelerator, record: dict[str, Any]) -> None:
    """Numbers of a record of metrics.jsonl, as step/loss or evaluation/greedy."""
    numbers = {
        f"{record['kind']}/{name}": value
        for name, value in record.items()
        if isinstance(value, (int, float)) and name != "step"
    }
    accelerator.log(numbers, step=record["step"])


def _computes_in_bfloat16(config: Config) -> bool:
    if config.precision == "auto":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return config.precision == "bfloat16"
