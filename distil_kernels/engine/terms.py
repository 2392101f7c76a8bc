"""Terms that a trainer adds to distillation. Each is a few numbers of a row, so all cost one gradient together.

    policy       policy_weight * -min(r A, clip(r) A)               r = S[y] / S_old[y], as in `policy`
    reference    reference_weight * (q - log q - 1)                 q = R[y] / S[y]
    label        label_weight * ((1 - e) -log S[l] + e mean_v -log S[v])
    z-loss       z_loss_weight * lse_S^2
    entropy      -entropy_weight * H(S)

S and lse_S are of the student's logits as the cost has them, with its scale, softcap and temperature. With a the sum of
what policy and reference give log S[y], u the label's weight, z and w those of z-loss and entropy, the gradient is

    ds = a (onehot(y) - S) + u (S - (1 - e) onehot(l) - e / V) + 2 z lse_S S + w S (log S + H(S))

of which the row kernels take what is in S, S log S, 1 and onehot(l) as one number each (`RowTerms`). What a label needs
beside the statistics comes from the chunk's logits: one entry of a row, and with smoothing one more read of it.

Sources: label smoothing as in torch's cross_entropy; z-loss PaLM (arXiv 2204.02311); the reference's term is the
estimator k3 of GRPO (arXiv 2402.03300).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from distil_kernels.backends import NUM_STATISTICS, LogitTransform, RowTerms, Statistic, TermWeight
from distil_kernels.engine.allocation import to_device
from distil_kernels.engine.policy import Policy, penalty
from distil_kernels.engine.vocab_shards import VocabShards

NO_LABEL = -100

_BLOCK = 4096
"""Columns of which softcapped logits are summed at once: their scratch is small beside a chunk of logits."""


class Terms(NamedTuple):
    """Numbers of the terms. Those of a term whose tensors are not given are not read."""

    policy: Policy
    """Clips of the ratio, and the weight of the entropy."""
    policy_weight: float
    reference_weight: float
    label_weight: float
    label_smoothing: float
    z_loss_weight: float


class TermTensors(NamedTuple):
    """Tensors of the terms, and the weight of the cost beside them."""

    distil_weight: Tensor | None = None
    """[1], [B] or [N]; None for 1."""
    advantages: Tensor | None = None
    """[B] or [N]."""
    old_logprobs: Tensor | None = None
    """[N]; None for the present ones, held constant."""
    labels: Tensor | None = None
    """[N] int64, NO_LABEL where there is none."""
    reference_logprobs: Tensor | None = None
    """[N]."""


NO_TENSORS = TermTensors()


class TermInputs(NamedTuple):
    """What a call has besides its cost."""

    settings: Terms | None = None
    """None where there is no term."""
    tensors: TermTensors = NO_TENSORS


class Term(IntEnum):
    """Rows of the terms' values."""

    POLICY = 0
    """The surrogate."""
    CLIPPED = 1
    """1 where the ratio is where the token gets no gradient, else 0."""
    REFERENCE = 2
    LABEL = 3
    """The smoothed cross-entropy of the label."""
    Z_LOSS = 4


NUM_TERMS = len(Term)

# Two statistics that the driver keeps behind those of the row kernels where there are labels.
_LABEL_LOGPROB = NUM_STATISTICS  # log S[l]
_MEAN_LOGPROB = NUM_STATISTICS + 1  # mean_v log S[v]; 0 without smoothing
NUM_WITH_LABELS = NUM_STATISTICS + 2


class TermGradients(NamedTuple):
    """What the terms of some rows add to their gradient."""

    logprob_weight: Tensor
    """[R], of grad log S[y]."""
    row_terms: RowTerms


