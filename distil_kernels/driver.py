"""The driver: cuts rows into chunks, owns buffers, matrix products and order, and lets a back end do the rows.

    for each chunk of rows (last position first when credit flows back in time):
        logits  = hidden @ weight^T           both models, float32
        stats   = row_stats(logits)           one pass over the vocabulary
        weights = credit of the costs         known by now: later positions came first
        dlogits = row_grad(logits, weights)   overwrites the student's logits
        dh      = dlogits @ W,  dW += dlogits^T @ h

Peak extra memory is one chunk of logits and the dW accumulator (formula in `plan`), whatever the number of rows.
A shared head takes both models' hidden states in one product. Rows that do not count are never touched, so they may
hold anything, NaN included. Callers have checked every argument.

Left out: a ring of gradient rows that decouples the dW product from small logits chunks. On a CPU reading and writing
dW once per chunk is under 1 % of its product; on a GPU it is not, and the ring comes with the GPU back ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from distil_kernels import gemm
from distil_kernels.backends import NUM_STATISTICS, LogitPair, LogitTransform, Statistic
from distil_kernels.credit import Chunk, Credit, CreditScan, reverse_chunks
from distil_kernels.plan import Plan

Rows = slice | Tensor
"""Which rows a chunk holds: a slice where they are consecutive (no copy), else int64 indices."""


@dataclass(frozen=True)
class Problem:
    """Inputs of one call: N rows, V vocabulary entries."""

    student_hidden: Tensor  # [N, D]
    student_weight: Tensor  # [V, D]
    teacher_hidden: Tensor  # [N, D_T]
    teacher_weight: Tensor | None  # [V, D_T]; None shares the student's
    student: LogitTransform
    teacher: LogitTransform
    tokens: Tensor | None  # [N] int64
    counted: Tensor | None  # [N] bool; None counts every row
    kernels: ModuleType

    @property
    def num_rows(self) -> int:
        return self.student_hidden.shape[0]

    @property
    def vocab_size(self) -> int:
        return self.student_weight.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Of logits, statistics and accumulators."""
        return gemm.accumulation_dtype(self.student_hidden.dtype)


class Gradients(NamedTuple):
    """Of the student's inputs; an input that needs none has an empty tensor."""

    hidden: Tensor  # [N, D] in the dtype of the hidden states
    weight: Tensor  # [V, D] in the accumulation dtype
    bias: Tensor  # [V] in the accumulation dtype


class Needs(NamedTuple):
    """Which gradients are wanted."""

    hidden: bool
    weight: bool
    bias: bool


NO_GRADIENTS = Needs(hidden=False, weight=False, bias=False)


class ScalarResult(NamedTuple):
    loss: Tensor  # [], sum over rows of weight * cost
    statistics: Tensor  # [NUM_STATISTICS, N]
    credit: Tensor  # [N], weights a_t
    gradients: Gradients


class RowsResult(NamedTuple):
    statistics: Tensor  # [NUM_STATISTICS, N]
    base_hidden: Tensor  # [N, D]: gradient for unit upstream of ce (`frozen_head`), else empty
    kept: Tensor  # [N, V]: gradient of the logits for unit upstream of ce (`kept_gradient`), else empty


class _Chunk(NamedTuple):
    """One chunk's inputs to the row kernels."""

    rows: Rows
    hidden: Tensor
    logits: LogitPair
    tokens: Tensor | None


class _Workspace:
    """Room for one chunk of both models' logits, filled again for every chunk."""

    def __init__(self, problem: Problem, chunk_rows: int) -> None:
        self._problem = problem
        self._logits = problem.student_hidden.new_empty(2 * chunk_rows, problem.vocab_size, dtype=problem.dtype)

    def load(self, rows: Rows) -> _Chunk:
        problem = self._problem
        hidden, teacher_hidden = problem.student_hidden[rows], problem.teacher_hidden[rows]
        num_rows = hidden.shape[0]
        both = self._logits[: 2 * num_rows]
        pair = LogitPair(both[:num_rows], both[num_rows:])
        if problem.teacher_weight is None:
            gemm.lm_head(torch.cat([hidden, teacher_hidden]), problem.student_weight, out=both)
        else:
            gemm.lm_head(hidden, problem.student_weight, out=pair.student)
            gemm.lm_head(teacher_hidden, problem.teacher_weight, out=pair.teacher)
        return _Chunk(rows, hidden, pair, None if problem.tokens is None else problem.tokens[rows])

    def row_stats(self, chunk: _Chunk) -> Tensor:
        problem = self._problem
        return problem.kernels.row_stats(chunk.logits, problem.student, problem.teacher, chunk.tokens)

    def row_grad(self, chunk: _Chunk, statistics: Tensor, ce_weight: Tensor, logprob_weight: Tensor | None) -> Tensor:
        """The gradient of the logits, in the place of the student's logits."""
        problem, out = self._problem, chunk.logits.student
        problem.kernels.row_grad(
            chunk.logits, problem.student, problem.teacher, chunk.tokens, statistics, ce_weight, logprob_weight, out
        )  # fmt: skip
        return out


