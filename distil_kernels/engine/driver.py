"""The driver: cuts rows into chunks, owns buffers, matrix products and order, and lets a back end do the rows.

    for each chunk of rows (last position first when credit flows back in time):
        logits  = hidden @ weight^T           both models, float32
        stats   = row_stats(logits)           one pass over the vocabulary
        weights = credit of the costs         known by now: later positions came first
        dlogits = row_grad(logits, weights)   overwrites the student's logits, or goes to the ring
        dh      = dlogits @ W,  dW += dlogits^T @ h      per chunk, or per full ring

Peak extra memory is one chunk of logits, the ring and the dW accumulator (formula in `plan`), whatever the number of
rows. A shared head takes both models' hidden states in one product. Rows that do not count are never touched, so they
may hold anything, NaN included. Callers have checked every argument.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from distil_kernels.backends import FORWARD_CE, NUM_STATISTICS, Cost, LogitPair, LogitTransform, Statistic
from distil_kernels.engine import gemm
from distil_kernels.engine.credit import Chunk, Credit, CreditScan, reverse_chunks
from distil_kernels.engine.gradients import NO_GRADIENTS, Gradients, GradientSums, Needs, Rows, new_rows
from distil_kernels.engine.kept_gradient import Kept, count_kept, new_kept
from distil_kernels.engine.plan import Plan


@dataclass(frozen=True)
class Problem:
    """Inputs of one call: N rows, V vocabulary entries."""

    student_hidden: Tensor  # [N, D]
    student_weight: Tensor  # [V, D]
    teacher_hidden: Tensor | None  # [N, D_T]; None for no teacher
    teacher_weight: Tensor | None  # [V, D_T]; None shares the student's
    student: LogitTransform
    teacher: LogitTransform
    tokens: Tensor | None  # [N] int64
    counted: Tensor | None  # [N] bool; None counts every row
    kernels: ModuleType
    cost: Cost = FORWARD_CE
    gradient_threshold: float = 0.0  # smaller entries of the logits' gradient, relative to their row, are left out
    denominator: Tensor | None = None  # [], of a scalar loss and its gradients; None for 1

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


class Policy(NamedTuple):
    """A policy-gradient loss of tokens that were sampled under other log-probs."""

    advantages: Tensor  # [N]
    old_logprobs: Tensor | None  # [N]; None for the present ones, held still
    clip_low: float | None  # the ratio stops counting below 1 - clip_low, for advantages below 0; None for never
    clip_high: float | None  # above 1 + clip_high, for advantages above 0
    entropy_weight: float

    def surrogate(self, logprob: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """-min(ratio A, clip(ratio) A) and its derivative by the log-prob, of some rows."""
        advantages = self.advantages[rows].to(logprob.dtype)
        old = logprob if self.old_logprobs is None else self.old_logprobs[rows].to(logprob.dtype)
        ratio = (logprob - old).exp()
        low = 0.0 if self.clip_low is None else 1.0 - self.clip_low
        high = math.inf if self.clip_high is None else 1.0 + self.clip_high
        clipped = ((ratio > high) & (advantages > 0)) | ((ratio < low) & (advantages < 0))
        loss = -torch.where(clipped, ratio.clamp(low, high), ratio) * advantages
        return loss, torch.where(clipped, 0.0, loss)


class PolicyResult(NamedTuple):
    loss: Tensor  # []
    statistics: Tensor  # [NUM_STATISTICS, N]
    surrogate: Tensor  # [N]
    clipped: Tensor  # [N] bool
    gradients: Gradients


class ScalarResult(NamedTuple):
    loss: Tensor  # [], sum over rows of weight * cost, over the denominator
    statistics: Tensor  # [NUM_STATISTICS, N]
    credit: Tensor  # [2, N], weights a_t and cost-to-go G_t
    dropped: Tensor  # [N], share of the row's absolute gradient below the threshold
    gradients: Gradients


class RowsResult(NamedTuple):
    statistics: Tensor  # [NUM_STATISTICS, N]
    base_hidden: Tensor  # [N, D]: gradient for unit upstream of the cost (`frozen_head`), else empty
    kept: Kept


class _Chunk(NamedTuple):
    """One chunk's inputs to the row kernels."""

    rows: Rows
    logits: LogitPair
    tokens: Tensor | None


