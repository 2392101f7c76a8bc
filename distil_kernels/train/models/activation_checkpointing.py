"""Layers that keep only their input for the backward pass, which runs them again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def checkpoint_layers(model: PreTrainedModel) -> None:
    """Makes every layer keep only its input for the backward pass.

    transformers' own switch works in training mode only, where dropout would change the loss; this is the same on
    transformers' layers in evaluation mode. Not for passes with gradients that fill a cache. SmolLM2 in float32 over 4
    rows of 543 tokens: 0.85 GiB above weights and gradients instead of 3.23, 22 s instead of 17 on one Zen 5 core.

    Raises:
        ValueError: the model has no such layers.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(f"[gradient_checkpointing] transformers' {type(model).__name__} has no layers for it")
    for layer in layers:
        layer.forward = partial(_checkpointed, layer.forward)


def _checkpointed(forward: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
    """Runs a layer, by way of `checkpoint` only where a backward pass follows: a rollout has none.

    Nothing in a layer in evaluation mode is random, so no generator's state is kept.
    """
    if not torch.is_grad_enabled():
        return forward(*inputs, **options)
    return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False, **options)
