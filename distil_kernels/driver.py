"""The driver: cuts rows into chunks, owns buffers, matrix products and order, and lets a back end do the rows.

    for each chunk of rows (last position first when credit flows back in time):
        logits  = hidden @ weight^T           both models, float32
        stats   = row_stats(logits)           one pass over the vocabulary
        weights = credit of the costs         known by now: later positions came first
        dlogits = row_grad(logits, weights)   overwrites the student's logits, or goes to the ring
        dh      = dlogits @ W,  dW += dlogits^T @ h      per chunk, or per full ring

The ring holds gradient rows of several chunks in the dtype of the products' operands: on a GPU small chunks of logits
would otherwise read and write the whole float32 dW too often (`plan` has the numbers). On the CPU there is none.

Peak extra memory is one chunk of logits, the ring and the dW accumulator (formula in `plan`), whatever the number of
rows. A shared head takes both models' hidden states in one product. Rows that do not count are never touched, so they
may hold anything, NaN included. Callers have checked every argument.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from distil_kernels import gemm, memory
from distil_kernels.backends import NUM_STATISTICS, LogitPair, LogitTransform, Statistic
from distil_kernels.credit import Chunk, Credit, CreditScan, reverse_chunks
from distil_kernels.plan import Plan
from distil_kernels.sparse import LargeEntries, large_entries

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
    gradient_threshold: float = 0.0  # smaller entries of the logits' gradient, relative to their row, are left out

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
    credit: Tensor  # [2, N], weights a_t and cost-to-go G_t
    dropped: Tensor  # [N], share of the row's absolute gradient below the threshold
    gradients: Gradients


class RowsResult(NamedTuple):
    statistics: Tensor  # [NUM_STATISTICS, N]
    base_hidden: Tensor  # [N, D]: gradient for unit upstream of ce (`frozen_head`), else empty
    kept: Tensor  # [N, V]: gradient of the logits for unit upstream of ce (`kept_gradient`), else empty


class _Chunk(NamedTuple):
    """One chunk's inputs to the row kernels."""

    rows: Rows
    logits: LogitPair
    tokens: Tensor | None


class _Workspace:
    """Room for one chunk of both models' logits, filled again for every chunk."""

    def __init__(self, problem: Problem, chunk_rows: int) -> None:
        self._problem = problem
        self._logits = _new_rows(problem.student_hidden, 2 * chunk_rows, problem.vocab_size, problem.dtype)

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
        return _Chunk(rows, pair, None if problem.tokens is None else problem.tokens[rows])

    def row_stats(self, chunk: _Chunk) -> Tensor:
        problem = self._problem
        return problem.kernels.row_stats(chunk.logits, problem.student, problem.teacher, chunk.tokens)

    def row_grad(
        self, chunk: _Chunk, statistics: Tensor, ce_weight: Tensor, logprob_weight: Tensor | None, out: Tensor
    ) -> None:
        problem = self._problem
        problem.kernels.row_grad(
            chunk.logits, problem.student, problem.teacher, chunk.tokens, statistics, ce_weight, logprob_weight, out
        )  # fmt: skip

    def row_stats_grad(self, chunk: _Chunk, ce_weight: Tensor, out: Tensor) -> Tensor:
        """Both, where no weight depends on the statistics: back ends may then read the logits once."""
        problem = self._problem
        at_once = getattr(problem.kernels, "row_stats_grad", None)
        if at_once is not None:
            return at_once(chunk.logits, problem.student, problem.teacher, chunk.tokens, ce_weight, out)
        statistics = self.row_stats(chunk)
        self.row_grad(chunk, statistics, ce_weight, None, out)
        return statistics