class Workspace:
    """Room for one chunk of both models' logits, filled again for every chunk."""

    def __init__(self, problem: Problem, chunk_rows: int) -> None:
        self._problem = problem
        self._scale = None if problem.denominator is None else problem.denominator.reciprocal()
        num_models = 1 if problem.teacher_hidden is None else 2
        self._logits = new_rows(problem.student_hidden, num_models * chunk_rows, problem.vocab_size, problem.dtype)

    def load(self, rows: Rows) -> _Chunk:
        problem = self._problem
        hidden = problem.student_hidden[rows]
        num_rows = hidden.shape[0]
        tokens = None if problem.tokens is None else problem.tokens[rows]
        if problem.teacher_hidden is None:
            own = self._logits[:num_rows]
            gemm.lm_head(hidden, problem.student_weight, out=own)
            return _Chunk(rows, LogitPair(own, own), tokens)
        teacher_hidden = problem.teacher_hidden[rows]
        both = self._logits[: 2 * num_rows]
        pair = LogitPair(both[:num_rows], both[num_rows:])
        if problem.teacher_weight is None:
            gemm.lm_head(torch.cat([hidden, teacher_hidden]), problem.student_weight, out=both)
        else:
            gemm.lm_head(hidden, problem.student_weight, out=pair.student)
            gemm.lm_head(teacher_hidden, problem.teacher_weight, out=pair.teacher)
        return _Chunk(rows, pair, tokens)

    def row_stats(self, chunk: _Chunk) -> Tensor:
        problem = self._problem
        return problem.kernels.row_stats(chunk.logits, problem.student, problem.teacher, chunk.tokens, problem.cost)

    def row_grad(
        self, chunk: _Chunk, statistics: Tensor, cost_weight: Tensor, logprob_weight: Tensor | None, out: Tensor
    ) -> Tensor | None:
        problem = self._problem
        if logprob_weight is not None:
            logprob_weight = self._scaled(logprob_weight)
        return problem.kernels.row_grad(
            chunk.logits, problem.student, problem.teacher, chunk.tokens, statistics, problem.cost,
            self._scaled(cost_weight), logprob_weight, out,
        )  # fmt: skip

    def _scaled(self, weight: Tensor) -> Tensor:
        """Divided here and not once the gradients are summed: that would be a pass over dW, and round it twice."""
        return weight if self._scale is None else weight * self._scale

    def row_stats_grad(self, chunk: _Chunk, cost_weight: Tensor, out: Tensor) -> tuple[Tensor, Tensor | None]:
        """Both, where no weight depends on the statistics: back ends may then read the logits once."""
        problem = self._problem
        at_once = getattr(problem.kernels, "row_stats_grad", None)
        if at_once is not None:
            return at_once(
                chunk.logits, problem.student, problem.teacher, chunk.tokens, problem.cost, self._scaled(cost_weight),
                out,
            )  # fmt: skip
        statistics = self.row_stats(chunk)
        return statistics, self.row_grad(chunk, statistics, cost_weight, None, out)


def scalar_loss(
    problem: Problem, plan: Plan, needs: Needs, row_weight: Tensor, credit: Credit, lengths: Tensor
) -> ScalarResult:
    """Sum over rows of row_weight * cost over the problem's denominator, and its sequence-level gradient.

    Args:
        row_weight: [N] in the accumulation dtype, 0 for rows that do not count.
        lengths: [B] int64 on the CPU, rows of each sequence.
    """
    one_pass = plan.name in ("gradient_in_forward", "frozen_head")
    compute = _in_one_pass if one_pass else _in_two_passes
    statistics, credit_weights, sums = compute(problem, plan, needs, row_weight, credit, lengths)
    total = (row_weight * statistics[problem.cost.statistic]).sum()
    return ScalarResult(_divided(total, problem), statistics, credit_weights, sums.dropped, sums.result())


def policy_loss(problem: Problem, plan: Plan, needs: Needs, row_weight: Tensor, policy: Policy) -> PolicyResult:
    """Sum over rows of row_weight * (surrogate - entropy_weight * entropy), over the problem's denominator.

    The problem's cost is the entropy. A row's weights follow from its own log-prob, so one pass does for any rows in
    any order.
    """
    statistics, surrogate, clipped, sums = _policy_pass(problem, plan, needs, row_weight, policy)
    rows_loss = surrogate - policy.entropy_weight * statistics[Statistic.ENTROPY]
    total = _divided((row_weight * rows_loss).sum(), problem)
    return PolicyResult(total, statistics, surrogate, clipped, sums.result())


