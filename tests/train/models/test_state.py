"""The state of models and optimizers that are not sharded, saved and loaded by the functions that serve shards."""

from __future__ import annotations

import copy

import torch
from runs import assert_equal
from tiny import llama_config
from torch import nn
from transformers import AutoModelForCausalLM

from distil_kernels.train.models.state import load_model_state, load_optimizer_state, model_state, optimizer_state


class Experts(nn.Module):
    """Two linear maps of which the second one is left out at first, and so has no gradient."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, inputs: torch.Tensor, uses_both: bool) -> torch.Tensor:
        return self.second(self.first(inputs)) if uses_both else self.first(inputs)


def step(model: Experts, optimizer: torch.optim.Optimizer, inputs: torch.Tensor, uses_both: bool) -> None:
    model(inputs, uses_both).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1, fused=True)


def test_an_optimizer_goes_on_to_the_last_bit(generator: torch.Generator) -> None:
    """A parameter without a gradient before the checkpoint takes its first step after it."""
    inputs = torch.randn(4, 3, generator=generator)
    model, other = Experts(generator), Experts(generator)
    optimizer, fresh = adamw(model), adamw(other)
    step(model, optimizer, inputs, False)
    state = copy.deepcopy(optimizer_state(model, optimizer))  # on a CPU it has the optimizer's own tensors
    assert set(state["state"]) == {"first.weight", "first.bias"}
    load_model_state(other, copy.deepcopy(model_state(model)))
    load_optimizer_state(other, fresh, copy.deepcopy(state))
    assert_equal(optimizer_state(other, fresh), state)
    for run, its_optimizer in ((model, optimizer), (other, fresh)):
        step(run, its_optimizer, inputs, True)
    assert_equal(dict(other.state_dict()), dict(model.state_dict()))
    assert_equal(optimizer_state(other, fresh), optimizer_state(model, optimizer))


def test_an_optimizer_before_its_first_step_is_left_alone(generator: torch.Generator) -> None:
    model = Experts(generator)
    optimizer = adamw(model)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    assert optimizer_state(model, optimizer) == {}
    load_optimizer_state(model, optimizer, {})
    assert not optimizer.state
    assert_equal(dict(model.state_dict()), before)


def test_tied_weights_are_one_tensor() -> None:
    model = AutoModelForCausalLM.from_config(llama_config())
    state = model_state(model)
    assert state["lm_head.weight"] is state["model.embed_tokens.weight"]
    assert list(state) == list(model.state_dict())
