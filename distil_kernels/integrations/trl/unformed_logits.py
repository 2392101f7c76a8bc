"""Logits that stand as hidden states and head, and what TRL's trainers compute from logits, without forming them.

TRL's trainers cut logits, divide them by a temperature and hand them to functions. `UnformedLogits` stands in their
place; the functions here compute the same from it as TRL's from logits [B, T, V], by the names that they have there.
What they return of tokens that do not count is 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distil_kernels import fused_forward_kl, fused_jsd, fused_reverse_kl, token_logprobs

CHUNK_BYTES = 2**28
"""Memory for the logits of a chunk of rows, or for the head's rows of their named tokens, where TRL wants top K."""


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

    def transformed(self, head_output: Tensor) -> Tensor:
        """Returns logits of what the head makes of hidden states."""
        logits = head_output * self.scale
        if math.isfinite(self.softcap):
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits / self.temperature

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answers torch.log_softmax over the vocabulary; all else that torch does with logits needs them."""
        if function in (torch.log_softmax, nn.functional.log_softmax):
            return UnformedLogprobs(args[0])
        return NotImplemented

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


@dataclass(frozen=True, eq=False)
class UnformedLogprobs:
    """Log-probs [B, T, V] over the vocabulary, of which some are asked for."""

    logits: UnformedLogits

    def __getitem__(self, index: tuple[slice, slice, slice]) -> UnformedLogprobs:
        return UnformedLogprobs(self.logits[index])

    @property
    def dtype(self) -> torch.dtype:
        return torch.promote_types(self.logits.hidden.dtype, torch.float32)

    @property
    def device(self) -> torch.device:
        return self.logits.hidden.device

    def gather(self, dim: int, index: Tensor) -> Tensor:
        """Returns the log-probs [B, T, K] of tokens, differentiable."""
        return named_logprobs(self.logits, index)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return named_logprobs(args[0].logits, kwargs["index"]) if function is torch.gather else NotImplemented


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


def compute_topk_self_distillation_loss(
    student_logits: UnformedLogits,
    teacher_logits: UnformedLogits,
    *,
    distillation_topk: int,
    distillation_alpha: float,
    distillation_add_tail: bool,
) -> Tensor:
    """The divergence over the student's top K tokens, with a bucket for all others or scaled to a mass of 1."""
    from trl.experimental.sdpo import loss_utils  # SDFT's are the same

    index = top_tokens(student_logits, distillation_topk)
    student_logprobs = named_logprobs(student_logits, index)
    with torch.no_grad():
        teacher_logprobs = named_logprobs(teacher_logits, index)
    if distillation_add_tail:
        student_logprobs, teacher_logprobs = map(loss_utils.add_tail_bucket, (student_logprobs, teacher_logprobs))
    else:
        student_logprobs, teacher_logprobs = student_logprobs.log_softmax(-1), teacher_logprobs.log_softmax(-1)
    return loss_utils.compute_divergence(student_logprobs, teacher_logprobs, distillation_alpha)


@torch.no_grad()
def top_tokens(logits: UnformedLogits, num_tokens: int) -> Tensor:
    """The ids [B, T, K] of the likeliest tokens, by logits that are formed for a chunk of rows at a time."""
    rows, hidden = _counted_rows(logits)
    weight = logits.weight[: logits.vocab_size]
    bias = None if logits.bias is None else logits.bias[: logits.vocab_size]
    chunk_rows = max(1, CHUNK_BYTES // (4 * weight.shape[0]))
    # The temperature, the scale and the softcap leave the order as it is.
    chosen = [nn.functional.linear(chunk, weight, bias).topk(num_tokens).indices for chunk in hidden.split(chunk_rows)]
    return _scattered(logits, rows, torch.cat(chosen))


def named_logprobs(logits: UnformedLogits, index: Tensor) -> Tensor:
    """Log-probs [B, T, K] of K tokens in each place, differentiable: from the log-prob of the first and the logits."""
    rows, hidden = _counted_rows(logits)
    index_rows = index.flatten(0, 1)[rows]

    def named_logits(hidden: Tensor, index: Tensor) -> Tensor:
        head_rows = nn.functional.embedding(index, logits.weight)
        if torch.is_autocast_enabled(hidden.device.type):  # rounded as the op that computes the log-prob rounds them
            dtype = torch.get_autocast_dtype(hidden.device.type)
            head_rows, hidden = head_rows.to(dtype), hidden.to(dtype)
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        output = (head_rows.to(dtype) * hidden.to(dtype).unsqueeze(1)).sum(-1)
        if logits.bias is not None:
            output = output + logits.bias[index]
        return logits.transformed(output)

    chunk_rows = max(1, CHUNK_BYTES // (4 * index.shape[-1] * hidden.shape[-1]))
    chunks = zip(hidden.split(chunk_rows), index_rows.split(chunk_rows), strict=True)
    named = torch.cat([checkpoint(named_logits, *chunk, use_reentrant=False) for chunk in chunks])
    named = _scattered(logits, rows, named - named[:, :1])
    return named + selective_log_softmax(logits, index[..., 0]).unsqueeze(-1)


def _counted_rows(logits: UnformedLogits) -> tuple[Tensor, Tensor]:
    """Returns the rows that can count [n], and their hidden states [n, D]."""
    hidden = logits.hidden.flatten(0, 1)
    if logits.token_mask is None:
        return torch.arange(hidden.shape[0], device=hidden.device), hidden
    rows = logits.token_mask.flatten().nonzero().squeeze(1)
    return rows, hidden[rows]


def _scattered(logits: UnformedLogits, rows: Tensor, values: Tensor) -> Tensor:
    """Returns values [n, K] of rows as [B, T, K], zero in the others."""
    shape = logits.hidden.shape[:-1]
    return values.new_zeros(shape.numel(), values.shape[-1]).index_put((rows,), values).reshape(*shape, -1)
