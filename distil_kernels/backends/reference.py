"""Back end `reference`: the formulas of docs/mathematics.md in plain torch, for every device and dtype.

It runs where no kernel does, computes float64 for gradcheck, and is the version to read first. It needs about a dozen
temporaries of the chunk's size; the kernels need none. (The tests' oracle is written independently.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from distil_kernels.backends import Cost, LogitPair, LogitTransform, RowTerms, Statistic, TermWeight

_FLOOR = -1e30
"""Replaces minus infinity among shifted logits, so that 0 * logit is 0."""

_NEAR = 1e-5
"""A smaller divergence is summed from terms whose first order has cancelled."""

_TINY = 1e-37
"""A smaller probability counts as 0 in a quotient."""


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    return None


def row_stats(
    logits: LogitPair, student: LogitTransform, teacher: LogitTransform, tokens: Tensor | None, cost: Cost
) -> Tensor:
    s, s_max, s_index = _shifted(logits.student, student)
    t, t_max, t_index = _shifted(logits.teacher, teacher)
    s_log_normalizer, t_log_normalizer = s.logsumexp(-1), t.logsumexp(-1)
    s_probs = (s - s_log_normalizer[:, None]).exp()
    t_probs = (t - t_log_normalizer[:, None]).exp()
    gap = t - s
    log_ratio = s_log_normalizer - t_log_normalizer

    statistics = s.new_zeros(len(Statistic), s.shape[0])
    forward_kl = (t_probs * gap).sum(-1) + log_ratio
    teacher_entropy = t_log_normalizer - (t_probs * t).sum(-1)
    reverse_kl = -(s_probs * gap).sum(-1) - log_ratio
    statistics[Statistic.FORWARD_CE] = forward_kl + teacher_entropy
    statistics[Statistic.FORWARD_KL] = _with_digits(forward_kl, t_probs, s_probs, -gap - log_ratio[:, None])
    statistics[Statistic.REVERSE_KL] = _with_digits(reverse_kl, s_probs, t_probs, gap + log_ratio[:, None])
    if tokens is not None:
        statistics[Statistic.LOGPROB] = s.gather(1, tokens[:, None])[:, 0] - s_log_normalizer
        statistics[Statistic.TEACHER_LOGPROB] = t.gather(1, tokens[:, None])[:, 0] - t_log_normalizer
    statistics[Statistic.ENTROPY] = s_log_normalizer - (s_probs * s).sum(-1)
    statistics[Statistic.TEACHER_ENTROPY] = teacher_entropy
    statistics[Statistic.AGREE] = (s_index == t_index).to(s.dtype)
    statistics[Statistic.MAX_LOGIT] = s_max
    statistics[Statistic.LOG_NORMALIZER] = s_log_normalizer
    statistics[Statistic.TEACHER_MAX_LOGIT] = t_max
    statistics[Statistic.TEACHER_LOG_NORMALIZER] = t_log_normalizer
    if cost.statistic == Statistic.JSD:
        row_mixture(logits, student, teacher, statistics, cost)
    return statistics


def row_mixture(
    logits: LogitPair, student: LogitTransform, teacher: LogitTransform, statistics: Tensor, cost: Cost
) -> None:
    s_probs, t_probs = _probs(logits, student, teacher, statistics)
    weight = cost.jsd_weight
    student_kl = _mixture_kl(s_probs, t_probs, weight)
    statistics[Statistic.JSD] = weight * _mixture_kl(t_probs, s_probs, 1.0 - weight) + (1.0 - weight) * student_kl
    statistics[Statistic.STUDENT_MIXTURE_KL] = student_kl


def row_grad(
    logits: LogitPair,
    student: LogitTransform,
    teacher: LogitTransform,
    tokens: Tensor | None,
    statistics: Tensor,
    cost: Cost,
    cost_weight: Tensor,
    logprob_weight: Tensor | None,
    out: Tensor,
    terms: RowTerms | None = None,
) -> Tensor | None:
    derivative = _derivative(logits.student, student)
    s_log_normalizer = statistics[Statistic.LOG_NORMALIZER, :, None]
    t_log_normalizer = statistics[Statistic.TEACHER_LOG_NORMALIZER, :, None]
    s = _relative(_logits(logits.student, student), statistics[Statistic.MAX_LOGIT])
    t = _relative(_logits(logits.teacher, teacher), statistics[Statistic.TEACHER_MAX_LOGIT])
    s_probs, t_probs = (s - s_log_normalizer).exp(), (t - t_log_normalizer).exp()
    if cost.statistic == Statistic.REVERSE_KL:
        log_ratio = (s - t) - (s_log_normalizer - t_log_normalizer)
        cost_grad = s_probs * (log_ratio - statistics[Statistic.REVERSE_KL, :, None])
    elif cost.statistic == Statistic.JSD:
        log_ratio = -_mixture_excess(s_probs, t_probs, cost.jsd_weight).log1p()
        centred = log_ratio - statistics[Statistic.STUDENT_MIXTURE_KL, :, None]
        cost_grad = (1.0 - cost.jsd_weight) * s_probs * centred
    elif cost.statistic == Statistic.ENTROPY:
        cost_grad = -s_probs * (s - s_log_normalizer + statistics[Statistic.ENTROPY, :, None])
    else:
        cost_grad = s_probs - t_probs
    grad = cost_weight[:, None] * cost_grad
    used = cost_weight != 0
    if terms is not None:
        grad = _add_terms(torch.where(used[:, None], grad, 0.0), s_probs, s - s_log_normalizer, terms)
        used = used | terms.weights.any(0)
    if logprob_weight is not None:
        assert tokens is not None
        grad -= logprob_weight[:, None] * s_probs
        is_here = tokens >= 0
        grad.scatter_add_(1, tokens.clamp(min=0)[:, None], torch.where(is_here, logprob_weight, 0.0)[:, None])
        used = used | (logprob_weight != 0)
    grad = torch.where(used[:, None], grad * derivative, 0.0)
    out.copy_(grad)
    return None if out.dtype == grad.dtype else (grad - out).sum(-1)


def _add_terms(grad: Tensor, probs: Tensor, logprobs: Tensor, terms: RowTerms) -> Tensor:
    """Adds the terms' gradient by the logits to `grad` [R, V]."""
    weights = terms.weights[:, :, None]
    grad += probs * (weights[TermWeight.STUDENT] + weights[TermWeight.STUDENT_LOG] * logprobs)
    grad += weights[TermWeight.UNIFORM]
    if terms.labels is not None:  # where there is none, the weight is 0
        grad.scatter_add_(1, terms.labels.clamp(min=0)[:, None], weights[TermWeight.LABEL])
    return grad


