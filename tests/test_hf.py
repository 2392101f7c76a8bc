"""Models taken apart must give the model's own logits, or say why they cannot."""

from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from tiny import SMALL, llama_config
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    PretrainedConfig,
)

from distil_kernels import fused_forward_ce
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
    lm = split(model)
    tokens = torch.tensor([[7, 8, 9, 200]])
    expected = model(input_ids=tokens).logits
    torch.testing.assert_close(lm.logits(lm.hidden(tokens)), expected, rtol=1e-4, atol=1e-4)
    assert lm.weight is model.get_output_embeddings().weight


def test_head_bias() -> None:
    model = build(llama_config(tie_word_embeddings=False))
    model.lm_head = nn.Linear(32, 260)
    lm = split(model)
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


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_in_modules_to_save_is_the_copy_that_is_trained(tied: bool) -> None:
    model = build(llama_config(tie_word_embeddings=tied))
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    wrapper, tokens = model.get_base_model().lm_head, torch.tensor([[7, 8, 9]])
    trained = wrapper.modules_to_save["default"]
    nn.init.normal_(trained.weight)
    lm = split(model)
    assert lm.weight is trained.weight and lm.weight.requires_grad
    torch.testing.assert_close(lm.logits(lm.hidden(tokens)), model(input_ids=tokens).logits)
    fused_forward_ce(lm.hidden(tokens), lm.weight, lm.hidden(tokens).detach() + 1.0, lm.weight.detach()).backward()
    assert trained.weight.grad is not None and wrapper.original_module.weight.grad is None
    with model.disable_adapter():
        assert split(model).weight is wrapper.original_module.weight


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (LoraConfig(target_modules=["lm_head"]), "has an adapter .* leave the head out of target_modules"),
        (LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3]), "has trained rows"),
        (PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "adds positions"),
    ],
)
def test_adapters_that_cannot_be_expressed_are_errors(adapter: object, message: str) -> None:
    model = get_peft_model(build(llama_config(tie_word_embeddings="rows" in message)), adapter)
    with pytest.raises(ValueError, match=message):
        split(model)


def test_scale_and_softcap_are_what_the_forward_does() -> None:
    model = build(llama_config())
    model.config.final_logit_softcapping = model.config.logit_scale = 0.5  # settings that this model's forward ignores
    assert (split(model).logit_scale, split(model).logit_softcap) == (1.0, math.inf)
    model.lm_head.register_forward_hook(lambda head, inputs, out: 3.3 * torch.tanh(out / 13.0 / 3.3))
    lm = split(model)
    assert lm.logit_scale == pytest.approx(1 / 13.0, rel=1e-12) and lm.logit_softcap == 3.3
    tokens = torch.tensor([[7, 8, 9]])
    torch.testing.assert_close(lm.logits(30 * lm.hidden(tokens)), model.lm_head(30 * lm.hidden(tokens)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["softcap", "logit scale", "logits scaling"])
def test_scale_and_softcap_are_exact_in_half_precision(name: str, dtype: torch.dtype) -> None:
    lm = split(build(CONFIGS[name]).to(dtype))
    expected = {"softcap": (1.0, 3.0), "logit scale": (0.25, math.inf), "logits scaling": (0.25, math.inf)}
    assert (lm.logit_scale, lm.logit_softcap) == expected[name]


FORWARDS = {
    "a nonlinear head": (lambda head, inputs, out: out - 0.5 * out.mean(-1, keepdim=True) + 0.1 * out**2, "does some"),
    "a bound that is no tanh": (lambda head, inputs, out: out.clamp(-30.0, 30.0), "does something .* 260 of 260"),
    "a soft bound that is no tanh": (lambda head, inputs, out: 30.0 * (out / 30.0).atan(), "does something"),
    "a scale of each token": (lambda head, inputs, out: out * torch.linspace(1.0, 1.1, 260), "does something"),
    "tokens left out": (lambda head, inputs, out: out.index_fill(-1, torch.tensor([9, 11]), -1e4), r"2 of 260 .* 9\)"),
    "another bias": (lambda head, inputs, out: out + 0.1, "does something"),
    "a negative scale": (lambda head, inputs, out: -out, "by -1.0, expected a positive number"),
    "tokens moved": (lambda head, inputs, out: out[..., 10:], "(does something|multiplies)"),
    "one position": (lambda head, inputs, out: out[:, -1:], r"makes logits \(1, 1, 260\) of the \(1, 8, 260\)"),
}


@pytest.mark.parametrize("name", FORWARDS)
def test_a_forward_that_is_no_scale_and_softcap_does_not_pass(name: str) -> None:
    model = build(llama_config(tie_word_embeddings=False))
    hook, message = FORWARDS[name]
    model.lm_head.register_forward_hook(hook)
    with pytest.raises(ValueError, match=rf"\[split\] LlamaForCausalLM .*{message}"):
        split(model)


def test_rows_of_a_padded_head_are_left_out() -> None:
    model, tokens = build(llama_config(tie_word_embeddings=False)), torch.tensor([[7, 8, 9]])
    model.lm_head.bias = nn.Parameter(torch.randn(260))
    model.lm_head.register_forward_hook(lambda head, inputs, out: out[..., :250])
    lm = split(model)
    logits = lm.logits(lm.hidden(tokens))
    torch.testing.assert_close(logits, model(input_ids=tokens).logits)
    loss = fused_forward_ce(
        lm.hidden(tokens), lm.weight, lm.hidden(tokens).detach(), None, student_bias=lm.bias, vocab_size=lm.vocab_size
    )
    torch.testing.assert_close(loss, -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean())


@pytest.mark.parametrize("num_tokens", [2, 7])
def test_a_vocabulary_of_a_few_tokens(num_tokens: int) -> None:
    model, tokens = build(llama_config(vocab_size=num_tokens)), torch.tensor([[0, 1]])
    lm = split(model)
    torch.testing.assert_close(lm.logits(lm.hidden(tokens)), model(input_ids=tokens).logits)


def test_splitting_leaves_no_trace() -> None:
    model = build(GPT2Config(**{**CONFIGS["no rotary"].to_dict(), "resid_pdrop": 0.5})).train()
    model.transformer.h[0].eval()
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    split(model)
    assert [module.training for module in model.modules()] == modes and torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_transform_before_the_head_belongs_to_the_body() -> None:
    config = BertConfig(
        vocab_size=260, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        is_decoder=True, initializer_range=0.2,
    )  # fmt: skip
    model, tokens = build(config), torch.tensor([[7, 8, 9]])
    lm = split(model)
    assert lm.body.config is model.config
    mask = torch.tensor([[1, 1, 0]])
    hidden = lm.hidden(tokens, attention_mask=mask)
    torch.testing.assert_close(lm.logits(hidden), model(input_ids=tokens, attention_mask=mask).logits)
    fused_forward_ce(hidden, lm.weight, hidden.detach() + 1.0, lm.weight.detach()).backward()
    assert model.cls.predictions.transform.dense.weight.grad.abs().sum() > 0
    assert not model.cls.predictions.decoder._forward_pre_hooks


def test_states_that_are_changed_before_the_head_are_those_that_it_gets() -> None:
    model, tokens = build(llama_config()), torch.tensor([[7, 8, 9]])
    model.lm_head.register_forward_pre_hook(lambda head, inputs: (inputs[0].clamp(-0.5, 0.5),))
    lm = split(model)
    assert lm.hidden(tokens).abs().max() == 0.5
    torch.testing.assert_close(lm.logits(lm.hidden(tokens)), model(input_ids=tokens).logits)
