"""Prompts and completions of unequal lengths, and models of many kinds, for every way of reading."""

from __future__ import annotations

import torch
from tiny import SMALL, llama_config
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoConfig,
    Lfm2Config,
    MambaConfig,
    MistralConfig,
    MptConfig,
    PretrainedConfig,
    Qwen3Config,
)  # fmt: skip

from distil_kernels.hf import CausalLM, split

# A shared start, different lengths after it (padding in the middle), and a prompt that ends right after the start.
PROMPTS = [[5, 6, 7, 8, 9, 10], [5, 6, 7, 11], [5, 6, 7, 20, 21, 22, 23, 24]]
ROWS = [0, 0, 1, 1, 2, 2, 0]
COMPLETIONS = [[30, 31, 32], [33], [34, 35, 36, 37], [30], [38, 39], [40, 41, 42], [30, 31, 33]]

KINDS: dict[str, PretrainedConfig] = {
    "llama": llama_config(),
    "learnt positions": GPT2Config(
        vocab_size=260, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2
    ),
    "sliding window": MistralConfig(**SMALL, sliding_window=3),
    "every second layer slides, softcaps": Gemma2Config(**SMALL, head_dim=8, sliding_window=3),
    "layers may slide": Qwen3Config(
        **SMALL, head_dim=8, use_sliding_window=True, sliding_window=3, max_window_layers=1
    ),
    "parallel layers": CohereConfig(**SMALL, logit_scale=0.25),
    "distances": BloomConfig(vocab_size=260, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.2),
    "distances by key": MptConfig(vocab_size=260, d_model=32, n_layers=2, n_heads=4, initializer_range=0.2),
    "local layers": GPTNeoConfig(
        vocab_size=260,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=3,
        initializer_range=0.2,
    ),
    "convolutions": Lfm2Config(**SMALL, layer_types=["conv", "full_attention"], conv_L_cache=3),
    "recurrent": MambaConfig(
        vocab_size=260, hidden_size=32, num_hidden_layers=2, state_size=4, conv_kernel=3, initializer_range=0.2
    ),
}


def make(kind: str) -> CausalLM:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(KINDS[kind]).eval()
    # transformers' mask in float64 overflows behind a softcap, in padding that no window of three reaches past.
    return split(model if "softcaps" in kind else model.double())
