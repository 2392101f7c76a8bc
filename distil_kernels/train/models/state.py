"""The state of models and optimizers in one piece, whether they are sharded or not, for checkpoints.

torch.distributed.checkpoint.state_dict gathers and shards it. All processes must call these functions together: the
main one alone gets a state, on its CPU; every one needs it to load.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

IN_ONE_PIECE = StateDictOptions(full_state_dict=True, cpu_offload=True)
"""State without shards, on the CPU of the main process alone."""


def model_state(model: nn.Module) -> dict[str, Any]:
    """Returns the state of a model; an empty one in all processes but the main one."""
    state = get_model_state_dict(model, options=IN_ONE_PIECE)
    if state:  # torch gathers a tied weight once for each name; as one tensor it is saved once
        first_names: dict[int, str] = {}
        for name, weight in model.state_dict(keep_vars=True).items():
            state[name] = state[first_names.setdefault(id(weight), name)]
    return state


def load_model_state(model: nn.Module, state: dict[str, Any], strict: bool = True) -> None:
    """Loads what `model_state` returned in the main process into a model.

    Args:
        strict: every weight of the model must be in it.
    """
    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True, strict=strict))


def optimizer_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Returns the state of the optimizer of a model, by parameter names; an empty one before its first step."""
    if not optimizer.state:  # torch would make a state by a step without gradients, and that step would be counted
        return {}
    return get_optimizer_state_dict(model, optimizer, options=IN_ONE_PIECE)


def load_optimizer_state(model: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Loads what `optimizer_state` returned in the main process into a new optimizer.

    The optimizer keeps its settings (learning rate, weight decay, ...).
    """
    if not state:
        return
    settings = [dict(group) for group in optimizer.param_groups]
    options = StateDictOptions(full_state_dict=True, strict=False)
    set_optimizer_state_dict(model, optimizer, optim_state_dict=state, options=options)
    for group, before in zip(optimizer.param_groups, settings, strict=True):
        group.update(before)  # torch has made lists of their tuples
    # A parameter that never had a gradient has no state; torch has made one for it.
    for name, parameter in model.named_parameters():
        if name not in state["state"]:
            optimizer.state.pop(parameter, None)