class GradientSums:
    """Takes chunks of logit gradients to the gradients of hidden states, weight and bias.

    For each chunk: write its gradient to `room`, then `add` it. With a ring, rows wait there until it is full.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, needs: Needs, ring_rows: int, gradient_threshold: float = 0.0
    ) -> None:
        dtype = gemm.accumulation_dtype(hidden.dtype)
        self._gradient_threshold = gradient_threshold
        self.dropped = hidden.new_zeros(hidden.shape[0], dtype=dtype)
        self._hidden, self._weight, self._needs = hidden, weight, needs
        self._result = Gradients(
            hidden.new_zeros(hidden.shape if needs.hidden else 0),
            memory.zeros(*(weight.shape if needs.weight else (0,)), like=weight, dtype=dtype),
            weight.new_zeros(weight.shape[0] if needs.bias else 0, dtype=dtype),
        )
        operand = gemm.operand_dtype(hidden.dtype, hidden.device.type)
        self._ring = _new_rows(hidden, ring_rows, weight.shape[0], operand) if ring_rows else None
        self._waiting: list[Rows] = []
        self._num_waiting = 0

    def room(self, student_logits: Tensor) -> Tensor:
        """Where the gradient of the chunk's logits belongs."""
        if self._ring is None:
            return student_logits
        num_rows = student_logits.shape[0]
        if self._num_waiting + num_rows > self._ring.shape[0]:
            self._empty_ring()
        return self._ring[self._num_waiting : self._num_waiting + num_rows]

    def add(self, rows: Rows, grad_logits: Tensor) -> None:
        if self._ring is None:
            self.multiply(rows, grad_logits)
        else:
            self._waiting.append(rows)
            self._num_waiting += grad_logits.shape[0]

    def multiply(self, rows: Rows, grad_logits: Tensor, upstream: Tensor | None = None) -> None:
        """The products. `upstream` [R] scales rows of grad_logits that were formed before it was known."""
        kept = self._large_entries(rows, grad_logits)
        if self._needs.hidden:
            if kept is None:
                grad = gemm.grad_hidden(grad_logits, self._weight)
            else:
                grad = self._hidden.new_zeros(grad_logits.shape[0], self._hidden.shape[1], dtype=grad_logits.dtype)
                kept.add_product(self._weight, out=grad)
            self._result.hidden[rows] = (grad if upstream is None else grad * upstream[:, None]).to(self._hidden.dtype)
        if self._needs.weight:
            hidden = self._hidden[rows]
            if upstream is not None:
                hidden = (hidden.to(upstream.dtype) * upstream[:, None]).to(grad_logits.dtype)
            if kept is None:
                gemm.add_grad_weight(grad_logits, hidden, out=self._result.weight)
            else:
                kept.transposed().add_product(hidden, out=self._result.weight)
        if self._needs.bias:
            gemm.add_grad_bias(grad_logits, upstream, out=self._result.bias)

    def _large_entries(self, rows: Rows, grad_logits: Tensor) -> LargeEntries | None:
        """What the products may do with alone, or None for all."""
        if not self._gradient_threshold:
            return None
        kept, self.dropped[rows] = large_entries(grad_logits, self._gradient_threshold)
        return kept

    def result(self) -> Gradients:
        self._empty_ring()
        return self._result

    def _empty_ring(self) -> None:
        if self._waiting:
            assert self._ring is not None
            self.multiply(_joined(self._waiting), self._ring[: self._num_waiting])
            self._waiting, self._num_waiting = [], 0


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
    statistics, credit_weights, dropped, gradients = compute(problem, plan, needs, row_weight, cost, credit, lengths)
    return ScalarResult((row_weight * statistics[cost]).sum(), statistics, credit_weights, dropped, gradients)


def _in_one_pass(
    problem: Problem, plan: Plan, needs: Needs, row_weight: Tensor, cost: Statistic, credit: Credit, lengths: Tensor
) -> tuple[Tensor, Tensor, Tensor, Gradients]:
    """The fields of ScalarResult but for the loss."""
    statistics = _new_statistics(problem)
    credit_weights = row_weight.new_zeros(2, problem.num_rows)
    scan = CreditScan(credit, lengths, problem.dtype, row_weight.device)
    workspace = _Workspace(problem, plan.chunk_rows)
    sums = GradientSums(
        problem.student_hidden, problem.student_weight, needs, plan.ring_rows, problem.gradient_threshold
    )
    for rows, credit_chunk in _ordered_chunks(problem, credit, lengths, plan.chunk_rows):
        chunk = workspace.load(rows)
        ce_weight, out = row_weight[rows], sums.room(chunk.logits.student)
        if credit_chunk is None and credit.behaviour_logprobs is None:
            chunk_statistics = workspace.row_stats_grad(chunk, ce_weight, out)
        else:
            chunk_statistics = workspace.row_stats(chunk)
            ce_weight, found = scan.row_weights(chunk_statistics, cost, ce_weight, rows, credit_chunk)
            credit_weights[:, rows] = found
            workspace.row_grad(chunk, chunk_statistics, ce_weight, found[0], out)
        statistics[:, rows] = chunk_statistics
        sums.add(rows, out)
    return statistics, credit_weights, sums.dropped, sums.result()