class _GradientSums:
    """Takes chunks of logit gradients to the gradients of hidden states, weight and bias."""

    def __init__(self, hidden: Tensor, weight: Tensor, needs: Needs) -> None:
        dtype = gemm.accumulation_dtype(hidden.dtype)
        self._weight, self._needs = weight, needs
        self._result = Gradients(
            hidden.new_zeros(hidden.shape if needs.hidden else 0),
            weight.new_zeros(weight.shape if needs.weight else 0, dtype=dtype),
            weight.new_zeros(weight.shape[0] if needs.bias else 0, dtype=dtype),
        )

    def add(self, rows: Rows, hidden: Tensor, grad_logits: Tensor, upstream: Tensor | None = None) -> None:
        """`upstream` [R] scales rows of grad_logits that were formed before it was known."""
        if self._needs.hidden:
            grad = gemm.grad_hidden(grad_logits, self._weight)
            self._result.hidden[rows] = (grad if upstream is None else grad * upstream[:, None]).to(hidden.dtype)
        if upstream is not None:
            hidden = hidden.to(grad_logits.dtype) * upstream[:, None]
        if self._needs.weight:
            gemm.add_grad_weight(grad_logits, hidden, out=self._result.weight)
        if self._needs.bias:
            self._result.bias.add_(grad_logits.sum(0) if upstream is None else upstream @ grad_logits)

    def result(self) -> Gradients:
        return self._result


def scalar_loss(
    problem: Problem, plan: Plan, needs: Needs, row_weight: Tensor, cost: Statistic, credit: Credit, lengths: Tensor
) -> ScalarResult:
    """Sum over rows of row_weight * cost, and its sequence-level gradient.

    Args:
        row_weight: [N] in the accumulation dtype, 0 for rows that do not count.
        cost: FORWARD_CE or FORWARD_KL; their local gradients are the same.
        lengths: [B] int64 on the CPU, rows of each sequence.
    """
    one_pass = plan.name in ("gradient_in_forward", "frozen_head")
    compute = _in_one_pass if one_pass else _in_two_passes
    statistics, credit_weights, gradients = compute(problem, plan, needs, row_weight, cost, credit, lengths)
    return ScalarResult((row_weight * statistics[cost]).sum(), statistics, credit_weights, gradients)


def _in_one_pass(
    problem: Problem, plan: Plan, needs: Needs, row_weight: Tensor, cost: Statistic, credit: Credit, lengths: Tensor
) -> tuple[Tensor, Tensor, Gradients]:
    statistics = _new_statistics(problem)
    credit_weights = torch.zeros_like(row_weight)
    scan = CreditScan(credit, lengths, problem.dtype, row_weight.device)
    workspace = _Workspace(problem, plan.chunk_rows)
    sums = _GradientSums(problem.student_hidden, problem.student_weight, needs)
    for rows, credit_chunk in _ordered_chunks(problem, credit, lengths, plan.chunk_rows):
        chunk = workspace.load(rows)
        chunk_statistics = workspace.row_stats(chunk)
        statistics[:, rows] = chunk_statistics
        ce_weight, logprob_weight = row_weight[rows], None
        if credit_chunk is not None:
            logprob_weight = scan.weights(ce_weight * chunk_statistics[cost], credit_chunk)
            credit_weights[rows] = logprob_weight
        sums.add(rows, chunk.hidden, workspace.row_grad(chunk, chunk_statistics, ce_weight, logprob_weight))
    return statistics, credit_weights, sums.result()