def _policy_pass(
    problem: Problem, plan: Plan, needs: Needs, row_weight: Tensor, policy: Policy
) -> tuple[Tensor, Tensor, Tensor, GradientSums]:
    """Statistics, surrogate, whether it is clipped, and the gradients, as `_in_one_pass` leaves them."""
    statistics = _new_statistics(problem)
    surrogate, clipped = torch.zeros_like(row_weight), torch.zeros_like(row_weight, dtype=torch.bool)
    workspace = Workspace(problem, plan.chunk_rows)
    sums = GradientSums(problem.student_hidden, problem.student_weight, needs, plan.ring_rows)
    for rows in plain_chunks(problem.counted, problem.num_rows, plan.chunk_rows):
        chunk, weight = workspace.load(rows), row_weight[rows]
        statistics[:, rows] = chunk_statistics = workspace.row_stats(chunk)
        surrogate[rows], derivative = policy.surrogate(chunk_statistics[Statistic.LOGPROB], rows)
        clipped[rows] = (derivative == 0) & (surrogate[rows] != 0)
        if any(needs):
            out = sums.room(chunk.logits.student)
            cost_weight = -policy.entropy_weight * weight
            rounding = workspace.row_grad(chunk, chunk_statistics, cost_weight, weight * derivative, out)
            sums.add(rows, out, rounding)
    return statistics, surrogate, clipped, sums


def _divided(total: Tensor, problem: Problem) -> Tensor:
    return total if problem.denominator is None else total / problem.denominator


def _in_one_pass(
    problem: Problem, plan: Plan, needs: Needs, row_weight: Tensor, credit: Credit, lengths: Tensor
) -> tuple[Tensor, Tensor, GradientSums]:
    """Statistics, credit, and the gradients but for the last products, which the caller asks for when the memory of
    the logits is free again: where they are the only ones, dW takes its place."""
    statistics = _new_statistics(problem)
    credit_weights = row_weight.new_zeros(2, problem.num_rows)
    scan = CreditScan(credit, lengths, problem.kernels)
    workspace = Workspace(problem, plan.chunk_rows)
    sums = GradientSums(
        problem.student_hidden, problem.student_weight, needs, plan.ring_rows, problem.gradient_threshold
    )
    for rows, credit_chunk in _ordered_chunks(problem, credit, lengths, plan.chunk_rows):
        chunk = workspace.load(rows)
        cost_weight, out = row_weight[rows], sums.room(chunk.logits.student)
        if credit_chunk is None and credit.behaviour_logprobs is None:
            chunk_statistics, rounding = workspace.row_stats_grad(chunk, cost_weight, out)
        else:
            chunk_statistics = workspace.row_stats(chunk)
            cost_weight, found = scan.row_weights(
                chunk_statistics, problem.cost.statistic, cost_weight, rows, credit_chunk
            )
            credit_weights[:, rows] = found
            rounding = workspace.row_grad(chunk, chunk_statistics, cost_weight, found[0], out)
        statistics[:, rows] = chunk_statistics
        sums.add(rows, out, rounding)
    return statistics, credit_weights, sums


def _in_two_passes(
    problem: Problem, plan: Plan, needs: Needs, row_weight: Tensor, credit: Credit, lengths: Tensor
) -> tuple[Tensor, Tensor, GradientSums]:
    """Statistics of every row, then all the credit, then the gradient; for `recompute` and `stats_only`."""
    statistics = rows_statistics(problem, plan).statistics
    credit_weights = row_weight.new_zeros(2, problem.num_rows)
    scan = CreditScan(credit, lengths, problem.kernels)
    cost_weight = torch.zeros_like(row_weight)
    for rows, credit_chunk in _ordered_chunks(problem, credit, lengths, max(1, problem.num_rows)):
        cost_weight[rows], credit_weights[:, rows] = scan.row_weights(
            statistics[:, rows], problem.cost.statistic, row_weight[rows], rows, credit_chunk
        )
    if plan.name == "stats_only":
        nothing = GradientSums(problem.student_hidden, problem.student_weight, NO_GRADIENTS, ring_rows=0)
        return statistics, credit_weights, nothing
    logprob_weight = None if credit.span == "none" else credit_weights[0]
    return statistics, credit_weights, rows_backward(problem, plan, needs, statistics, cost_weight, logprob_weight)


