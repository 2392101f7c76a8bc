"""The losses as `torch.nn` modules: options at construction, tensors at the call.

    ForwardCELoss           fused_forward_ce
    ForwardKLLoss           fused_forward_kl
    ReverseKLLoss           fused_reverse_kl
    JSDLoss                 fused_jsd
    TopKCELoss              fused_topk_ce
    SequenceDistilLoss      fused_distil_loss
    TopKSequenceDistilLoss  fused_topk_distil_loss
    ClippedPolicyLoss       fused_policy_loss

    criterion = JSDLoss(jsd_weight=0.1, temperature=0.9)
    loss = criterion(hidden, head.weight, teacher_hidden, teacher_head.weight, token_mask=mask)

A module has neither parameters nor buffers. What a batch brings (heads, masks, weights, tokens, the normalizer) belongs
to the call. A wrong option is an error at construction: the function itself checks them, called with no rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn

from distil_kernels import distil, losses, policy, topk
from distil_kernels.backends.dispatch import BACKENDS
from distil_kernels.engine.checks import ArgumentChecks

OF_A_BATCH = frozenset(
    {
        "student_bias", "teacher_bias", "token_mask", "token_weight", "normalizer", "tokens", "cu_seqlens",
        "behaviour_logprobs", "advantages", "old_logprobs", "labels", "reference_logprobs",
    }
)  # fmt: skip
"""Keyword arguments of the functions that are given at the call."""


class _Loss(nn.Module):
    """A function of the library with its options fixed."""

    _function: ClassVar[Callable[..., Any]]

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options
        """Keyword arguments of the function, as they were given."""
        checks, known = ArgumentChecks(type(self).__name__), self.option_names()
        for name in options:
            if name in OF_A_BATCH:
                checks.type_error(f"{name} came at construction, expected at the call: it belongs to a batch")
            if name not in known:
                checks.type_error(f"{name!r} is no option, expected some of {sorted(known)}")
        backend = options.get("backend", "auto")
        checks.one_of("backend", backend, ("auto", *BACKENDS))
        # Whether a back end runs is the batch's matter, unless entries of the gradient are to be left out.
        if "backend" in known and not (options.get("gradient_threshold") and backend in ("auto", "cpu")):
            options = options | {"backend": "reference"}
        # No other process is asked while a module is made.
        options = {name: value for name, value in options.items() if name not in ("vocab_group", "sequence_parallel")}
        vocab_size = options.get("vocab_size")
        num_tokens = vocab_size if isinstance(vocab_size, int) and vocab_size > 0 else 1
        with torch.no_grad():
            self._without_rows(torch.empty(0, 1, device="cpu"), torch.empty(num_tokens, 1, device="cpu"), options)

    @classmethod
    def option_names(cls) -> frozenset[str]:
        """Returns the names of the options that the module takes."""
        parameters = inspect.signature(cls._function).parameters.values()
        names = {parameter.name for parameter in parameters if parameter.kind == parameter.KEYWORD_ONLY}
        if any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters):
            names |= losses.LossOptions.__annotations__.keys()
        return frozenset(names - OF_A_BATCH)

    def _without_rows(self, hidden: torch.Tensor, weight: torch.Tensor, options: dict[str, Any]) -> None:
        """Calls the function with hidden states [0, 1] and a head [V, 1]."""
        type(self)._function(hidden, weight, hidden, weight, **options)

    def forward(self, *tensors: torch.Tensor | None, **batch: Any) -> Any:
        """Calls the function: its positional arguments, what belongs to the batch, and the options."""
        return type(self)._function(*tensors, **batch, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class ForwardCELoss(_Loss):
    """`fused_forward_ce`: H(T, S), from (student_hidden, student_weight, teacher_hidden, teacher_weight=None)."""

    _function = staticmethod(losses.fused_forward_ce)


class ForwardKLLoss(_Loss):
    """`fused_forward_kl`: KL(T || S), called as `ForwardCELoss`."""

    _function = staticmethod(losses.fused_forward_kl)


class ReverseKLLoss(_Loss):
    """`fused_reverse_kl`: KL(S || T), called as `ForwardCELoss`."""

    _function = staticmethod(losses.fused_reverse_kl)


class JSDLoss(_Loss):
    """`fused_jsd`: b KL(T || M) + (1 - b) KL(S || M) with M = b T + (1 - b) S, called as `ForwardCELoss`."""

    _function = staticmethod(losses.fused_jsd)


class TopKCELoss(_Loss):
    """`fused_topk_ce`, from (student_hidden, student_weight, teacher_ids, teacher_logprobs)."""

    _function = staticmethod(topk.fused_topk_ce)

    def _without_rows(self, hidden: torch.Tensor, weight: torch.Tensor, options: dict[str, Any]) -> None:
        type(self)._function(hidden, weight, hidden.long(), hidden, **options)


class SequenceDistilLoss(_Loss):
    """`fused_distil_loss`, called as `ForwardCELoss` with tokens and cu_seqlens; returns a `DistilLoss`.

    A `baseline` of values and a `distil_weight` of tokens are given at the call, others at construction.
    """

    _function: ClassVar[Callable[..., Any]] = staticmethod(distil.fused_distil_loss)

    def _without_rows(self, hidden: torch.Tensor, weight: torch.Tensor, options: dict[str, Any]) -> None:
        type(self)._function(hidden, weight, hidden, weight, **self._sequences(hidden, options), **options)

    @staticmethod
    def _sequences(hidden: torch.Tensor, options: dict[str, Any]) -> dict[str, Any]:
        """Returns one group of empty sequences."""
        group_size = options.get("group_size")
        num_sequences = group_size if isinstance(group_size, int) and group_size > 0 else 1
        sequences: dict[str, Any] = {
            "tokens": torch.empty(0, dtype=torch.int64, device="cpu"),
            "cu_seqlens": torch.zeros(num_sequences + 1, dtype=torch.int64, device="cpu"),
        }
        for name in ("behaviour_logprobs", "advantages", "old_logprobs", "reference_logprobs"):
            sequences[name] = hidden[:, 0]
        return sequences | {"labels": sequences["tokens"]}


class TopKSequenceDistilLoss(SequenceDistilLoss):
    """`fused_topk_distil_loss`, called as `TopKCELoss` with tokens and cu_seqlens; returns a `DistilLoss`."""

    _function = staticmethod(topk.fused_topk_distil_loss)

    def _without_rows(self, hidden: torch.Tensor, weight: torch.Tensor, options: dict[str, Any]) -> None:
        type(self)._function(hidden, weight, hidden.long(), hidden, **self._sequences(hidden, options), **options)


class ClippedPolicyLoss(_Loss):
    """`fused_policy_loss`, from (student_hidden, student_weight, tokens=, advantages=); returns a `PolicyLoss`."""

    _function = staticmethod(policy.fused_policy_loss)

    def _without_rows(self, hidden: torch.Tensor, weight: torch.Tensor, options: dict[str, Any]) -> None:
        type(self)._function(hidden, weight, tokens=hidden[:, 0].long(), advantages=hidden[:, 0],
                             reference_logprobs=hidden[:, 0], **options)  # fmt: skip