@dataclass(frozen=True, kw_only=True)
class TermRows:
    """The terms of N rows."""

    settings: Terms
    vocab_size: int
    shards: VocabShards | None  # of the vocabulary; None: this process has all of it
    token_weight: Tensor  # [N], of every term, 0 for rows that do not count
    advantages: Tensor | None  # [N]
    old_logprobs: Tensor | None
    labels: Tensor | None
    reference_logprobs: Tensor | None

    @classmethod
    def of(
        cls,
        settings: Terms,
        tensors: TermTensors,
        token_weight: Tensor,
        lengths: Tensor,
        vocab_size: int,
        shards: VocabShards | None,
    ) -> TermRows:
        """Makes the record from the tensors of a call; `lengths` [B] as in `per_row`."""
        advantages = tensors.advantages
        return cls(
            settings=settings,
            vocab_size=vocab_size,
            shards=shards,
            token_weight=token_weight,
            advantages=None if advantages is None else per_row(advantages, lengths, token_weight.shape[0]),
            old_logprobs=tensors.old_logprobs,
            labels=tensors.labels,
            reference_logprobs=tensors.reference_logprobs,
        )

    def with_label_statistics(
        self, statistics: Tensor, raw: Tensor, student: LogitTransform, rows: slice | Tensor
    ) -> Tensor:
        """Returns the statistics [NUM_WITH_LABELS, R] of rows whose raw logits are [R, V]; as they are without labels.

        A label's logit is relative to the row's maximum before the normaliser is, as in the row kernels.
        """
        if self.labels is None:
            return statistics
        maximum, log_normalizer = statistics[Statistic.MAX_LOGIT], statistics[Statistic.LOG_NORMALIZER]
        label, logprob, mean = self._labels_here(rows), torch.zeros_like(maximum), torch.zeros_like(maximum)
        if raw.shape[1]:
            column = label.clamp(min=0)
            bias = None if student.bias is None else student.bias[column]
            logprob = _logits(raw.gather(1, column[:, None])[:, 0], bias, student) - maximum - log_normalizer
            logprob = logprob if self.shards is None else logprob.where(label >= 0, 0.0)
        if self.settings.label_smoothing:
            mean = _sum_of_logits(raw, student, maximum) / self.vocab_size
        of_labels = torch.stack([logprob, mean])
        if self.shards is not None:
            of_labels = self.shards.total(of_labels)
        if self.settings.label_smoothing:
            of_labels[1] -= log_normalizer
        return torch.cat([statistics, of_labels])

    def values(self, statistics: Tensor, rows: slice | Tensor) -> Tensor:
        """Returns each term's value [NUM_TERMS, R], without its weight; 0 for terms that are not there."""
        values = statistics.new_zeros(NUM_TERMS, statistics.shape[1])
        logprob = statistics[Statistic.LOGPROB]
        if self.advantages is not None:
            values[Term.POLICY], derivative = self._surrogate(logprob, rows)
            values[Term.CLIPPED] = (derivative == 0) & (values[Term.POLICY] != 0)
        if self.reference_logprobs is not None:
            values[Term.REFERENCE], _ = penalty(logprob, self.reference_logprobs[rows])
        if self.labels is not None:
            smoothing = self.settings.label_smoothing
            loss = -(1.0 - smoothing) * statistics[_LABEL_LOGPROB]
            if smoothing:  # else 0 times a mean that is infinite where an entry of the vocabulary is excluded
                loss = loss - smoothing * statistics[_MEAN_LOGPROB]
            values[Term.LABEL] = torch.where(self.labels[rows] == NO_LABEL, 0.0, loss)
        values[Term.Z_LOSS] = _lse(statistics).square()
        return values

    def total(self, values: Tensor, statistics: Tensor) -> Tensor:
        """Returns the weighted sum [] of values and statistics of all N rows."""
        settings = self.settings
        loss = settings.z_loss_weight * values[Term.Z_LOSS]
        loss = loss - settings.policy.entropy_weight * statistics[Statistic.ENTROPY]
        for tensor, weight, term in (
            (self.advantages, settings.policy_weight, Term.POLICY),
            (self.reference_logprobs, settings.reference_weight, Term.REFERENCE),
            (self.labels, settings.label_weight, Term.LABEL),
        ):
            if tensor is not None:
                loss = loss + weight * values[term]
        return torch.where(self.token_weight == 0, 0.0, self.token_weight * loss).sum()

    def gradients(self, statistics: Tensor, rows: slice | Tensor) -> TermGradients:
        """Returns what the terms of the rows add to their gradient."""
        settings, weight = self.settings, self.token_weight[rows]
        logprob, entropy_weight = statistics[Statistic.LOGPROB], settings.policy.entropy_weight
        logprob_weight = torch.zeros_like(weight)
        if self.advantages is not None:
            logprob_weight = settings.policy_weight * self._surrogate(logprob, rows)[1]
        if self.reference_logprobs is not None:
            _, derivative = penalty(logprob, self.reference_logprobs[rows])
            logprob_weight = logprob_weight + settings.reference_weight * derivative

        weights = weight.new_zeros(len(TermWeight), weight.shape[0])
        weights[TermWeight.STUDENT] = 2.0 * settings.z_loss_weight * _lse(statistics)
        weights[TermWeight.STUDENT] += entropy_weight * statistics[Statistic.ENTROPY]
        weights[TermWeight.STUDENT_LOG] = entropy_weight
        labels = None
        if self.labels is not None:
            labels = self._labels_here(rows)
            of_label = settings.label_weight * (self.labels[rows] != NO_LABEL).to(weight.dtype)
            weights[TermWeight.STUDENT] += of_label
            weights[TermWeight.UNIFORM] = -settings.label_smoothing / self.vocab_size * of_label
            weights[TermWeight.LABEL] = (settings.label_smoothing - 1.0) * of_label.where(labels >= 0, 0.0)
        used = weight != 0  # of another row the statistics may be anything
        logprob_weight, weights = (torch.where(used, weight * each, 0.0) for each in (logprob_weight, weights))
        return TermGradients(logprob_weight, RowTerms(weights, labels))

    def _labels_here(self, rows: slice | Tensor) -> Tensor:
        """Returns the labels [R] as ids of this process's shard, below 0 where there is none, or in another shard."""
        assert self.labels is not None
        labels = self.labels[rows].contiguous()  # row kernels know its address alone
        return labels if self.shards is None else self.shards.local_ids(labels)

    def _surrogate(self, logprob: Tensor, rows: slice | Tensor) -> tuple[Tensor, Tensor]:
        assert self.advantages is not None
        old = None if self.old_logprobs is None else self.old_logprobs[rows]
        return self.settings.policy.surrogate(logprob, self.advantages[rows], old)