def rows_statistics(problem: Problem, plan: Plan) -> RowsResult:
    """Statistics of every row that counts (0 elsewhere), and what the plan keeps for the backward pass."""
    keeps, frozen = plan.name == "kept_gradient", plan.name == "frozen_head"
    num_kept = count_kept(plan.name, problem.tokens)
    kept = new_kept(problem.student_hidden, problem.vocab_size, num_kept, problem.counted)
    sums = GradientSums(
        problem.student_hidden, problem.student_weight, Needs(frozen, False, False), plan.ring_rows if frozen else 0
    )
    one_read = problem.teacher_hidden is not None and problem.cost.statistic != Statistic.JSD
    if one_read and not (keeps or frozen) and hasattr(problem.kernels, "head_stats"):
        return RowsResult(_head_statistics(problem), sums.result().hidden, kept)
    statistics = _new_statistics(problem)
    workspace = Workspace(problem, plan.chunk_rows)
    for rows in plain_chunks(problem.counted, problem.num_rows, plan.chunk_rows):
        chunk = workspace.load(rows)
        if keeps:
            statistics[:, rows] = _keep_gradient(workspace, chunk, kept)
        elif frozen:
            ones, out = torch.ones_like(chunk.logits.student[:, 0]), sums.room(chunk.logits.student)
            statistics[:, rows], rounding = workspace.row_stats_grad(chunk, ones, out)
            sums.add(rows, out, rounding)
        else:
            statistics[:, rows] = workspace.row_stats(chunk)
    return RowsResult(statistics, sums.result().hidden, kept)


def _head_statistics(problem: Problem) -> Tensor:
    """Statistics of every row that counts from a kernel that forms no logits."""
    assert problem.teacher_hidden is not None
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


def _keep_gradient(workspace: Workspace, chunk: _Chunk, kept: Kept) -> Tensor:
    """Fills the chunk's rows of `kept`, returns its statistics."""
    rows, vocab_size = chunk.rows, chunk.logits.student.shape[1]
    ones = torch.ones_like(chunk.logits.student[:, 0])
    room = kept.rows[:, rows, :vocab_size]
    statistics, lost = workspace.row_stats_grad(chunk, ones, room[0])
    rounding = [lost]
    if len(room) == 2:
        rounding.append(workspace.row_grad(chunk, statistics, torch.zeros_like(ones), ones, room[1]))
    for own, lost in zip(kept.rounding, rounding, strict=True):
        if lost is not None:
            own[rows] = lost
    if isinstance(rows, Tensor):  # then `room` is a copy
        kept.rows[:, rows, :vocab_size] = room
    return statistics


def rows_backward(
    problem: Problem,
    plan: Plan,
    needs: Needs,
    statistics: Tensor,
    cost_weight: Tensor,
    logprob_weight: Tensor | None,
) -> GradientSums:
    """Gradients of sum(cost_weight * cost + logprob_weight * logprob), logits computed anew. Weights are [N]. The last
    products are the caller's to ask for, as after `_in_one_pass`."""
    workspace = Workspace(problem, plan.chunk_rows)
    sums = GradientSums(problem.student_hidden, problem.student_weight, needs, plan.ring_rows)
    for rows in plain_chunks(problem.counted, problem.num_rows, plan.chunk_rows):
        chunk = workspace.load(rows)
        out = sums.room(chunk.logits.student)
        score_weight = None if logprob_weight is None else logprob_weight[rows]
        rounding = workspace.row_grad(chunk, statistics[:, rows].contiguous(), cost_weight[rows], score_weight, out)
        sums.add(rows, out, rounding)
    return sums


def plain_chunks(counted: Tensor | None, num_rows: int, chunk_rows: int) -> Iterator[Rows]:
    """Rows that count ([N] bool, None for all), in their own order."""
    if counted is None:
        for begin in range(0, num_rows, chunk_rows):
            yield slice(begin, min(begin + chunk_rows, num_rows))
    else:
        rows = counted.nonzero()[:, 0]
        if rows.numel():  # split would give one chunk of none
            yield from rows.split(chunk_rows)


def _ordered_chunks(
    problem: Problem, credit: Credit, lengths: Tensor, max_rows: int
) -> Iterator[tuple[Rows, Chunk | None]]:
    """Chunks in the order that the credit asks for."""
    if credit.span == "none":
        for rows in plain_chunks(problem.counted, problem.num_rows, max_rows):
            yield rows, None
    else:
        counted = None if problem.counted is None else problem.counted.cpu()
        for chunk in reverse_chunks(lengths, counted, credit, max_rows, problem.student_hidden.device):
            yield chunk.rows, chunk


def _new_statistics(problem: Problem) -> Tensor:
    return problem.student_hidden.new_zeros(NUM_STATISTICS, problem.num_rows, dtype=problem.dtype)