def cost_to_go(
    costs: Tensor, slots: Tensor, later: Tensor | None, discount: float, horizon: int | None
) -> tuple[Tensor, Tensor]:
    """Here `later` is [horizon, sequences], the next costs themselves; without a horizon [1, sequences], their whole
    discounted sum. Nothing is added and later subtracted, so no rounding error remains of costs beyond the horizon."""
    if later is None:
        later = costs.new_zeros(horizon or 1, slots.shape[1])
    values = torch.cat([on_grid(costs, slots), later])
    total = _discounted_sum(values, discount, horizon)
    return discount * total[1 : slots.shape[0] + 1], total[:1] if horizon is None else values[:horizon]


def on_grid(costs: Tensor, slots: Tensor) -> Tensor:
    """Returns the costs [R] on the grid of their slots, 0 where a slot is -1."""
    return torch.cat([costs, costs.new_zeros(1)])[slots]  # -1 is the last


def _discounted_sum(values: Tensor, discount: float, window: int | None) -> Tensor:
    """Returns sum_{p <= i < p + window} discount^(i - p) values[i] for each p of dimension 0, in log2(window) steps.

    Sums over 1, 2, 4, ... positions come from two of half their size; a window is a chain of some of them.
    """
    window = window or 1 << (values.shape[0] - 1).bit_length()
    total, covered = torch.zeros_like(values), 0
    part, size = values, 1
    while True:
        if window & size:
            total = total + discount**covered * _moved(part, covered)
            covered += size
        if 2 * size > window:
            return total
        part = part + discount**size * _moved(part, size)
        size *= 2


