"""The driver's inputs and row arithmetic for a teacher of which only K tokens' log-probs are known in each row.

    CE = - sum_k p_k log S_k  -  p_tail log S_tail,       p_tail = 1 - sum_k p_k,   S_tail = sum of S over other tokens

All tokens that the teacher did not name are one bucket, so no mass is lost and nothing is claimed about its inside.
With P = sum_k p_k + p_tail (1 but for the rounding of log-probs, which stays: nothing is renormalised) and s the
student's logits

    dCE / ds_k = P S_k - p_k         dCE / ds_v = (P S_tail - p_tail) S_v / S_tail       (v in the tail)

The tail has a logsumexp of its own: 1 - sum_k S_k would be rounding where the student is sure. All logits are relative
to their row's maximum: normalisers lose no digits to an offset that all logits share. The gradient is linear in S, so
the credit's weight a of the log-prob needs no further pass:

    w dCE / ds + a dlog S[y] / ds  =  (w P - a) S - w p + a [y]         (p_tail distributed as S is within the tail)

The arithmetic of a row is plain torch on every device: three passes over a chunk of logits. Left out: a loss per token
with its own gradient, and row kernels of the other back ends.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distil_kernels.backends import LogitTransform, RowTerms, Statistic, TermWeight
from distil_kernels.engine.checks import check_named_tokens
from distil_kernels.engine.driver import Inputs, LogitChunk, Workspace
from distil_kernels.engine.gemm import round_rows
from distil_kernels.engine.gradients import Rows
from distil_kernels.engine.vocab_shards import VocabShards

_SUMMED = [Statistic.FORWARD_CE, Statistic.FORWARD_KL, Statistic.LOGPROB, Statistic.ENTROPY]
"""Statistics that are sums over named tokens or over the vocabulary, once its normaliser is known."""


@dataclass(frozen=True, kw_only=True)
class TopKInputs(Inputs):
    """Inputs of one call whose teacher names K tokens per row, in place of hidden states and a head."""

    teacher_ids: Tensor  # [N, K] int64, -1 where fewer are known
    teacher_logprobs: Tensor  # [N, K] in the precision that they were stored in

    def __post_init__(self) -> None:
        vocab_size = self.vocab_size if self.shards is None else self.shards.borders[-1]
        check_named_tokens(self.teacher_ids, self.teacher_logprobs, self.counted, vocab_size)

    def workspace(self, chunk_rows: int) -> TopKWorkspace:
        return TopKWorkspace(self, chunk_rows)


class TopKWorkspace(Workspace):
    """Memory for one chunk of the student's logits, and the buckets that both models put them in."""

    def __init__(self, inputs: TopKInputs, chunk_rows: int) -> None:
        super().__init__(inputs, chunk_rows)
        self._topk = inputs
        self._buckets: _Buckets | None = None

    def load(self, rows: Rows) -> LogitChunk:
        self._buckets = None  # its memory is free before the next chunk needs it
        chunk = super().load(rows)
        inputs = self._topk
        logprobs = inputs.teacher_logprobs[rows].to(inputs.dtype)
        self._buckets = _Buckets(
            chunk.logits.student, inputs.student, inputs.teacher_ids[rows], logprobs, inputs.shards
        )  # fmt: skip
        return chunk

    def _row_stats(self, chunk: LogitChunk) -> Tensor:
        assert self._buckets is not None
        tokens = self._topk.tokens
        return self._buckets.statistics(None if tokens is None else tokens[chunk.rows], chunk.tokens)

    def _row_grad(
        self,
        chunk: LogitChunk,
        statistics: Tensor,
        cost_weight: Tensor,
        logprob_weight: Tensor | None,
        out: Tensor,
        terms: RowTerms | None,
    ) -> Tensor | None:
        assert self._buckets is not None
        return round_rows(self._buckets.gradient(cost_weight, logprob_weight, chunk.tokens, terms), out)

    def row_stats_grad(self, chunk: LogitChunk, cost_weight: Tensor, out: Tensor) -> tuple[Tensor, Tensor | None]:
        statistics = self.row_stats(chunk)
        return statistics, self.row_grad(chunk, statistics, cost_weight, None, out)


