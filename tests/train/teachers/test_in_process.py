"""Which weights each kind of teacher answers with."""

from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from runs import packed
from tiny import llama_config
from transformers import AutoModelForCausalLM

from distil_kernels.hf import split
from distil_kernels.train.models.reading import Reader, reader
from distil_kernels.train.teachers.in_process import InProcessTeacher

BATCH = packed([[1, 2, 3], [1, 4]], [0, 0, 1], [[5, 6], [7], [8, 9]])


def student(lora: bool = False) -> Reader:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(llama_config())
    if lora:
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"]))
    return reader(split(model.eval()))


def shift(lm: Reader) -> None:
    with torch.no_grad():
        for parameter in lm.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)


def states(teacher: InProcessTeacher) -> torch.Tensor:
    return teacher.target(BATCH).states


def test_live_follows_at_once_and_shares_the_head() -> None:
    lm = student()
    teacher = InProcessTeacher(lm, "live", 0.5)
    before = states(teacher)
    shift(lm)
    assert not torch.allclose(states(teacher), before)
    assert teacher.head == (None, None, 1.0, math.inf) and not states(teacher).requires_grad


@pytest.mark.parametrize("lora", [False, True])
def test_frozen_stays_at_the_start(lora: bool) -> None:
    lm = student(lora)
    teacher = InProcessTeacher(lm, "frozen", 0.5)
    before = states(teacher)
    shift(lm)
    teacher.follow()
    torch.testing.assert_close(states(teacher), before)
    assert (teacher.lm is lm) == lora  # adapters off instead of a second model
    assert (teacher.head[0] is None) == lora


def test_ema_is_the_average_in_float32_and_comes_back_from_a_checkpoint() -> None:
    lm = student()
    teacher = InProcessTeacher(lm, "ema", 0.25)
    start = [parameter.clone() for parameter in lm.model.parameters()]
    for _ in range(2):
        shift(lm)
        teacher.follow()
    # After two shifts of .05: the average moved .25 * .05, then a quarter of the way to .10.
    expected = 0.25 * 0.05 + 0.25 * (0.10 - 0.25 * 0.05)
    for mine, begin in zip(teacher.lm.model.parameters(), start, strict=True):
        assert mine.dtype == torch.float32 and not mine.requires_grad
        torch.testing.assert_close(mine, begin + expected)
    assert teacher.head[0] is teacher.lm.weight
    other = InProcessTeacher(student(), "ema", 0.25)
    other.load_state_dict(teacher.state_dict())
    torch.testing.assert_close(states(other), states(teacher))
    assert InProcessTeacher(lm, "frozen", 0.1).state_dict() == {}


def test_ema_of_adapters_is_a_second_set_of_adapters() -> None:
    lm = student(lora=True)
    start = {name: parameter.clone() for name, parameter in lm.model.named_parameters()}
    teacher = InProcessTeacher(lm, "ema", 0.25)
    shift(lm)
    teacher.follow()
    own = dict(lm.model.named_parameters())
    for name, mine in teacher.lm.model.named_parameters():
        assert (mine is own[name]) == (name not in teacher.state_dict()) == ("lora_" not in name)
        assert own[name].requires_grad == ("lora_" in name) and not mine.requires_grad
        torch.testing.assert_close(mine, start[name] + 0.25 * 0.05 * ("lora_" in name))
    assert teacher.head == (None, None, 1.0, math.inf)  # the student's: both models' logits in one product
    other = InProcessTeacher(student(lora=True), "ema", 0.25)
    other.load_state_dict(teacher.state_dict())
    torch.testing.assert_close(states(other), states(teacher))
