"""The run's Accelerator (devices, precision, trackers), and whether the loss can run on its device."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import Accelerator

from distil_kernels import token_logprobs
from distil_kernels.train.config import Config
from distil_kernels.train.run import trackers


def make_accelerator(config: Config, directory: Path) -> Accelerator:
    """Returns the Accelerator of a run; TensorBoard writes into the run directory.

    Raises:
        ValueError: the tracker's package is not installed (accelerate would go on without it).
    """
    trackers.check_installed(config.tracker)
    return Accelerator(
        cpu=not torch.accelerator.is_available(),  # else accelerate overlooks the other processes that torchrun started
        mixed_precision="bf16" if _computes_in_bfloat16(config) else "no",
        log_with=None if config.tracker == "none" else config.tracker,
        project_dir=str(directory),
    )


def check_backend(name: str, accelerator: Accelerator) -> None:
    """Raises ValueError where a back end of the loss that is asked for by name does not run."""
    one = torch.zeros(1, 1, device=accelerator.device)
    try:
        with accelerator.autocast():
            token_logprobs(one, one, tokens=one[0].long(), backend=name)
    except RuntimeError as error:
        raise ValueError(f"[backend] expected one that runs here, got {name}: {error}") from error


def _computes_in_bfloat16(config: Config) -> bool:
    """Returns whether matrix products are in bfloat16; auto is bfloat16 on GPUs that have it, float32 elsewhere."""
    if config.precision == "auto":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return config.precision == "bfloat16"