class _Buckets:
    """R rows of both models: K named tokens and the tail.

    Args:
        raw: [R, V] outputs of the student's head.
        ids, logprobs: [R, K] of the teacher.
        shards: processes that hold the rest of the vocabulary.
    """

    def __init__(
        self, raw: Tensor, student: LogitTransform, ids: Tensor, logprobs: Tensor, shards: VocabShards | None
    ) -> None:
        num_rows, vocab_size = raw.shape
        self._shards = shards
        self._logits, self._derivative = _transformed(raw, student)
        self._maximum = _largest(self._logits)
        self._logits.sub_(self._maximum[:, None])

        # Logits of the named tokens; the tail is what remains when they are -inf. Tokens that are not known, or lie in
        # another shard, point to a column behind the vocabulary.
        self._ids, self._known = ids, ids >= 0
        here = ids if shards is None else shards.local_ids(ids)
        self._here = here >= 0
        self._column = torch.where(self._here, here, vocab_size)
        self._tail = raw.new_empty(num_rows, vocab_size + 1)
        self._tail[:, :-1] = self._logits
        self._tail[:, -1] = -torch.inf
        named_logits = self._tail.gather(1, self._column)
        self._tail.scatter_(1, self._column, -torch.inf)
        self._lse_tail = self._tail.logsumexp(1)
        self._lse = torch.logaddexp(self._lse_tail, named_logits.logsumexp(1))
        if shards is not None:
            shift = self._merge(shards)[:, None]
            for logits in (self._logits, self._tail, named_logits):
                logits.sub_(shift)

        # Probabilities of the buckets: the teacher's, and the student's as log-probs.
        self._logprobs = torch.where(self._known, logprobs, -torch.inf)
        self._probs = self._logprobs.exp()
        self._has_tail = self._lse_tail > -torch.inf
        tail_prob = (1.0 - self._logprobs.double().exp().sum(1)).clamp(min=0.0).to(raw.dtype)
        self._tail_prob = torch.where(self._has_tail, tail_prob, 0.0)
        self._named_logprobs = torch.where(self._here, named_logits - self._lse[:, None], 0.0)
        self._tail_logprob = torch.where(self._has_tail, self._lse_tail - self._lse, 0.0)

    def _merge(self, shards: VocabShards) -> Tensor:
        """Makes maximum, normalisers and likeliest token those of the whole vocabulary.

        Returns how far the maximum is above that of the shard [R].
        """
        likeliest = torch.zeros_like(self._lse)
        if shards.num_columns:
            likeliest += self._logits.argmax(1) + shards.columns.start  # exact below 2^24
        every = shards.gather(torch.stack([self._maximum, self._lse, self._lse_tail, likeliest])).double()
        maxima, lse, lse_tail, likeliest = every.unbind(1)
        top = maxima.amax(0)
        self._lse, self._lse_tail = ((maxima - top + each).logsumexp(0).to(self._lse.dtype) for each in (lse, lse_tail))
        self._likeliest = torch.where(maxima == top, likeliest, torch.inf).amin(0)
        shift = top.to(self._maximum.dtype) - self._maximum
        self._maximum = top.to(self._maximum.dtype)
        return shift

    def statistics(self, tokens: Tensor | None, tokens_here: Tensor | None) -> Tensor:
        """Returns the statistics [NUM_STATISTICS, R], 0 for those that K tokens do not determine.

        Without tokens only the costs are computed. The teacher's log-prob of a token that it did not name is NaN.

        Args:
            tokens: [R] ids of the whole vocabulary.
            tokens_here: [R] the same as ids of this process's shard, -1 for one of another.
        """
        statistics = self._lse.new_zeros(len(Statistic), self._lse.numel())
        cross_entropy = -(torch.where(self._here, self._probs, 0.0) * self._named_logprobs).sum(1)
        statistics[Statistic.FORWARD_CE], statistics[Statistic.FORWARD_KL] = cross_entropy, self._named_kl()
        if tokens is not None:
            assert tokens_here is not None
            logprobs = self._logits - self._lse[:, None]
            statistics[Statistic.LOGPROB] = _entries(logprobs, tokens_here)
            statistics[Statistic.ENTROPY] = torch.special.entr(logprobs.exp()).sum(1)
        if self._shards is not None:
            summed = _SUMMED[:2] if tokens is None else _SUMMED
            statistics[summed] = self._shards.total(statistics[summed])
        statistics[Statistic.FORWARD_CE] -= self._tail_prob * self._tail_logprob
        statistics[Statistic.FORWARD_KL] += self._tail_kl()
        if tokens is None:
            return statistics

        # The teacher's log-prob is known of the tokens that it named.
        is_token = self._ids == tokens[:, None]
        teacher_logprob = torch.where(is_token, self._logprobs, 0.0).sum(1)
        statistics[Statistic.TEACHER_LOGPROB] = torch.where(is_token.any(1), teacher_logprob, torch.nan)
        teacher_entropy = torch.special.entr(self._probs).sum(1) + torch.special.entr(self._tail_prob)
        statistics[Statistic.TEACHER_ENTROPY] = teacher_entropy

        # Whether the student's likeliest token is the likeliest one that was named.
        likeliest = self._ids.gather(1, self._logprobs.argmax(1, keepdim=True))[:, 0]
        of_student = self._logits.argmax(1) if self._shards is None else self._likeliest
        statistics[Statistic.AGREE] = (likeliest == of_student).to(statistics.dtype)
        statistics[Statistic.MAX_LOGIT], statistics[Statistic.LOG_NORMALIZER] = self._maximum, self._lse
        return statistics

    def _named_kl(self) -> Tensor:
        """Returns the terms of KL(T || S) of the named tokens that lie in this shard [R]."""
        return torch.where(self._here, _kl_terms(self._logprobs, self._named_logprobs), 0.0).sum(1)

    def _tail_kl(self) -> Tensor:
        """Returns the tail's term of KL(T || S) [R]."""
        return torch.where(self._has_tail, _kl_terms(self._tail_prob.log(), self._tail_logprob), 0.0)

    def gradient(
        self, cost_weight: Tensor, logprob_weight: Tensor | None, tokens: Tensor | None, terms: RowTerms | None
    ) -> Tensor:
        """Returns the gradient [R, V] of cost_weight * CE + logprob_weight * log S[tokens] + terms by the raw logits.

        It takes the memory of the tail, and with terms of the logits: buckets give one gradient.
        """
        factor = cost_weight * (self._probs.sum(1) + self._tail_prob)
        used = cost_weight != 0
        if logprob_weight is not None:
            factor, used = factor - logprob_weight, used | (logprob_weight != 0)
        if terms is not None:
            factor, used = factor + terms.weights[TermWeight.STUDENT], used | terms.weights.any(0)

        # Tail: its share of the gradient, distributed as the student's probabilities are.
        tail_share = factor * self._tail_logprob.exp() - cost_weight * self._tail_prob
        tail_share = torch.where(self._has_tail, tail_share, 0.0)
        grad = self._tail.sub_(torch.where(self._has_tail, self._lse_tail, 0.0)[:, None]).exp_()
        grad.mul_(tail_share[:, None])

        # Named tokens, and the sampled token.
        named = factor[:, None] * self._named_logprobs.exp() - cost_weight[:, None] * self._probs
        grad.scatter_(1, self._column, torch.where(self._here, named, 0.0))
        if logprob_weight is not None:
            assert tokens is not None
            column = torch.where(tokens >= 0, tokens, grad.shape[1] - 1)
            grad.scatter_add_(1, column[:, None], logprob_weight[:, None])
        if terms is not None:
            self._add_terms(grad, terms)
        return grad[:, :-1].mul_(self._derivative).masked_fill_(~used[:, None], 0.0)

    def _add_terms(self, grad: Tensor, terms: RowTerms) -> None:
        """Adds to `grad` [R, V + 1] what the terms take besides S."""
        weights = terms.weights[:, :, None]
        if terms.weights[TermWeight.STUDENT_LOG].any():
            logprobs = self._logits.sub_(self._lse[:, None]).clamp_(min=torch.finfo(grad.dtype).min / 1e4)
            grad[:, :-1].addcmul_(logprobs.exp().mul_(weights[TermWeight.STUDENT_LOG]), logprobs)
        grad.add_(weights[TermWeight.UNIFORM])
        if terms.labels is not None:  # where there is none, the weight is 0
            grad.scatter_add_(1, terms.labels.clamp(min=0)[:, None], weights[TermWeight.LABEL])


