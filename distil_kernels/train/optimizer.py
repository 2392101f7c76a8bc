"""AdamW, the norm that gradients are clipped to, and the course of the learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.optim.lr_scheduler import LambdaLR

from distil_kernels.train.config import Config
from distil_kernels.train.models.sharding import full_tensor, local_shard


def make_optimizer(parameters: Sequence[nn.Parameter], config: Config) -> torch.optim.AdamW:
    """Returns AdamW; whole parameters and those in shards are groups of their own, for torch mixes them in no step."""
    groups = [{"params": group} for group in _by_placement(parameters)]
    return torch.optim.AdamW(groups, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float) -> float:
    """Scales gradients so that their norm is at most `max_norm`, and returns the norm that it was.

    Gradients may be whole or in shards, of which the norm is that of all processes' together.
    """
    grads = [[each.grad for each in group if each.grad is not None] for group in _by_placement(parameters)]
    norms = [full_tensor(get_total_norm(group)) for group in grads if group]
    norm = torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([local_shard(grad) for group in grads for grad in group], scale)
    return float(norm)


def _by_placement(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Returns the parameters that are whole, and those in shards; none of an empty list."""
    groups = [[each for each in parameters if isinstance(each, DTensor) is in_shards] for in_shards in (False, True)]
    return [group for group in groups if group]


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
