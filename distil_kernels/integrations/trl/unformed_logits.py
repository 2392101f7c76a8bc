"""Logits that stand as hidden states and head, and what TRL's trainers compute from logits, without forming them.

TRL's trainers cut logits, divide them by a temperature and hand them to functions. `UnformedLogits` stands in their
place; the functions here compute the same from it as TRL's from logits [B, T, V], by the names that they have there.
Losses are per token [B, T]; those of tokens that do not count are 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distil_kernels import fused_forward_kl, fused_jsd, fused_reverse_kl, token_logprobs

CHUNK_BYTES = 2**28
"""Memory for the float32 logits of a chunk of rows, where logits are formed (TRL's top-K losses)."""


@dataclass(frozen=True, eq=False)
class UnformedLogits:
    """Logits [B, T, V]: softcap * tanh(scale * (hidden @ weight^T + bias) / softcap) / temperature."""

    hidden: Tensor
    """[B, T, D], the states that the head reads."""
    weight: Tensor
    """[V, D]."""
    bias: Tensor | None = None
    """[V]."""
    scale: float = 1.0
    softcap: float = math.inf
    vocab_size: int | None = None
    """V, where the head has further rows that make no logits."""
    temperature: float = 1.0
    token_mask: Tensor | None = None
    """[B, T] bool, the tokens that can count; None: all."""

    def __getitem__(self, index: tuple[slice, slice, slice]) -> UnformedLogits:
        """Cuts sequences and tokens as slices of logits would; the vocabulary stays whole."""
        sequences, tokens, vocabulary = index
        if vocabulary != slice(None):
            raise IndexError(f"[UnformedLogits] expected the whole vocabulary (:), got {vocabulary}")
        mask = self.token_mask
        return replace(
            self,
            hidden=self.hidden[sequences, tokens],
            token_mask=None if mask is None else mask[sequences, tokens],
        )

    def __truediv__(self, temperature: float) -> UnformedLogits:
        return replace(self, temperature=self.temperature * temperature)

    def sum(self) -> Tensor:
        """Returns a number [] that depends on what logits depend on. TRL multiplies it by 0 where no token counts."""
        parts = [part.sum(dtype=torch.float32) for part in (self.hidden, self.weight, self.bias) if part is not None]
        return torch.stack(parts).sum()

    def formed(self, hidden: Tensor) -> Tensor:
        """Returns logits [n, V] of some rows of the hidden states [n, D]."""
        bias = None if self.bias is None else self.bias[: self.vocab_size]
        logits = nn.functional.linear(hidden, self.weight[: self.vocab_size], bias).float() * self.scale
        if math.isfinite(self.softcap):
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits / self.temperature

    def student_options(self) -> dict[str, Any]:
        """Returns this head as an op takes a student's."""
        return {
            "student_bias": self.bias,
            "student_logit_scale": self.scale,
            "vocab_size": self.vocab_size,
            "logit_softcap": self.softcap,
            "temperature": self.temperature,
        }

    def teacher_options(self) -> dict[str, Any]:
        """Returns this head as an op takes a teacher's, none of it by default."""
        return {
            "teacher_bias": self.bias,
            "teacher_logit_scale": self.scale,
            "teacher_logit_softcap": self.softcap,
            "teacher_temperature": self.temperature,
        }


def divergence(student: UnformedLogits, teacher: UnformedLogits, teacher_share: float, **options: Any) -> Tensor:
    """The divergence of TRL's `beta` and `alpha`, by an op whose `options` are those of `fused_forward_kl`.

    Args:
        teacher_share: the teacher's share of the mixture that both are compared with: 0 gives KL(T || S), 1 gives
            KL(S || T), what is between the generalised JSD.
    """
    heads = student.hidden, student.weight, teacher.hidden, teacher.weight
    options = student.student_options() | teacher.teacher_options() | {"token_mask": student.token_mask} | options
    if teacher_share == 0:
        return fused_forward_kl(*heads, **options)
    if teacher_share == 1:
        return fused_reverse_kl(*heads, **options)
    return fused_jsd(*heads, jsd_weight=teacher_share, **options)


def selective_log_softmax(logits: UnformedLogits, index: Tensor) -> Tensor:
    """Log-probs [B, T] of tokens, differentiable."""
    rows = logits.student_options()
    return token_logprobs(logits.hidden, logits.weight, tokens=index, token_mask=logits.token_mask, **rows).logprob


def compute_full_logit_self_distillation_loss(
    student_logits: UnformedLogits, teacher_logits: UnformedLogits, *, distillation_alpha: float
) -> Tensor:
    """The divergence over the whole vocabulary."""
    return divergence(student_logits, teacher_logits, distillation_alpha, reduction="none")


def in_row_chunks(
    function: Callable[[Tensor, Tensor], Tensor], student: UnformedLogits, teacher: UnformedLogits
) -> Tensor:
    """A loss per token from logits that are formed for a chunk of rows at a time, and again for its gradient.

    Args:
        function: computes losses [n] from logits [n, V] of the student and [n, V] of the teacher.
    """
    shape = student.hidden.shape[:-1]
    counted = student.token_mask
    rows = torch.arange(shape.numel()) if counted is None else counted.flatten().nonzero().squeeze(1)
    rows = rows.to(student.hidden.device)

    def chunk(student_rows: Tensor, teacher_rows: Tensor) -> Tensor:
        with torch.no_grad():
            teacher_logits = teacher.formed(teacher_rows)
        return function(student.formed(student_rows), teacher_logits)

    chunk_rows = max(1, CHUNK_BYTES // (4 * student.weight.shape[0]))
    student_rows, teacher_rows = (logits.hidden.flatten(0, 1)[rows] for logits in (student, teacher))
    values = [
        checkpoint(chunk, *pair, use_reentrant=False)
        for pair in zip(student_rows.split(chunk_rows), teacher_rows.split(chunk_rows), strict=True)
    ]
    losses = torch.zeros(shape.numel(), device=rows.device).index_put((rows,), torch.cat(values))
    return losses.reshape(shape)
