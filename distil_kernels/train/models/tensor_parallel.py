"""One model cut over the processes of a group (`--tensor_parallel`; transformers' `tp_plan` names the pieces).

    attention, feed-forward    by heads and by columns: each member has a part of every such matrix
    embeddings, head           by the vocabulary; the loss gets the head in shards (`vocab_group`)
    norms, and what has no     whole in every member
    rule

The members read the same rows and draw the same rollouts. The model is loaded whole and then cut, each member keeping
its part, so that a checkpoint's fingerprint and the copies that teachers start from are those of a whole model.

Attention whose heads do not divide among the members stays whole in each of them; the feed-forward layers and the
vocabulary are cut into parts of any sizes. A model without a plan has its vocabulary cut alone.

Left out: loading each member's part alone, experts, packed matrices, adapters, and FSDP of what is cut.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import transformers
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from distil_kernels.hf import output_head

PARTIAL_GRADIENT = "replicated_with_grad_allreduce"
"""Style of a norm of some heads, of which each member's gradient is a part. transformers' own hook would sum it again
with every micro-batch, so it is left out, and the trainer sums once a step."""
STYLES = {"colwise", "rowwise", "colwise_gather_output", "colwise_rep", "embedding_rowwise", PARTIAL_GRADIENT}
"""Rules of transformers' plans that are known to train here."""
HEADS = ("num_attention_heads", "num_key_value_heads")
"""Fields of a model's configuration that must divide among the members, if attention is to be cut."""


class Cut(NamedTuple):
    """What cutting a model has done."""

    notes: list[str]
    """What a person should know of it before the run."""
    partial: list[nn.Parameter]
    """Parameters that are whole in every member, of whose gradients each has a part."""


def cut(model: Any, mesh: DeviceMesh) -> Cut:
    """Cuts a model over the members of a mesh [members]; each keeps its part.

    Raises:
        ValueError: transformers' plan for the model has a rule that is not known here, or transformers is too old.
    """
    name, members = type(model).__name__, mesh.size()
    plan = dict(getattr(model, "tp_plan", None) or {})
    unknown = sorted(set(plan.values()) - STYLES)
    if unknown:
        raise ValueError(
            f"[tensor_parallel] the tp_plan of {name} has {', '.join(unknown)}: expected {', '.join(sorted(STYLES))}"
        )
    notes = []
    if not plan:
        notes.append(f"transformers has no tp_plan for {name}: tensor_parallel cuts its vocabulary alone")
    config = model.config.get_text_config(decoder=True)
    whole = [f"{field} {getattr(config, field)}" for field in HEADS if (getattr(config, field, None) or 0) % members]
    if whole:
        plan = {rule: style for rule, style in plan.items() if not _is_of_attention(rule)}
        notes.append(
            f"{name} has {' and '.join(whole)}, which tensor_parallel {members} does not divide: its attention stays "
            "whole in every process"
        )
    return Cut(notes, _applied(model, mesh, plan))


def _is_of_attention(rule: str) -> bool:
    return any("attn" in part or "attention" in part for part in rule.split("."))


def _applied(model: Any, mesh: DeviceMesh, plan: dict[str, str]) -> list[nn.Parameter]:
    """Cuts the modules that a plan names, and embeddings and head; returns the parameters with partial gradients."""
    head, embeddings = output_head(model), model.get_input_embeddings()
    is_tied = head.weight is embeddings.weight
    rules, partial = dict[str, str](), list[nn.Parameter]()
    for name, module in model.named_modules():
        style = plan.get(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name))
        if module is head:
            style = "colwise_gather_output"
        if module is embeddings:
            style = "embedding_rowwise" if is_tied else style
        if style == PARTIAL_GRADIENT:
            partial += module.parameters()
        elif style is not None:
            own = [each for each, _ in module.named_parameters(recurse=False) if not (is_tied and module is head)]
            rules |= {f"{name}.{each}": style for each in own} | {name: style}
    if is_tied and head.bias is not None:
        raise ValueError(f"[tensor_parallel] {type(model).__name__} has a bias on a tied head, expected none")
    # transformers cuts a weight's parameter, and hooks the module's forward.
    try:
        from transformers.integrations.tensor_parallel import apply_tensor_parallelism
    except ImportError as error:
        raise ValueError(
            f"[tensor_parallel] expected transformers 5.24, whose plans make DTensors, got {transformers.__version__}"
        ) from error
    apply_tensor_parallelism(model, mesh, rules)
    if is_tied:
        head.weight = embeddings.weight
    assert isinstance(head.weight, DTensor)
    model._tp_size = mesh.size()  # as from_pretrained leaves it; `CausalLM.vocab_group` reads it
    return partial