def _in_two_passes(
    problem: Problem, plan: Plan, needs: Needs, row_weight: Tensor, cost: Statistic, credit: Credit, lengths: Tensor
) -> tuple[Tensor, Tensor, Tensor, Gradients]:
    """Statistics of every row, then all the credit, then the gradient; for `recompute` and `stats_only`."""
    statistics = rows_statistics(problem, plan).statistics
    credit_weights = row_weight.new_zeros(2, problem.num_rows)
    scan = CreditScan(credit, lengths, problem.dtype, row_weight.device)
    ce_weight = torch.zeros_like(row_weight)
    for rows, credit_chunk in _ordered_chunks(problem, credit, lengths, max(1, problem.num_rows)):
        ce_weight[rows], credit_weights[:, rows] = scan.row_weights(
            statistics[:, rows], cost, row_weight[rows], rows, credit_chunk
        )
    nothing_dropped = torch.zeros_like(row_weight)
    if plan.name == "stats_only":
        return (
            statistics,
            credit_weights,
            nothing_dropped,
            GradientSums(problem.student_hidden, problem.student_weight, NO_GRADIENTS, ring_rows=0).result(),
        )
    logprob_weight = None if credit.span == "none" else credit_weights[0]
    gradients = rows_backward(problem, plan, needs, statistics, ce_weight, logprob_weight)
    return statistics, credit_weights, nothing_dropped, gradients


def rows_statistics(problem: Problem, plan: Plan) -> RowsResult:
    """Statistics of every row that counts (0 elsewhere), and what the plan keeps for the backward pass."""
    keeps, frozen = plan.name == "kept_gradient", plan.name == "frozen_head"
    operand = gemm.operand_dtype(problem.student_hidden.dtype, problem.student_hidden.device.type)
    kept_shape = (problem.num_rows, problem.vocab_size) if keeps else 0
    kept = problem.student_hidden.new_zeros(kept_shape, dtype=operand)
    sums = GradientSums(
        problem.student_hidden, problem.student_weight, Needs(frozen, False, False), plan.ring_rows if frozen else 0
    )
    if not (keeps or frozen) and hasattr(problem.kernels, "head_stats"):
        return RowsResult(_head_statistics(problem), sums.result().hidden, kept)
    statistics = _new_statistics(problem)
    workspace = _Workspace(problem, plan.chunk_rows)
    for rows in plain_chunks(problem.counted, problem.num_rows, plan.chunk_rows):
        chunk = workspace.load(rows)
        ones = torch.ones_like(chunk.logits.student[:, 0])
        if keeps:
            statistics[:, rows] = _keep_gradient(workspace, chunk, ones, kept)
        elif frozen:
            out = sums.room(chunk.logits.student)
            statistics[:, rows] = workspace.row_stats_grad(chunk, ones, out)
            sums.add(rows, out)
        else:
            statistics[:, rows] = workspace.row_stats(chunk)
    return RowsResult(statistics, sums.result().hidden, kept)


def _head_statistics(problem: Problem) -> Tensor:
    """Statistics of every row that counts from a kernel that forms no logits."""
    rows: Rows = slice(None) if problem.counted is None else problem.counted.nonzero()[:, 0]
    teacher_weight = problem.student_weight if problem.teacher_weight is None else problem.teacher_weight
    found = problem.kernels.head_stats(
        problem.student_hidden[rows], problem.student_weight, problem.teacher_hidden[rows], teacher_weight,
        problem.student, problem.teacher, None if problem.tokens is None else problem.tokens[rows],
    )  # fmt: skip
    if problem.counted is None:
        return found
    statistics = _new_statistics(problem)
    statistics[:, rows] = found
    return statistics


