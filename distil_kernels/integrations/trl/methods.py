"""Functions and methods that take the places of TRL's: models are read up to their heads, which the losses read.

Each is made from the one it replaces, which it calls for what is not ours to compute. A whole `compute_loss` runs
inside the forward of the student's wrapper (DistributedDataParallel, FSDP, DeepSpeed), so that gradients are reduced
and sharded weights are whole where they are needed.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from trl.models.utils import _ForwardRedirection

from distil_kernels import fused_distil_loss, hf
from distil_kernels.integrations.trl import unformed_logits
from distil_kernels.integrations.trl.unformed_logits import UnformedLogits, divergence

_inside: ContextVar[nn.Module | None] = ContextVar("_inside", default=None)
"""The model whose wrapper's forward is running."""


def chunked_divergence_loss(original: Callable[..., Any]) -> Callable[..., Any]:
    """Makes DistillationTrainer's loss: a divergence and the student's entropy in one pass."""

    @functools.wraps(original)
    def loss(
        student_hidden_states: Tensor,
        teacher_hidden_states: Tensor,
        student_lm_head_weight: Tensor,
        teacher_lm_head_weight: Tensor,
        completion_mask: Tensor,
        beta: float,
        num_items_in_batch: Tensor | int | None = None,
        student_lm_head_bias: Tensor | None = None,
        teacher_lm_head_bias: Tensor | None = None,
        student_logit_scale: float = 1.0,
        teacher_logit_scale: float = 1.0,
        student_final_logit_softcapping: float | None = None,
        teacher_final_logit_softcapping: float | None = None,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        student = UnformedLogits(
            student_hidden_states, student_lm_head_weight, student_lm_head_bias, student_logit_scale,
            _softcap(student_final_logit_softcapping), temperature=temperature,
        )  # fmt: skip
        teacher = UnformedLogits(
            teacher_hidden_states, teacher_lm_head_weight, teacher_lm_head_bias, teacher_logit_scale,
            _softcap(teacher_final_logit_softcapping), temperature=temperature,
        )  # fmt: skip
        student, teacher = _whole(student), _whole(teacher)
        counted = completion_mask.reshape(-1) != 0
        num_counted = counted.sum()
        result = fused_distil_loss(
            student.hidden.flatten(0, 1), student.weight, teacher.hidden.flatten(0, 1), teacher.weight,
            tokens=None, cu_seqlens=None, token_mask=counted, credit_span="none",
            cost={0.0: "kl", 1.0: "reverse_kl"}.get(beta, "jsd"), jsd_weight=beta if 0 < beta < 1 else 0.5,
            normalizer=_denominator(num_items_in_batch, num_counted),
            **student.student_options(), **teacher.teacher_options(),
        )  # fmt: skip
        return result.loss, result.stats.entropy.sum(), num_counted

    return loss


def forward_logits(original: Callable[..., Any]) -> Callable[..., Any]:
    """Makes `_forward_logits` of SDPO and SDFT, which reads a model on prompts and completions."""

    def method(self: Any, model: nn.Module, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int) -> Any:
        logits = read(self, model, input_ids=input_ids, attention_mask=attention_mask)
        return logits[:, -logits_to_keep - 1 : -1, :] / self.temperature

    return _where_heads_are_linear(method, original)


def self_distillation(original: Callable[..., Any]) -> Callable[..., Any]:
    """Makes `compute_loss` of SDPO and SDFT: theirs, inside the forward of the student's wrapper."""

    def method(self: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return within_forward(self, model, lambda student: original(self, student, *args, **kwargs))

    return _where_heads_are_linear(method, original)


def served_distillation(original: Callable[..., Any]) -> Callable[..., Any]:
    """Makes `compute_loss` of ServerDistillationTrainer: theirs, of a student that gives unformed logits."""

    def method(
        self: Any, model: nn.Module, inputs: Any, return_outputs: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        def loss(student: nn.Module) -> Any:
            def outputs(**tensors: Tensor) -> Any:
                return SimpleNamespace(logits=read(self, student, **tensors))

            return original(self, outputs, inputs, False, *args, **kwargs)

        value = within_forward(self, model, loss)
        return (value, None) if return_outputs else value

    return _where_heads_are_linear(method, original)


def logit_divergence(original: Callable[..., Any], temperature: Callable[[Any], float]) -> Callable[..., Any]:
    """Makes `compute_loss` of GKD and GOLD: their divergence of two models with one vocabulary."""

    def loss(self: Any, student_model: nn.Module, inputs: dict[str, Any], num_items: Any) -> Tensor:
        tensors = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        if hasattr(self, "_get_model_forward_kwargs"):  # GOLD's images
            tensors |= self._get_model_forward_kwargs(inputs)
        student = read(self, student_model, **tensors)[:, :-1, :] / temperature(self)
        self.teacher_model.eval()
        with torch.no_grad():
            teacher = read(self, self.teacher_model, **tensors)[:, :-1, :] / temperature(self)
        counted = inputs["labels"][:, 1:] != -100
        student = replace(student, token_mask=counted)
        return divergence(student, teacher, self.beta, normalizer=_denominator(num_items, counted.sum()))

    def method(
        self: Any, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        value = within_forward(self, model, lambda student: loss(self, student, inputs, num_items_in_batch))
        return (value, {}) if return_outputs else value

    def reason(
        self: Any, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> str | None:
        if getattr(self, "use_uld_loss", False) and self.teacher_tokenizer is not None:
            return "compares two vocabularies"
        if type(self).generalized_jsd_loss.__module__ != original.__module__:
            return "has a divergence of its own"
        return "computes metrics from logits" if return_outputs and self.compute_metrics is not None else None

    return _where_heads_are_linear(method, original, reason)


gkd_loss = functools.partial(logit_divergence, temperature=lambda trainer: 1.0)
"""GKD's loss takes no temperature."""
gold_loss = functools.partial(logit_divergence, temperature=lambda trainer: trainer.temperature)


def dispatched(original: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a function that takes logits: of unformed ones, it is that of the same name in `unformed_logits`."""
    of_unformed = getattr(unformed_logits, original.__name__)

    @functools.wraps(original)
    def function(logits: Any, *args: Any, **kwargs: Any) -> Any:
        return (of_unformed if isinstance(logits, UnformedLogits) else original)(logits, *args, **kwargs)

    return function


def within_forward(trainer: Any, model: nn.Module, loss: Callable[[nn.Module], Any]) -> Any:
    """Computes `loss` of the unwrapped model inside its wrapper's forward."""
    unwrapped = trainer.accelerator.unwrap_model(model)
    if (inside := _inside.get()) is not None and inside is unwrapped:
        return loss(inside)

    def run() -> Any:
        before = _inside.set(unwrapped)
        try:
            return loss(unwrapped)
        finally:
            _inside.reset(before)

    return _ForwardRedirection()(model, unwrapped, run)


def read(trainer: Any, model: nn.Module, **inputs: Any) -> UnformedLogits:
    """Runs a model's body on `inputs`, through its wrapper's forward, and returns its unformed logits [B, L, V].

    Those that predict padding do not count.
    """
    unwrapped = trainer.accelerator.unwrap_model(model)
    attention_mask = inputs["attention_mask"] != 0
    token_mask = torch.cat([attention_mask[:, 1:], torch.zeros_like(attention_mask[:, :1])], 1)

    def run() -> UnformedLogits:
        parts = _split(unwrapped)
        return UnformedLogits(
            parts.hidden(**inputs), parts.weight, parts.bias, parts.logit_scale, parts.logit_softcap, parts.vocab_size,
            token_mask=token_mask,
        )  # fmt: skip

    if unwrapped is _inside.get():
        return run()
    logits = _ForwardRedirection()(model, unwrapped, run)
    head = _head(unwrapped)  # a sharded one is another tensor outside the forward
    return _whole(replace(logits, weight=head.weight, bias=head.bias))


class HeadError(ValueError):
    """A model's logits are not a linear head of hidden states with scale and softcap."""


def _split(model: nn.Module) -> hf.CausalLM:
    """Splits a model when it is first read; later only its head is looked up, which adapters may change."""
    try:
        known, head = getattr(model, "_distil_kernels_parts", None), hf.output_head(model)
        parts = known or hf.split(model, model.forward)
    except ValueError as error:
        raise HeadError(str(error)) from error
    model.__dict__ |= {"_distil_kernels_parts": parts, "_distil_kernels_head": head}  # and no child of the module
    return replace(parts, weight=head.weight, bias=head.bias)


def _head(model: Any) -> nn.Linear:
    """Returns the head that a model was last read with."""
    return model.__dict__["_distil_kernels_head"]


def _where_heads_are_linear(
    method: Callable[..., Any], original: Callable[..., Any], reason: Callable[..., str | None] | None = None
) -> Callable[..., Any]:
    """Returns a method that is TRL's own where ours cannot be, and says so once.

    Args:
        reason: called with the method's arguments; says why a call is TRL's, None where it is not.
    """

    @functools.wraps(original)
    def either(self: Any, *args: Any, **kwargs: Any) -> Any:
        why = getattr(self, "_forms_logits_because", None) or (reason and reason(self, *args, **kwargs))
        if not why:
            try:
                return method(self, *args, **kwargs)
            except HeadError as error:
                if _inside.get() is not None:  # TRL computes the whole loss, and not this part of it
                    raise
                why = self._forms_logits_because = f"has a model that cannot be split: {error}"
        say_once(f"{type(self).__name__} {why}; so it keeps TRL's own loss, which forms logits")
        return original(self, *args, **kwargs)

    return either


_said: set[str] = set()


def say_once(message: str) -> None:
    """Warns of what is left to TRL, once for each message."""
    if message not in _said:
        _said.add(message)
        warnings.warn(f"[trl] {message}", stacklevel=4)


def _denominator(num_items: Any, num_counted: Tensor) -> Any:
    """Returns what a sum is divided by: the given number of tokens in the whole batch, or that of this one."""
    if num_items is None:
        return num_counted.clamp(min=1)
    return num_items.to(num_counted.device) if isinstance(num_items, Tensor) else num_items


def _softcap(value: float | None) -> float:
    return math.inf if value is None else value


def _whole(logits: UnformedLogits) -> UnformedLogits:
    """Returns logits whose head is whole, also where each process holds a part of it."""
    if not isinstance(logits.weight, DTensor):
        return logits
    bias = logits.bias.full_tensor() if isinstance(logits.bias, DTensor) else logits.bias
    return replace(logits, weight=logits.weight.full_tensor(), bias=bias)
