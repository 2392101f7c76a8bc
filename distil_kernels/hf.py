"""Hidden states and output head of a transformers causal language model, for losses that start from them.

    logits = softcap * tanh((scale * hidden @ weight^T + scale * bias) / softcap)

`split` finds the parts of any causal LM: tied or separate heads, head bias, final softcap (Gemma), logit scale
(Cohere, Granite) and PEFT wrappers whose adapters sit in the body. What the formula cannot express is an error that
says so: `split` compares its logits with the model's own on a few tokens, so an unknown architecture cannot pass
silently.

Left out: adapters on the head, prompt tuning (it adds positions), encoder-decoder models, weights that are
sharded while they are read (`train/models/sharding.py` gathers them).
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class CausalLM:
    """Body and head of a model: `hidden` runs the body, the fields are the head (V vocabulary, D hidden size)."""

    model: Any
    """The module that was split: a transformers or PEFT model."""
    body: Any
    """Everything below the head; its first output is the hidden states after the final norm."""
    weight: Tensor
    """[V, D], the model's own parameter."""
    bias: Tensor | None
    """[V], already times `scale`."""
    softcap: float | None
    scale: float

    def hidden(self, input_ids: Tensor, cache: Any = None, **kwargs: Any) -> Tensor:
        """Returns hidden states [B, L, D], times the logit scale, ready for `weight`; continues and fills a `cache`.

        `kwargs` go to the body.
        """
        kwargs |= self.cached(cache)
        hidden = self.body(input_ids=input_ids, use_cache=cache is not None, **kwargs).last_hidden_state
        return hidden if self.scale == 1.0 else hidden * self.scale

    def cached(self, cache: Any) -> dict[str, Any]:
        """Returns the argument for the model's cache; before transformers 5.24 its name was past_key_values."""
        named = inspect.signature(self.body.forward).parameters
        return {} if cache is None else {"cache" if "cache" in named else "past_key_values": cache}

    def logits(self, hidden: Tensor) -> Tensor:
        """Returns logits [..., V] of hidden states [..., D], in plain torch: for checks, not for training."""
        logits = nn.functional.linear(hidden, self.weight.to(hidden.dtype), self.bias)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def split(model: nn.Module, check: bool = True) -> CausalLM:
    """Splits a causal LM, bare or PEFT-wrapped, into body and head.

    Args:
        check: compare logits with the model's own on three tokens (one small forward).

    Raises:
        ValueError: the model's logits are not a linear head of hidden states with scale and softcap.
    """
    inner = _unwrap_peft(model)
    head = inner.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise ValueError(
            f"[split] the output head of {type(inner).__name__} is {type(head).__name__}, expected a plain "
            "torch.nn.Linear (adapters on the head are not supported: leave it out of target_modules)"
        )
    if hasattr(head.weight, "device_mesh"):
        raise ValueError("[split] the head's weight is sharded (DTensor), which is not supported: gather it first")
    body = inner.base_model
    if body is inner:
        raise ValueError(f"[split] {type(inner).__name__} has no body apart from its head (base_model is itself)")
    text_config = inner.config.get_text_config()
    scale = float(getattr(text_config, "logit_scale", None) or 1.0)
    scale /= float(getattr(text_config, "logits_scaling", None) or 1.0)
    softcap = getattr(text_config, "final_logit_softcapping", None)
    bias = head.bias if head.bias is None or scale == 1.0 else head.bias * scale
    if bias is not head.bias and head.bias.requires_grad:
        raise ValueError("[split] a trainable head bias together with a logit scale is not supported: freeze the bias")
    parts = CausalLM(model, body, head.weight, bias, softcap, scale)
    if check:
        _check_logits(parts, text_config.vocab_size)
    return parts


def _unwrap_peft(model: Any) -> Any:
    if not hasattr(model, "peft_config"):
        return model
    for name, adapter in model.peft_config.items():
        if getattr(adapter, "is_prompt_learning", False):
            raise ValueError(
                f"[split] adapter {name!r} is {adapter.peft_type}: it adds positions to the sequence, which "
                "is not supported (adapters inside the layers are, such as LoRA)"
            )
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@torch.no_grad()
def _check_logits(parts: CausalLM, vocab_size: int) -> None:
    tokens = torch.tensor([[1, 2, 3]], device=parts.weight.device) % vocab_size
    training = [module for module in parts.model.modules() if module.training]
    parts.model.eval()
    try:
        expected = parts.model(input_ids=tokens).logits.float()
        ours = parts.logits(parts.hidden(tokens)).float()
    finally:
        for module in training:
            module.training = True
    if ours.shape != expected.shape:
        raise ValueError(f"[split] head gives logits {tuple(ours.shape)}, the model {tuple(expected.shape)}")
    error = float((ours - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
    if not error < 0.02:
        raise ValueError(
            f"[split] logits rebuilt from hidden states and head differ from {type(parts.model).__name__}'s own "
            f"by {error:.1%}: its forward does something between them that is not scale, bias or softcap"
        )
