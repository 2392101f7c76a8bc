"""AdamW and the course of its learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from distil_kernels.train.config import Config


def make_optimizer(parameters: Sequence[nn.Parameter], config: Config) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)


def make_scheduler(optimizer: torch.optim.Optimizer, config: Config) -> LambdaLR:
    """torch's own, which counts batches; accelerate's takes a step for every process."""
    return LambdaLR(optimizer, partial(rate_share, config))


def rate_share(config: Config, step: int) -> float:
    """The share of the peak learning rate at a step, from 0.

    The first step of the warm-up has a share above 0; transformers' warm-ups begin with 0 and waste the batch.
    """
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    progress = min(1.0, (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps))
    if config.learning_rate_schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    return 1.0 - progress if config.learning_rate_schedule == "linear" else 1.0
