"""What is said of a model before a run: whether its positions suffice."""

from __future__ import annotations

import pytest
from tiny import llama_config
from transformers import AutoModelForCausalLM, GPT2Config

from distil_kernels.train.models.loading import check_positions


def test_a_learnt_table_of_positions_has_an_end() -> None:
    model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=1, n_positions=64))
    assert check_positions(model, 32, 32) == ""
    with pytest.raises(ValueError, match=r"\[max_prompt_tokens\] GPT2.* has 64 positions, .* at most 24, got 32"):
        check_positions(model, 32, 40)
    with pytest.raises(ValueError, match=r"\[max_new_tokens\] GPT2.* has 64 positions: .* at most 62 .* got 2000"):
        check_positions(model, 32, 2000)


def test_positions_without_an_end_are_worth_a_note() -> None:
    model = AutoModelForCausalLM.from_config(llama_config(max_position_embeddings=64))
    assert check_positions(model, 32, 32) == ""
    assert "may take 72 tokens together, and LlamaForCausalLM was made for 64" in check_positions(model, 32, 40)
