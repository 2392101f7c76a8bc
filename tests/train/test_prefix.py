"""Prompts read once must give what whole rows give: hidden states, gradients, samples."""

from __future__ import annotations

import pytest
import torch
from tiny import llama_config
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config

from distil_kernels.hf import CausalLM, split
from distil_kernels.train.prefix import common_prefix, completion_hidden, read, shares_prompts
from distil_kernels.train.rollout import Sampling, sample

# A shared start, different lengths after it (padding in the middle), and a prompt that ends right after the start.
PROMPTS = [[5, 6, 7, 8, 9, 10], [5, 6, 7, 11], [5, 6, 7, 20, 21, 22, 23, 24]]
ROWS = [0, 0, 1, 1, 2, 2, 0]
COMPLETIONS = [[30, 31, 32], [33], [34, 35, 36, 37], [30], [38, 39], [40, 41, 42], [30, 31, 33]]


def make(kind: str) -> CausalLM:
    torch.manual_seed(1)
    config = llama_config()
    if kind == "gpt2":
        config = GPT2Config(vocab_size=260, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2)
    return split(AutoModelForCausalLM.from_config(config).double().eval())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])  # rotary and learnt positions
@pytest.mark.parametrize("prompts", [PROMPTS, [[1, 2], [3, 4], [5, 6]], [[4], [5], [6]]])
def test_hidden_states_and_gradients_equal_whole_rows(kind: str, prompts: list[list[int]]) -> None:
    lm = make(kind)
    assert shares_prompts(lm)
    results = []
    for share in (True, False):
        hidden = completion_hidden(lm, prompts, ROWS, COMPLETIONS, share)
        weight = torch.linspace(-1.0, 1.0, hidden.numel(), dtype=hidden.dtype).view_as(hidden)
        (hidden.sin() * weight).sum().backward()
        grads = [parameter.grad for parameter in lm.model.parameters() if parameter.grad is not None]
        results.append((hidden.detach(), torch.cat([grad.flatten() for grad in grads])))
        lm.model.zero_grad(set_to_none=True)
    (hidden, grad), (expected, expected_grad) = results
    assert hidden.shape == (sum(map(len, COMPLETIONS)), 32)
    torch.testing.assert_close(hidden, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-5)  # norms and angles are float32


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_greedy_rollouts_equal_whole_rows(kind: str) -> None:
    lm = make(kind)
    sampling = Sampling(max_new_tokens=8, stop_ids=[0], temperature=0.0)
    shared = sample(lm, PROMPTS, ROWS, sampling, share=True)
    assert shared == sample(lm, PROMPTS, ROWS, sampling, share=False)
    assert shared[0] == shared[1] == shared[6]


def test_each_prompt_is_read_once() -> None:
    lm = make("llama")
    seen: list[int] = []
    handle = lm.body.embed_tokens.register_forward_hook(lambda module, inputs, out: seen.append(inputs[0].numel()))
    read(lm, PROMPTS, ROWS)
    handle.remove()
    assert seen == [3, 3 * 4]  # the shared start, then three rests padded to the longest


def test_common_prefix_leaves_every_prompt_its_last_token() -> None:
    assert common_prefix(PROMPTS) == 3
    assert common_prefix([[1, 2, 3], [1, 2, 3]]) == 2
    assert common_prefix([[1], [1, 2]]) == 0
    assert common_prefix([[1, 2], [3, 2]]) == 0


def test_models_with_sliding_windows_read_whole_rows() -> None:
    config = Gemma2Config(
        vocab_size=260, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=4,
    )  # fmt: skip
    lm = split(AutoModelForCausalLM.from_config(config).eval())
    assert not shares_prompts(lm)
    assert completion_hidden(lm, PROMPTS, ROWS, COMPLETIONS, share=False).shape == (17, 32)