def per_row(values: Tensor, lengths: Tensor, num_rows: int) -> Tensor:
    """Returns one value for each row [N] from one for all [1], one for each sequence [B], or [N] themselves.

    Args:
        lengths: [B] int64 on the CPU.
    """
    if values.shape[0] == num_rows:
        return values
    if values.shape[0] == 1:
        return values.expand(num_rows)
    return torch.repeat_interleave(values, to_device(lengths, values.device), output_size=num_rows)


def _lse(statistics: Tensor) -> Tensor:
    return statistics[Statistic.MAX_LOGIT] + statistics[Statistic.LOG_NORMALIZER]


def _logits(raw: Tensor, bias: Tensor | None, transform: LogitTransform) -> Tensor:
    """Returns the logits of some raw outputs with their biases."""
    biased = raw if bias is None else raw + bias
    if transform.softcap is None:
        return biased / transform.temperature
    return (biased / transform.softcap).tanh() * (transform.softcap / transform.temperature)


def _sum_of_logits(raw: Tensor, transform: LogitTransform, maximum: Tensor) -> Tensor:
    """Returns the sum [R] over the vocabulary of the logits less their row's maximum."""
    num_rows, vocab_size = raw.shape
    if transform.softcap is None:  # linear in the raw logits: no scratch, a third of the time
        total = raw.sum(1) if transform.bias is None else raw.sum(1) + transform.bias.sum()
        return total / transform.temperature - vocab_size * maximum
    total = raw.new_zeros(num_rows)
    for begin in range(0, vocab_size, _BLOCK):
        block = slice(begin, begin + _BLOCK)
        bias = None if transform.bias is None else transform.bias[block]
        total += _logits(raw[:, block], bias, transform).sum(1)
    return total - vocab_size * maximum