def _keep_gradient(workspace: _Workspace, chunk: _Chunk, ce_weight: Tensor, kept: Tensor) -> Tensor:
    """Fills the chunk's rows of `kept`, returns its statistics."""
    if isinstance(chunk.rows, slice):
        return workspace.row_stats_grad(chunk, ce_weight, kept[chunk.rows])
    student_logits = chunk.logits.student
    out = student_logits if student_logits.dtype == kept.dtype else torch.empty_like(student_logits, dtype=kept.dtype)
    statistics = workspace.row_stats_grad(chunk, ce_weight, out)
    kept[chunk.rows] = out
    return statistics


def rows_backward(
    problem: Problem,
    plan: Plan,
    needs: Needs,
    statistics: Tensor,
    ce_weight: Tensor,
    logprob_weight: Tensor | None,
) -> Gradients:
    """Gradients of sum(ce_weight * ce + logprob_weight * logprob), logits computed anew. Weights are [N]."""
    workspace = _Workspace(problem, plan.chunk_rows)
    sums = GradientSums(problem.student_hidden, problem.student_weight, needs, plan.ring_rows)
    for rows in plain_chunks(problem.counted, problem.num_rows, plan.chunk_rows):
        chunk = workspace.load(rows)
        out, weights = (
            sums.room(chunk.logits.student),
            (ce_weight[rows], None if logprob_weight is None else logprob_weight[rows]),
        )
        workspace.row_grad(chunk, statistics[:, rows].contiguous(), *weights, out)
        sums.add(rows, out)
    return sums.result()


def kept_backward(
    student_hidden: Tensor, student_weight: Tensor, chunk_rows: int, needs: Needs, kept: Tensor, ce_weight: Tensor
) -> Gradients:
    """Gradients of sum(ce_weight * ce) from the kept gradient of the logits [N, V]."""
    sums = GradientSums(student_hidden, student_weight, needs, ring_rows=0)
    for begin in range(0, student_hidden.shape[0], chunk_rows):
        rows = slice(begin, begin + chunk_rows)
        sums.multiply(rows, kept[rows], ce_weight[rows])
    return sums.result()


def plain_chunks(counted: Tensor | None, num_rows: int, chunk_rows: int) -> Iterator[Rows]:
    """Rows that count ([N] bool, None for all), in their own order."""
    if counted is None:
        for begin in range(0, num_rows, chunk_rows):
            yield slice(begin, min(begin + chunk_rows, num_rows))
    else:
        yield from counted.nonzero()[:, 0].split(chunk_rows)


def _ordered_chunks(
    problem: Problem, credit: Credit, lengths: Tensor, max_rows: int
) -> Iterator[tuple[Rows, Chunk | None]]:
    """Chunks in the order that the credit asks for."""
    if credit.span == "none":
        for rows in plain_chunks(problem.counted, problem.num_rows, max_rows):
            yield rows, None
    else:
        counted = None if problem.counted is None else problem.counted.cpu()
        for chunk in reverse_chunks(lengths, counted, credit, max_rows):
            yield chunk.rows.to(problem.student_hidden.device), chunk


def _new_statistics(problem: Problem) -> Tensor:
    return problem.student_hidden.new_zeros(NUM_STATISTICS, problem.num_rows, dtype=problem.dtype)


def _new_rows(like: Tensor, num_rows: int, vocab_size: int, dtype: torch.dtype) -> Tensor:
    """[num_rows, V]. On a GPU rows begin at multiples of 64 bytes whatever V, for wide loads and fast products."""
    stride = vocab_size if like.device.type == "cpu" else -(-vocab_size // 32) * 32
    return memory.empty(num_rows, stride, like=like, dtype=dtype)[:, :vocab_size]


def _joined(chunks: list[Rows]) -> Rows:
    """The rows of consecutive chunks; still a slice where they are neighbours in order."""
    first, last = chunks[0], chunks[-1]
    if isinstance(first, slice) and isinstance(last, slice):
        return slice(first.start, last.stop)
    return torch.cat([chunk for chunk in chunks if isinstance(chunk, Tensor)])
