"""The contract between the driver and a back end.

A back end is a module of this package with three row kernels and one question:

    unavailable(device, dtype) -> str | None
        why it cannot run there, or None. `dtype` is that of the student's hidden states.
    row_stats(logits, student, teacher, tokens, cost) -> statistics [NUM_STATISTICS, R]
    row_grad(logits, student, teacher, tokens, statistics, cost, cost_weight, logprob_weight, out, terms=None)
        -> residual | None
    row_mixture(logits, student, teacher, statistics, cost)

`logits` is a `LogitPair`: the raw outputs [R, V] of the two lm_head products, float32 (float64 for float64 inputs).
Without a teacher both are the student's. `student` and `teacher` are `LogitTransform`s, which the kernels apply while
they read. `tokens` is int64 [R] or None. `cost` names the statistic that rows cost; JSD and STUDENT_MIXTURE_KL need a
second read of the logits, and are 0 unless they are the cost.

A process may hold a shard of the vocabulary. `row_stats` then reads the shard alone, and the statistics that `row_grad`
and `row_mixture` take are those of the whole: they read the maxima from there. A token of -1 lies in another shard.
`row_mixture` writes JSD and STUDENT_MIXTURE_KL to them, sums over the V entries that it reads.

`row_grad` writes d(cost_weight * cost + logprob_weight * log S[token]) / d raw student logit to `out` [R, V], which may
be `logits.student` itself; `terms` (`RowTerms`) adds what other terms of a loss contribute. A row whose weights are all
0 gets zeros whatever its logits hold, and with `terms` a cost of weight 0 may be anything. `out` may also be
bfloat16, on a GPU float16 too, the operand of the next products; then it has separate memory, or on the CPU the first
half of each row of `logits.student`. It returns the residual [R]: what the sum of each row lost to rounding; None if
nothing was rounded.

Three more kernels are optional. Without `row_stats_grad` or `head_stats` the driver calls the two above, without
`cost_to_go` that of `reference`:

    row_stats_grad(logits, student, teacher, tokens, cost, cost_weight, out) -> statistics, residual | None
        row_stats and row_grad in one kernel, for row weights that are known before the statistics
    head_stats(student_hidden, student_weight, teacher_hidden, teacher_weight, student, teacher, tokens) -> statistics
        row_stats of the logits of hidden states and heads, which are never in memory
    cost_to_go(costs, slots, later, discount, horizon) -> to_go [P, B], next_later
        for each of P positions of B sequences sum_{0 < k <= horizon} discount^k cost[position + k]; horizon None for no
        limit. slots [P, B] int64 is the index into costs [R], -1 for none (a cost of 0). `later` is what the call for
        the later positions returned, in a form of the back end's choice; None if there are no later positions

The driver calls nothing else of a back end; all other matrix products belong to `distil_kernels.engine.gemm`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple, TypeVar

from torch import Tensor


class Statistic(IntEnum):
    """Rows of a statistics matrix, as in csrc/distil_kernels.h."""

    FORWARD_CE = 0
    FORWARD_KL = 1
    REVERSE_KL = 2
    LOGPROB = 3
    TEACHER_LOGPROB = 4
    ENTROPY = 5
    TEACHER_ENTROPY = 6
    AGREE = 7
    MAX_LOGIT = 8
    LOG_NORMALIZER = 9
    TEACHER_MAX_LOGIT = 10
    TEACHER_LOG_NORMALIZER = 11
    JSD = 12
    STUDENT_MIXTURE_KL = 13


NUM_STATISTICS = len(Statistic)


class Cost(NamedTuple):
    """The cost of a row."""

    statistic: Statistic = Statistic.FORWARD_CE
    """FORWARD_CE, FORWARD_KL (which has the same gradient), REVERSE_KL, JSD or ENTROPY."""
    jsd_weight: float = 0.5
    """The weight b of the JSD b KL(T || M) + (1 - b) KL(S || M), M = b T + (1 - b) S."""


FORWARD_CE = Cost()


class TermWeight(IntEnum):
    """Rows of `RowTerms.weights`, as in csrc/distil_kernels.h: what each number of a row is the factor of."""

    STUDENT = 0
    """Of S."""
    STUDENT_LOG = 1
    """Of S log S."""
    UNIFORM = 2
    """Of 1."""
    LABEL = 3
    """Of onehot(label)."""


class RowTerms(NamedTuple):
    """What the gradient of some rows by their logits takes beside cost and token."""

    weights: Tensor
    """[4, R] in the dtype of the logits, contiguous; rows are `TermWeight`."""
    labels: Tensor | None
    """[R] int64, read where the label's weight is not 0; None for no labels."""


class LogitPair(NamedTuple):
    """Raw logits [R, V] of the same rows, before bias, softcap and temperature."""

    student: Tensor
    teacher: Tensor


@dataclass(frozen=True)
class LogitTransform:
    """logit = softcap * tanh((raw + bias) / softcap) / temperature; without tanh where softcap is None."""

    bias: Tensor | None
    """[V] in the dtype of the logits, or None."""
    softcap: float | None
    temperature: float


class LogitScaling(NamedTuple):
    """The numbers of logit = softcap * tanh(scale * (raw + bias) / softcap) / temperature; no tanh without softcap."""

    temperature: float = 1.0
    softcap: float | None = None
    scale: float = 1.0
    """Above 0."""

    def transform(self, bias: Tensor | None) -> LogitTransform:
        """Returns what the row kernels apply: a scale c is another softcap and temperature, since

        k tanh(c x / k) / T  =  (k / c) tanh(x / (k / c)) / (T / c)
        """
        softcap = None if self.softcap is None else self.softcap / self.scale
        return LogitTransform(bias, softcap, self.temperature / self.scale)


Function = TypeVar("Function", bound=Callable[..., Any])


def constant_to_dynamo(function: Function) -> Function:
    """Has torch.compile call a function while it traces, and take the result as a constant.

    torch.compiler.assume_constant_result sets the same mark, and imports torch._dynamo and triton for it.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
