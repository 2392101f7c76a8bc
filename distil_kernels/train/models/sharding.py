"""Weights, gradients, optimiser and teacher shared out among n processes (`--shard`; torch's FSDP2, `fully_shard`).

    no gradients    rollouts, critiques, teacher, evaluation: all layers gathered once (`whole`), then read at will
    gradients       a layer is gathered when it is read, forward and backward, and its gradient reduce-scattered

A sharded layer waits for all processes whenever it is read, so all must read it equally often. Without gradients the
number of forwards follows from the data (the longest rollout, rounds of tools, ways of reading), and a gather for each
token would be slow besides: hence `whole`. With gradients a micro-batch is one forward in every process: padded rows
are read (`reading.reader`), and the processes have equally many problems (`Processes.of`).

The head's weight goes into the loss without a forward of the model. It is a parameter of the model as a whole, with
the embeddings it may be tied to: FSDP gathers these when the body is entered (`take_apart` has it entered by way of the
model) and leaves them so until the backward pass, where loss and embeddings have added to one gradient. The gathered
parameter is one object for the model's life, whose memory comes and goes.

Bytes of a process for P parameters: 16 P / n for weights, gradients and AdamW, 4 P / n for a frozen or ema teacher.
Beside it, with gradients: embeddings and head of student and teacher, the student's gradient of them, and two layers.
Without: 4 P for the model that reads, in evaluations both student and teacher. 2 P more where products are in bfloat16,
whose copies of the weights autocast makes and keeps. In main memory: all models whole at the start, and for the main
process when it saves, up to 16 P: a checkpoint is that of an unsharded run.

Left out: gathering in bfloat16; sharding while loading; packed rows with gradients but for flash-attn's; accelerate's
FSDP2, which accelerate 1.15 takes up on GPUs and the like only (state.py), and so not on CPUs.
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
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from distil_kernels.hf import CausalLM, split


def shard(models: Sequence[Any], accelerator: Accelerator) -> None:
    """Leaves this process its share of each parameter; gradients are summed over processes.

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
        for module in model.modules():
            module.register_load_state_dict_pre_hook(_share_out)


@contextmanager
def unsharded(*models: nn.Module) -> Iterator[None]:
    """In it, this process has all weights of these models, and reads them without the others; not for gradients.

    For an unsharded model, and for parts that are whole already, it does nothing.
    """
    opened = [part for model in models for part in _parts(model) if _is_sharded(part)]
    for part in opened:
        part.unshard()
        part.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for part in opened:
            part.reshard()
            part.set_reshard_after_forward(part not in models, recurse=False)
            if part in models:
                part.reset_iter_state()  # else FSDP keeps a note of each forward until a backward


@contextmanager
def unsharded_heads(*models: nn.Module) -> Iterator[None]:
    """In it, this process has all of the heads' weights, and the embeddings'."""
    opened = [model for model in models if isinstance(model, FSDPModule)]
    for model in opened:
        model.unshard()
    try:
        yield
    finally:
        for model in opened:
            model.reset_iter_state()


def split_sharded(model: nn.Module, check: bool = True) -> CausalLM:
    """`split`, to be called in `whole`.

    A sharded model's `weight` and `bias` have their values there, in `whole_heads`, and from a forward to its backward.
    """
    parts = split(model, check)
    return dataclasses.replace(parts, body=_Body(parts)) if isinstance(model, FSDPModule) else parts


class _Body:
    """A sharded model's body, called by way of the model, whose hooks gather the embeddings."""

    def __init__(self, parts: CausalLM) -> None:
        self.config, self.forward, self._model = parts.body.config, parts.body.forward, parts.model
        parts.model.call_body = parts.body.__call__
        register_fsdp_forward_method(parts.model, "call_body")

    def __call__(self, **kwargs: Any) -> Any:
        return self._model.call_body(**kwargs)


@torch.no_grad()
def gather_full(value: Any, keeps: bool = True) -> Any:
    """Whole tensors on the CPU in the place of shared ones, in nested dicts and lists; to be called by all processes.

    Args:
        keeps: else None takes a tensor's place: for processes that help but do not need them.
    """
    if isinstance(value, dict):
        return {name: gather_full(item, keeps) for name, item in value.items()}
    if isinstance(value, list):
        return [gather_full(item, keeps) for item in value]
    if not isinstance(value, DTensor):
        return value
    tensor: Tensor = value.full_tensor()
    return tensor.cpu() if keeps else None


def full_weights(model: nn.Module, keeps: bool = True) -> dict[str, Any] | None:
    """As `full`, the model's state; None for an unsharded one."""
    if not isinstance(model, FSDPModule):
        return None
    named = model.state_dict(keep_vars=True)
    values = gather_full({id(weight): weight for weight in named.values()}, keeps)  # a tied one once
    return {name: values[id(weight)] for name, weight in named.items()}


def shard_like(shared: Tensor, value: Tensor) -> Tensor:
    """The whole tensor `value` shared out as `shared` is."""
    if not isinstance(shared, DTensor):
        return value
    value = value.to(shared.device)
    return distribute_tensor(value, shared.device_mesh, shared.placements, src_data_rank=None)


def share_out_moments(state: dict[str, Any], trained: Sequence[nn.Parameter]) -> dict[str, Any]:
    """An optimiser's whole state for its shared parameters."""
    shared = {
        index: {name: shard_like(trained[index], value) if value.ndim else value for name, value in own.items()}
        for index, own in state["state"].items()
    }
    return {**state, "state": shared}


def local_shard(tensor: Tensor) -> Tensor:
    """This process's share."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _share_out(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Before a module loads whole tensors."""
    for name, parameter in module.named_parameters(prefix.removesuffix("."), recurse=False):
        if name in state:
            state[name] = shard_like(parameter, state[name])


def _layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def _parts(model: nn.Module) -> list[Any]:
    """The model and its layers; none of an unsharded one."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _is_sharded(part: Any) -> bool:
    if hasattr(part, "get_output_embeddings"):
        return isinstance(part.get_output_embeddings().weight, DTensor)
    return isinstance(next(part.parameters()), DTensor)