def _moved(values: Tensor, step: int) -> Tensor:
    """Returns values[p + step] for each p, 0 behind the end."""
    moved = torch.zeros_like(values)
    moved[: max(0, values.shape[0] - step)] = values[step:]
    return moved


def _with_digits(divergence: Tensor, probs: Tensor, others: Tensor, log_ratio: Tensor) -> Tensor:
    """Returns KL(P || Q) [R], below _NEAR as a sum of terms Q - P - P log(Q / P), which are never negative.

    A larger one is as it came: beside it the rounding of the normalisers, about 1e-7, is small.

    Args:
        log_ratio: log(Q / P).
    """
    near, far = probs * (log_ratio.expm1() - log_ratio), others - probs * (1.0 + log_ratio)
    return torch.where(divergence < _NEAR, torch.where(log_ratio.abs() < 0.5, near, far).sum(-1), divergence)


def _mixture_excess(probs: Tensor, others: Tensor, weight: float) -> Tensor:
    """Returns M / P - 1, with M the mixture that holds `weight` of the others; 0 where P is 0."""
    return torch.where(probs < _TINY, 0.0, weight * (others - probs) / probs.clamp(min=_TINY))


def _mixture_kl(probs: Tensor, others: Tensor, weight: float) -> Tensor:
    """Returns KL(P || M) as a sum of terms that are never negative: adding sum(M - P) = 0 avoids cancellation."""
    return (weight * (others - probs) - probs * _mixture_excess(probs, others, weight).log1p()).sum(-1)


def _cap(raw: Tensor, transform: LogitTransform) -> Tensor:
    """Returns tanh((raw + bias) / softcap), or raw + bias without a softcap."""
    biased = raw if transform.bias is None else raw + transform.bias
    return biased if transform.softcap is None else (biased / transform.softcap).tanh()


def _shifted(raw: Tensor, transform: LogitTransform) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the logits relative to their row's maximum, the maximum, and the index of its first occurrence."""
    logits = _logits(raw, transform)
    maximum, index = logits.max(-1)
    maximum = maximum.clamp(min=torch.finfo(raw.dtype).min)  # of a shard of the vocabulary all may be -inf
    return _relative(logits, maximum), maximum, index


def _probs(
    logits: LogitPair, student: LogitTransform, teacher: LogitTransform, statistics: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the probabilities [R, V] of both models, by normalisers from `statistics`."""
    s = _relative(_logits(logits.student, student), statistics[Statistic.MAX_LOGIT])
    t = _relative(_logits(logits.teacher, teacher), statistics[Statistic.TEACHER_MAX_LOGIT])
    s_log_normalizer, t_log_normalizer = statistics[[Statistic.LOG_NORMALIZER, Statistic.TEACHER_LOG_NORMALIZER]]
    return (s - s_log_normalizer[:, None]).exp(), (t - t_log_normalizer[:, None]).exp()


def _logits(raw: Tensor, transform: LogitTransform) -> Tensor:
    return _cap(raw, transform) * ((transform.softcap or 1.0) / transform.temperature)


def _relative(logits: Tensor, maximum: Tensor) -> Tensor:
    return (logits - maximum[:, None]).clamp(min=_FLOOR)


def _derivative(raw: Tensor, transform: LogitTransform) -> Tensor | float:
    """Returns d logit / d raw."""
    if transform.softcap is None:
        return 1.0 / transform.temperature
    return (1.0 - _cap(raw, transform).square()) / transform.temperature
