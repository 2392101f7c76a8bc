"""Models taken apart must give the model's own logits, or say why they cannot."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from tiny import SMALL, llama_config
from torch import nn
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GPT2Config, GraniteConfig, PretrainedConfig

from distil_kernels.hf import split

CONFIGS = {
    "tied head": llama_config(),
    "own head": llama_config(tie_word_embeddings=False),
    "softcap": Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=3.0),
    "logit scale": CohereConfig(**SMALL, logit_scale=0.25),
    "logits scaling": GraniteConfig(**SMALL, logits_scaling=4.0),
    "no rotary": GPT2Config(vocab_size=260, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2),
}


def build(config: PretrainedConfig) -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_the_models_own(name: str) -> None:
    model = build(CONFIGS[name])
    lm = split(model, check=False)
    tokens = torch.tensor([[7, 8, 9, 200]])
    expected = model(input_ids=tokens).logits
    torch.testing.assert_close(lm.logits(lm.hidden(tokens)), expected, rtol=1e-4, atol=1e-4)
    assert lm.weight is model.get_output_embeddings().weight


def test_head_bias() -> None:
    model = build(llama_config(tie_word_embeddings=False))
    model.lm_head = nn.Linear(32, 260)
    lm = split(model, check=False)
    tokens = torch.tensor([[7, 8]])
    torch.testing.assert_close(lm.logits(lm.hidden(tokens)), model(input_ids=tokens).logits)
    assert lm.bias is model.lm_head.bias


def test_adapters_in_the_body_count() -> None:
    model = get_peft_model(build(llama_config()), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    lm = split(model)
    tokens = torch.tensor([[7, 8, 9]])
    torch.testing.assert_close(lm.logits(lm.hidden(tokens)), model(input_ids=tokens).logits)
    with model.disable_adapter():
        plain = lm.hidden(tokens)
    torch.testing.assert_close(plain, build(llama_config()).model(tokens).last_hidden_state)
    assert not torch.allclose(lm.hidden(tokens), plain)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (LoraConfig(target_modules=["lm_head"]), r"output head .* is Linear"),
        (LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]), "ModulesToSaveWrapper"),
        (PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "adds positions"),
    ],
)
def test_adapters_that_cannot_be_expressed_are_errors(adapter: object, message: str) -> None:
    model = get_peft_model(build(llama_config(tie_word_embeddings=False)), adapter)
    with pytest.raises(ValueError, match=message):
        split(model)


def test_an_unknown_head_does_not_pass_silently() -> None:
    model = build(llama_config(tie_word_embeddings=False))
    model.lm_head.register_forward_hook(
        lambda module, inputs, out: out - 0.5 * out.mean(-1, keepdim=True) + 0.1 * out**2
    )
    with pytest.raises(ValueError, match="differ from LlamaForCausalLM's own"):
        split(model)
    model = build(llama_config())
    model.config.final_logit_softcapping = 0.5  # a setting that this model's forward ignores
    with pytest.raises(ValueError, match="differ from"):
        split(model)
