"""Weights, gradients, optimizer and teacher in shards on n processes (`--shard`; torch's FSDP2, `fully_shard`).

    no gradients    rollouts, critiques, teacher, evaluation: all layers are gathered once (`unsharded`), then read
    gradients       a layer is gathered when it is read, forward and backward, and its gradient is reduce-scattered

A sharded layer waits for all processes whenever it is read, so all must read it equally often. Without gradients the
number of forwards follows from the data (the longest rollout, rounds of tools, ways of reading), and a gather for each
token would be slow besides: hence `unsharded`. With gradients a micro-batch is one forward in every process: padded
rows are read (`reading.reader`), and the processes have equally many problems (`Processes.of`).

The head's weight goes into the loss without a forward of the model. It is a parameter of the model itself, not of a
layer, with the embeddings it may be tied to: FSDP gathers these when the body is entered (`split_sharded` has it
entered by way of the model) and leaves them so until the backward pass, where loss and embeddings have added to one
gradient. The gathered parameter is one object for the model's life, whose memory comes and goes.

State is saved in one piece (`state`): a checkpoint is that of an unsharded run.

Bytes of a process for P parameters: 16 P / n for weights, gradients and AdamW, 4 P / n for a frozen or ema teacher.
In addition, with gradients: embeddings and head of student and teacher, the student's gradient of them, and two layers.
Without: 4 P for the model that reads, in evaluations both student and teacher. 2 P more where products are in bfloat16,
whose copies of the weights autocast makes and caches. In main memory: all models in one piece at the start, and for the
main process when it saves, up to 16 P.

Left out: gathering in bfloat16; sharding while loading; packed rows with gradients but for flash-attn's; accelerate's
FSDP2, which accelerate 1.15 uses on GPUs and the like only (state.py), and so not on CPUs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

from distil_kernels.hf import CausalLM, Headless, split


def shard(models: Sequence[Any], accelerator: Accelerator) -> None:
    """Shards each parameter of the models over the processes; gradients are summed over them.

    Raises:
        ValueError: a model has no layers that transformers marks, or torch is too old.
    """
    if not hasattr(FSDPModule, "reset_iter_state"):
        raise ValueError(f"[shard] expected torch 2.13 or later, got {torch.__version__}")
    for model in models:
        if not _layers(model):
            raise ValueError(f"[shard] {type(model).__name__} has no layers of transformers' to gather one by one")
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for model in models:
        for layer in _layers(model):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh, reshard_after_forward=False)
        for part in _parts(model):
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)  # gloo knows no other


@contextmanager
def unsharded(*models: nn.Module) -> Iterator[None]:
    """A context in which this process has all weights of these models and reads them without the others.

    It is not for passes with gradients. Models and layers that have all their weights already are left alone.
    """
    gathered = [part for model in models for part in _parts(model) if _is_sharded(part)]
    for part in gathered:
        part.unshard()
        part.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for part in gathered:
            part.reshard()
            part.set_reshard_after_forward(part not in models, recurse=False)
            if part in models:
                part.reset_iter_state()  # else FSDP keeps a note of each forward until a backward


@contextmanager
def unsharded_heads(*models: nn.Module) -> Iterator[None]:
    """A context in which this process has all weights of the models' heads and embeddings."""
    gathered = [model for model in models if isinstance(model, FSDPModule)]
    for model in gathered:
        model.unshard()
    try:
        yield
    finally:
        for model in gathered:
            model.reset_iter_state()


def split_sharded(model: nn.Module) -> CausalLM:
    """Returns what `hf.split` does, of a model that may be sharded; to be called in `unsharded`.

    A sharded model's `weight` and `bias` have values in `unsharded`, in `unsharded_heads`, and from a forward to its
    backward.
    """
    parts = split(model)
    enters_by_model = isinstance(parts.body, Headless) or not isinstance(model, FSDPModule)
    return parts if enters_by_model else dataclasses.replace(parts, body=_Body(parts))


class _Body:
    """The body of a sharded model, called by way of the model, whose hooks gather the embeddings."""

    def __init__(self, parts: CausalLM) -> None:
        self.config, self.forward, self._model = parts.body.config, parts.body.forward, parts.model
        parts.model.call_body = parts.body.__call__
        register_fsdp_forward_method(parts.model, "call_body")

    def __call__(self, **kwargs: Any) -> Any:
        return self._model.call_body(**kwargs)


def full_tensor(tensor: Tensor) -> Tensor:
    """Returns the tensor in one piece, in all processes, which must all call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_shard(tensor: Tensor) -> Tensor:
    """Returns the part of the tensor that this process holds: all of it where it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _layers(model: nn.Module) -> list[nn.Module]:
    """Returns the layers that transformers marks."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def _parts(model: nn.Module) -> list[Any]:
    """Returns the model and its layers where they are sharded; an empty list where they are not."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _is_sharded(part: Any) -> bool:
    """Returns whether this process has a share of the part's weights now, and not all of them."""
    if hasattr(part, "get_output_embeddings"):
        return isinstance(part.get_output_embeddings().weight, DTensor)
    return isinstance(next(part.parameters()), DTensor)
