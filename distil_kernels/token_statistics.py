"""Statistics of each token under a language model, from hidden states and heads, without [tokens, vocab] logits.

    token_stats      against a teacher: costs, log-probs, entropies; ce and log-prob are differentiable
    token_logprobs   without a teacher: log-prob and entropy, both differentiable

Each is one pass over the vocabulary. Gradients wait in memory for their upstream, or the logits are formed again in the
backward pass (`plan`). The formulas are in docs/mathematics.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from distil_kernels.backends import FORWARD_CE, Cost, Statistic
from distil_kernels.engine.call import Call
from distil_kernels.engine.checks import ArgumentChecks
from distil_kernels.engine.placements import on_many_devices
from distil_kernels.engine.plan import Plan

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class TokenStats(NamedTuple):
    """Statistics of each token in nats, float32 (float64 for float64 inputs). S: student, T: teacher, y: token.

    Rows that a mask leaves out hold 0 (False in `agree`). Without tokens both log-probs are NaN.
    """

    ce: Tensor
    """H(T, S)."""
    kl: Tensor
    """KL(T || S), summed as a difference of logits. On the CPU (and K named tokens everywhere) right to 1 % at 1e-9 and
    never negative; with back ends `cuda` and `triton` to about 1e-7, which may be below 0."""
    reverse_kl: Tensor
    """KL(S || T), as exact as `kl`."""
    logprob: Tensor
    """log S[y]."""
    teacher_logprob: Tensor
    """log T[y]."""
    entropy: Tensor
    """H(S)."""
    teacher_entropy: Tensor
    """H(T)."""
    lse: Tensor
    """logsumexp of the student's logits."""
    teacher_lse: Tensor
    """logsumexp of the teacher's logits."""
    agree: Tensor
    """bool: both have their largest logit at the same index."""


class TokenLogprobs(NamedTuple):
    """Log-prob and entropy of each token [...], in nats; float32 (float64 for float64 inputs). Masked rows hold 0.

    Without tokens the log-prob is NaN.
    """

    logprob: Tensor
    """log S[y], differentiable."""
    entropy: Tensor
    """H(S), differentiable."""
    lse: Tensor
    """logsumexp of the logits, detached."""


@on_many_devices
def token_stats(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor | None = None,
    *,
    tokens: Tensor | None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    vocab_size: int | None = None,
    vocab_group: ProcessGroup | None = None,
    sequence_parallel: bool = False,
    token_mask: Tensor | None = None,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    logit_softcap: float | None = None,
    teacher_logit_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float | None = None,
    detach_hidden: bool = False,
    backend: str = "auto",
    plan: str | Plan = "auto",
) -> TokenStats:
    """Everything that reinforcement learning by distillation needs per token, from one pass over the vocabulary.

    Args:
        tokens: [...] int64, the sampled tokens that the rows predict; None: log-probs are not asked for.
        Others as in `fused_forward_ce`.

    Returns:
        TokenStats, each field [...]. `ce` and `logprob` are differentiable with independent upstream gradients
        (plan "kept_gradient", or "recompute" where that would keep too much); the other fields are detached.

    Raises:
        As `fused_forward_ce`; ValueError for token ids outside the vocabulary (checked on the CPU).
    """
    checks = ArgumentChecks("token_stats")
    scalings = checks.scalings(
        temperature, logit_softcap, student_logit_scale, teacher_temperature, teacher_logit_softcap, teacher_logit_scale
    )
    call = Call(
        checks, scalings, backend, student_hidden, student_weight, teacher_hidden, teacher_weight,
        student_bias=student_bias, teacher_bias=teacher_bias, token_mask=token_mask,
        vocab_size=vocab_size, vocab_group=vocab_group, sequence_parallel=sequence_parallel,
        detach_hidden=detach_hidden,
    )  # fmt: skip
    checks.rows("tokens", tokens, student_hidden, "int64")
    statistics = call.differentiable_statistics(tokens, FORWARD_CE, plan)
    return from_statistics(statistics, student_hidden.shape[:-1], has_tokens=tokens is not None)


@on_many_devices
def token_logprobs(
    student_hidden: Tensor,
    student_weight: Tensor,
    *,
    tokens: Tensor | None,
    student_bias: Tensor | None = None,
    vocab_size: int | None = None,
    vocab_group: ProcessGroup | None = None,
    sequence_parallel: bool = False,
    token_mask: Tensor | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    detach_hidden: bool = False,
    backend: str = "auto",
    plan: str | Plan = "auto",
) -> TokenLogprobs:
    """Log-prob of each sampled token and entropy of its distribution, without [tokens, vocab] logits for all tokens.

    Args:
        student_hidden: [..., D] last hidden states.
        student_weight: [V, D] lm_head.
        tokens: [...] int64, the tokens that the rows predict; None: the entropy alone is asked for.
        Others, and what is raised: as in `fused_forward_ce`.
    """
    checks = ArgumentChecks("token_logprobs")
    scalings = checks.scalings(temperature, logit_softcap, student_logit_scale)
    call = Call(
        checks, scalings, backend, student_hidden, student_weight, student_bias=student_bias, token_mask=token_mask,
        vocab_size=vocab_size, vocab_group=vocab_group, sequence_parallel=sequence_parallel,
        detach_hidden=detach_hidden, has_teacher=False,
    )  # fmt: skip
    checks.rows("tokens", tokens, student_hidden, "int64")
    statistics = call.differentiable_statistics(tokens, Cost(Statistic.ENTROPY), plan)
    logprob, entropy = statistics[Statistic.LOGPROB], statistics[Statistic.ENTROPY]
    if tokens is None:
        logprob = torch.full_like(entropy, torch.nan)
    lse = (statistics[Statistic.MAX_LOGIT] + statistics[Statistic.LOG_NORMALIZER]).detach()
    return TokenLogprobs(*(row.reshape(student_hidden.shape[:-1]) for row in (logprob, entropy, lse)))


def from_statistics(statistics: Tensor, shape: torch.Size, *, has_tokens: bool) -> TokenStats:
    """Returns the fields of TokenStats from the rows of a statistics matrix [NUM_STATISTICS, N]."""

    def row(statistic: Statistic, source: Tensor) -> Tensor:
        return source[statistic].reshape(shape)

    detached = statistics.detach()
    stats = TokenStats(
        ce=row(Statistic.FORWARD_CE, statistics),
        kl=row(Statistic.FORWARD_KL, detached),
        reverse_kl=row(Statistic.REVERSE_KL, detached),
        logprob=row(Statistic.LOGPROB, statistics),
        teacher_logprob=row(Statistic.TEACHER_LOGPROB, detached),
        entropy=row(Statistic.ENTROPY, detached),
        teacher_entropy=row(Statistic.TEACHER_ENTROPY, detached),
        lse=row(Statistic.MAX_LOGIT, detached) + row(Statistic.LOG_NORMALIZER, detached),
        teacher_lse=row(Statistic.TEACHER_MAX_LOGIT, detached) + row(Statistic.TEACHER_LOG_NORMALIZER, detached),
        agree=row(Statistic.AGREE, detached) != 0,
    )
    if has_tokens:
        return stats
    unknown = torch.full_like(stats.lse, torch.nan)
    return stats._replace(logprob=unknown, teacher_logprob=unknown)