def _kl_terms(log_t: Tensor, log_s: Tensor) -> Tensor:
    """Returns S - T - T log(S / T) of buckets, whose sum is KL(T || S) and which are never negative.

    sum (S - T) = 0 has removed the first order, in which a small divergence would be lost. What rounding of the
    log-probs adds to the sum of T is no divergence.
    """
    dtype = log_s.dtype
    log_t, log_s = log_t.double(), log_s.double()
    log_ratio = torch.where(log_t > -torch.inf, log_s - log_t, 0.0)
    terms = torch.where(
        log_ratio.abs() < 0.5,
        log_t.exp() * (log_ratio.expm1() - log_ratio),
        log_s.exp() - log_t.exp() * (1.0 + log_ratio),
    )
    return torch.where(log_t > -torch.inf, terms, log_s.exp()).to(dtype)


def _largest(logits: Tensor) -> Tensor:
    """Returns the largest logit of each row [R]; a finite one also where a shard has none, or none above -inf."""
    lowest = torch.finfo(logits.dtype).min
    return logits.amax(1).clamp(min=lowest) if logits.shape[1] else logits.new_full(logits.shape[:1], lowest)


def _entries(matrix: Tensor, columns: Tensor) -> Tensor:
    """Returns the entry [R] of each row in its column; 0 where that is -1."""
    if not matrix.shape[1]:
        return matrix.new_zeros(matrix.shape[0])
    return torch.where(columns >= 0, matrix.gather(1, columns.clamp(min=0)[:, None])[:, 0], 0.0)


def _transformed(raw: Tensor, student: LogitTransform) -> tuple[Tensor, Tensor | float]:
    """Returns logits [R, V] after bias, softcap and temperature (new memory), and their derivative by `raw`."""
    biased = raw if student.bias is None else raw + student.bias
    if student.softcap is None:
        return biased / student.temperature, 1.0 / student.temperature
    capped = (biased / student.softcap).tanh()
    return capped * (student.softcap / student.temperature), (1.0 - capped.square()) / student.temperature
