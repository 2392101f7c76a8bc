"""Weights, gradients, optimizer and teacher in shards on n processes (`--shard`; torch's FSDP2, `fully_shard`).

    no gradients    rollouts, critiques, teacher, evaluation: all layers are gathered once (`unsharded`), then read
    gradients       a layer is gathered when it is read, forward and backward, and its gradient is reduce-scattered

A sharded layer waits for all processes whenever it is read, so all must read it equally often. Without gradients the
number of forwards follows from the data (the longest rollout, rounds of tools, ways of reading), and a gather for each
token would be slow besides: hence `unsharded`. With gradients a micro-batch is one forward in every process: padded
rows are read (`reading.reader`), and the processes have equally many problems (`Processes.of`).

The head's weight goes into the loss without a forward of the model. Head and embeddings, which may be tied, are one
group beside the layers. Where that is leaner (`exchanged_rows`) they stay in shards of the vocabulary, with gradients:
ids and hidden states of all processes are exchanged, the loss is that of all rows (`rows_exchanged`, `head_in_shards`).
Elsewhere FSDP gathers them when the body is entered (`split_sharded` has it entered by way of the model) and leaves
them so until the backward pass, where loss and embeddings have added to one gradient. The gathered parameter is one
object for the model's life, whose memory comes and goes.

State is saved in one piece (`state`): a checkpoint is that of an unsharded run.

Bytes of a process for P parameters: 16 P / n for weights, gradients and AdamW, 4 P / n for a frozen or ema teacher.
In addition, with gradients: two layers, and embeddings and head of student and teacher with the student's gradient of
them, or the rows that are exchanged. Without: 4 P for the model that reads, in evaluations both student and teacher.
2 P more where products are in bfloat16, whose copies of the weights autocast makes and caches. In main memory: all
models in one piece at the start, and for the main process when it saves, up to 16 P.

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

from distil_kernels.hf import CausalLM, Headless, output_head, split
from distil_kernels.train.models.exchanged_rows import looked_up


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
        fully_shard(_vocabulary(model), mesh=mesh, reshard_after_forward=False)
        fully_shard(model, mesh=mesh, reshard_after_forward=False)
        for part in _parts(model):
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)  # gloo knows no other


@contextmanager
def unsharded(*models: Any) -> Iterator[None]:
    """A context in which this process has all weights of these models and reads them without the others.

    It is not for passes with gradients. Models and layers that have all their weights already are left alone.
    """
    gathered = {model: [part for part in _parts(model) if _is_sharded(part)] for model in models}
    for parts in gathered.values():
        for part in parts:
            part.unshard()
            part.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for model, parts in gathered.items():
            layers = _layers(model)
            for part in parts:
                part.reshard()
                part.set_reshard_after_forward(part in layers, recurse=False)
            if parts:
                model.reset_iter_state()  # else FSDP keeps a note of each forward until a backward


@contextmanager
def unsharded_heads(model: Any) -> Iterator[None]:
    """A context in which this process has all weights of a model's head and embeddings."""
    is_sharded = isinstance(model, FSDPModule)
    if is_sharded:
        for module in _vocabulary(model):
            module.unshard()
    try:
        yield
    finally:
        if is_sharded:
            model.reset_iter_state()


@contextmanager
def rows_exchanged(lm: CausalLM) -> Iterator[None]:
    """A context in which a sharded model's embeddings and head stay in shards; it reads by `looked_up`."""
    assert isinstance(lm.body, _Body)
    lm.body.looks_up = True
    try:
        yield
    finally:
        lm.body.looks_up = False


def can_exchange_rows(lm: CausalLM) -> bool:
    """Returns whether a model is sharded and reads embeddings in the place of token ids."""
    return isinstance(lm.body, _Body) and lm.body.takes_embeddings


@dataclasses.dataclass(frozen=True)
class HeadInShards(CausalLM):
    """A causal LM whose head is in shards of the vocabulary."""

    group: Any = None
    """The processes that have them."""

    @property
    def vocab_group(self) -> Any:
        return self.group


def head_in_shards(lm: CausalLM) -> HeadInShards:
    """Returns a sharded model with its head as it lies, outside of all contexts in which it is gathered."""
    head: Any = output_head(lm.model)
    parts = {field.name: getattr(lm, field.name) for field in dataclasses.fields(CausalLM)}
    parts |= {"weight": head.weight, "bias": head.bias}
    return HeadInShards(**parts, group=head.weight.device_mesh.get_group())


def split_sharded(model: nn.Module) -> CausalLM:
    """Returns what `hf.split` does, of a model that may be sharded; to be called in `unsharded`.

    A sharded model's `weight` and `bias` have values in `unsharded`, in `unsharded_heads`, and from a forward to its
    backward outside of `rows_exchanged`.
    """
    parts = split(model)
    enters_by_model = isinstance(parts.body, Headless) or not isinstance(model, FSDPModule)
    return parts if enters_by_model else dataclasses.replace(parts, body=_Body(parts))


class _Body:
    """The body of a sharded model, called by way of the model, whose hooks gather what is no layer's."""

    def __init__(self, parts: CausalLM) -> None:
        self.config, self.forward, self._model = parts.body.config, parts.body.forward, parts.model
        parts.model.call_body = parts.body.__call__
        register_fsdp_forward_method(parts.model, "call_body")
        self._embeddings = parts.model.get_input_embeddings()
        self.looks_up = False
        """Whether embeddings are in shards now."""
        self.takes_embeddings = self._takes_embeddings()

    def __call__(self, **kwargs: Any) -> Any:
        if self.looks_up:
            ids = kwargs.pop("input_ids")
            kwargs["inputs_embeds"] = looked_up(ids, self._embeddings.weight, self._embeddings.padding_idx)
        return self._model.call_body(**kwargs)

    @torch.no_grad()
    def _takes_embeddings(self) -> bool:
        """Tries whether plain embeddings in the place of ids give the same states."""
        table = self._embeddings
        if type(table).forward is not nn.Embedding.forward or table.max_norm is not None or table.scale_grad_by_freq:
            return False
        ids = torch.arange(min(4, table.num_embeddings), device=table.weight.device)[None]
        try:
            states, same = self(input_ids=ids), self(inputs_embeds=table(ids))
        except Exception:  # a model may refuse embeddings by any
            return False
        return torch.equal(states.last_hidden_state, same.last_hidden_state)


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


def _vocabulary(model: Any) -> list[Any]:
    """Returns the modules of embeddings and head."""
    return [model.get_input_embeddings(), output_head(model)]


def _is_sharded(part: Any) -> bool:
    """Returns whether this process has a share of the part's own weights now, and not all of them."""
    others = {id(each) for other in _parts(part) if other is not part for each in other.parameters()}
    own = [each for each in part.parameters() if id(each) not in others]
    return any(isinstance(each, DTensor) for each in own)