def _in_two_passes(
    problem: Problem, plan: Plan, needs: Needs, row_weight: Tensor, cost: Statistic, credit: Credit, lengths: Tensor
) -> tuple[Tensor, Tensor, Gradients]:
    """Statistics of every row, then all the credit, then the gradient; for `recompute` and `stats_only`."""
    statistics = rows_statistics(problem, plan).statistics
    credit_weights = torch.zeros_like(row_weight)
    scan = CreditScan(credit, lengths, problem.dtype, row_weight.device)
    for rows, credit_chunk in _ordered_chunks(problem, credit, lengths, problem.num_rows):
        if credit_chunk is not None:
            credit_weights[rows] = scan.weights((row_weight * statistics[cost])[rows], credit_chunk)
    if plan.name == "stats_only":
        return (
            statistics,
            credit_weights,
            _GradientSums(problem.student_hidden, problem.student_weight, NO_GRADIENTS).result(),
        )
    logprob_weight = None if credit.span == "none" else credit_weights
    gradients = rows_backward(problem, plan.chunk_rows, needs, statistics, row_weight, logprob_weight)
    return statistics, credit_weights, gradients


def rows_statistics(problem: Problem, plan: Plan) -> RowsResult:
    """Statistics of every row that counts (0 elsewhere), and what the plan keeps for the backward pass."""
    statistics = _new_statistics(problem)
    keeps, frozen = plan.name == "kept_gradient", plan.name == "frozen_head"
    kept_shape = (problem.num_rows, problem.vocab_size) if keeps else 0
    kept = problem.student_hidden.new_zeros(kept_shape, dtype=problem.dtype)
    sums = _GradientSums(problem.student_hidden, problem.student_weight, Needs(frozen, False, False))
    workspace = _Workspace(problem, plan.chunk_rows)
    for rows in _plain_chunks(problem, plan.chunk_rows):
        chunk = workspace.load(rows)
        chunk_statistics = workspace.row_stats(chunk)
        statistics[:, rows] = chunk_statistics
        if keeps or frozen:
            grad = workspace.row_grad(chunk, chunk_statistics, torch.ones_like(chunk_statistics[0]), None)
            if keeps:
                kept[rows] = grad
            else:
                sums.add(rows, chunk.hidden, grad)
    return RowsResult(statistics, sums.result().hidden, kept)


def rows_backward(
    problem: Problem,
    chunk_rows: int,
    needs: Needs,
    statistics: Tensor,
    ce_weight: Tensor,
    logprob_weight: Tensor | None,
) -> Gradients:
    """Gradients of sum(ce_weight * ce + logprob_weight * logprob), logits computed anew. Weights are [N]."""
    workspace = _Workspace(problem, chunk_rows)
    sums = _GradientSums(problem.student_hidden, problem.student_weight, needs)
    for rows in _plain_chunks(problem, chunk_rows):
        chunk = workspace.load(rows)
        weights = ce_weight[rows], None if logprob_weight is None else logprob_weight[rows]
        sums.add(rows, chunk.hidden, workspace.row_grad(chunk, statistics[:, rows].contiguous(), *weights))
    return sums.result()


def kept_backward(
    student_hidden: Tensor, student_weight: Tensor, chunk_rows: int, needs: Needs, kept: Tensor, ce_weight: Tensor
) -> Gradients:
    """Gradients of sum(ce_weight * ce) from the kept gradient of the logits [N, V]."""
    sums = _GradientSums(student_hidden, student_weight, needs)
    for begin in range(0, student_hidden.shape[0], chunk_rows):
        rows = slice(begin, begin + chunk_rows)
        sums.add(rows, student_hidden[rows], kept[rows], ce_weight[rows])
    return sums.result()


def _plain_chunks(problem: Problem, chunk_rows: int) -> Iterator[Rows]:
    """Rows that count, in their own order."""
    if problem.counted is None:
        for begin in range(0, problem.num_rows, chunk_rows):
            yield slice(begin, min(begin + chunk_rows, problem.num_rows))
    else:
        yield from problem.counted.nonzero()[:, 0].split(chunk_rows)


def _ordered_chunks(
    problem: Problem, credit: Credit, lengths: Tensor, max_rows: int
) -> Iterator[tuple[Rows, Chunk | None]]:
    """Chunks in the order that the credit asks for."""
    if credit.span == "none":
        for rows in _plain_chunks(problem, max_rows):
            yield rows, None
    else:
        counted = None if problem.counted is None else problem.counted.cpu()
        for chunk in reverse_chunks(lengths, counted, credit, max_rows):
            yield chunk.rows.to(problem.student_hidden.device), chunk


def _new_statistics(problem: Problem) -> Tensor:
    return problem.student_hidden.new_zeros(NUM_STATISTICS, problem.num_rows, dtype=problem.dtype)
