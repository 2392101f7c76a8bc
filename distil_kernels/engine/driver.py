"""The driver: cuts rows into chunks, owns buffers, matrix products and order, and lets a back end compute the rows.

    for each chunk of rows (last position first when credit flows back in time):
        logits  = hidden @ weight^T           both models, float32
        stats   = row_stats(logits)           one pass over the vocabulary
        weights = credit of the costs         known by now: later positions came first
        dlogits = row_grad(logits, weights)   overwrites the student's logits, or goes to the staging buffer
        dh      = dlogits @ W,  dW += dlogits^T @ h      per chunk, or per full staging buffer

Peak extra memory is one chunk of logits, the staging buffer and the dW accumulator (formula in `sizes`), whatever the
number of rows. A shared head takes both models' hidden states in one product. Rows that do not count are never read, so
they may hold anything, NaN included. Callers have checked every argument.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import Self  # comes with torch

from distil_kernels.backends import (
    NUM_STATISTICS,
    Cost,
    LogitPair,
    LogitScaling,
    LogitTransform,
    RowTerms,
    Statistic,
)
from distil_kernels.backends.dispatch import BACKENDS
from distil_kernels.engine import gemm
from distil_kernels.engine.checks import check_labels, check_tokens, sequence_lengths
from distil_kernels.engine.credit import CreditChunk, CreditScan, reverse_chunks, siblings, weighted_cost
from distil_kernels.engine.gradients import NO_GRADIENTS, Gradients, GradientSums, Needs, Rows, new_rows
from distil_kernels.engine.kept_gradient import KeptGradient, count_kept, new_kept
from distil_kernels.engine.plan import Plan
from distil_kernels.engine.policy import penalty
from distil_kernels.engine.spec import Spec
from distil_kernels.engine.terms import NO_TENSORS, NUM_TERMS, NUM_WITH_LABELS, TermRows, TermTensors, per_row
from distil_kernels.engine.vocab_shards import VocabShards, agree


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Inputs of one call: N rows, V vocabulary entries, B sequences."""

    spec: Spec
    plan: Plan
    shards: VocabShards | None  # of the vocabulary; None: this process has all of it
    vocab_size: int  # of this process's shard
    student_hidden: Tensor  # [N, D]
    student_weight: Tensor  # [V or more, D]; rows from V on are padding, and so in the other head and in biases
    student: LogitTransform
    teacher_hidden: Tensor | None  # [N, D_T]; None for no teacher
    teacher_weight: Tensor | None  # [V, D_T]; None shares the student's
    teacher: LogitTransform
    tokens: Tensor | None  # [N] int64, ids of the whole vocabulary
    counted: Tensor | None  # [N] bool; None counts every row
    row_weight: Tensor  # [N] of the cost, in the accumulation dtype, 0 for rows that do not count
    denominator: Tensor | None  # [], of a scalar loss and its gradients; None for 1
    lengths: Tensor  # [B] int64 on the CPU, rows of each sequence
    baseline_values: Tensor | None  # [N], for the credit's baseline "values"
    behaviour_logprobs: Tensor | None  # [N]; None: the student sampled the tokens
    terms: TermRows | None  # what the loss has besides the cost

    @classmethod
    def of(
        cls,
        spec: Spec,
        plan: Plan,
        vocab_size: int,
        student_hidden: Tensor,
        student_weight: Tensor,
        student_bias: Tensor | None,
        teacher_hidden: Tensor | None,
        teacher_weight: Tensor | None,
        teacher_bias: Tensor | None,
        tokens: Tensor | None,
        counted: Tensor | None,
        *,
        row_weight: Tensor | None = None,
        denominator: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        baseline_values: Tensor | None = None,
        behaviour_logprobs: Tensor | None = None,
        term_tensors: TermTensors = NO_TENSORS,
        **named_tokens: Tensor,
    ) -> Self:
        """Makes the record from the tensors of a custom op; checks what depends on their values.

        Args:
            row_weight: None for 1.
            cu_seqlens: [B + 1]; None for one sequence.
            named_tokens: fields of a subclass.
        """
        num_rows, dtype = student_hidden.shape[0], gemm.accumulation_dtype(student_hidden.dtype)
        shards, whole_size = None, vocab_size
        if spec.shards is not None:
            shards, plan, teacher_rows = agree(
                spec.shards, plan, student_weight.shape[0], 0 if teacher_weight is None else teacher_weight.shape[0],
                same={
                    "the op or one of its options": spec.of_all_shards().encode(), "student_hidden": student_hidden,
                    "student_bias": None if student_bias is None else "given", "teacher_hidden": teacher_hidden,
                    "teacher_bias": None if teacher_bias is None else "given", "tokens": tokens,
                    "token_mask": counted, "token_weight": row_weight, "cu_seqlens": cu_seqlens,
                    "baseline": baseline_values, "behaviour_logprobs": behaviour_logprobs, **term_tensors._asdict(),
                    **named_tokens,
                },
            )  # fmt: skip
            whole_size, vocab_size = shards.borders[-1], shards.num_columns
            if teacher_weight is not None:
                teacher_weight = shards.of_teacher(teacher_weight, teacher_rows)
                teacher_bias = None if teacher_bias is None else shards.of_teacher(teacher_bias, teacher_rows)
        check_tokens(tokens, counted, whole_size)
        lengths = torch.tensor([num_rows], device="cpu")
        if cu_seqlens is not None:
            lengths = sequence_lengths(cu_seqlens, num_rows, spec.credit.group_size)

        if row_weight is None:
            row_weight = student_hidden.new_ones(num_rows, dtype=dtype)
        terms = None
        if spec.terms is not None:
            check_labels(term_tensors.labels, counted, whole_size)
            terms = TermRows.of(spec.terms, term_tensors, row_weight, lengths, whole_size, shards)
        if term_tensors.distil_weight is not None:
            distil_weight = per_row(term_tensors.distil_weight.to(dtype), lengths, num_rows)
            row_weight = (
                row_weight * distil_weight if counted is None else row_weight * distil_weight.where(counted, 0.0)
            )

        def transform(scaling: LogitScaling, bias: Tensor | None) -> LogitTransform:
            return scaling.transform(None if bias is None else bias[:vocab_size].to(dtype).contiguous())

        return cls(
            spec=spec,
            plan=plan,
            shards=shards,
            vocab_size=vocab_size,
            student_hidden=student_hidden,
            student_weight=student_weight,
            student=transform(spec.student, student_bias),
            teacher_hidden=teacher_hidden,
            teacher_weight=None if teacher_weight is None else teacher_weight[:vocab_size],
            teacher=transform(spec.teacher, teacher_bias),
            tokens=None if tokens is None else tokens.contiguous(),
            counted=counted,
            row_weight=row_weight,
            denominator=denominator,
            lengths=lengths,
            baseline_values=baseline_values,
            behaviour_logprobs=behaviour_logprobs,
            terms=terms,
            **named_tokens,
        )

    @property
    def num_rows(self) -> int:
        return self.student_hidden.shape[0]

    @property
    def student_head(self) -> Tensor:
        """The student's weight [V, D] without padding; a view."""
        return self.student_weight[: self.vocab_size]

    @property
    def kept_columns(self) -> int:
        """Columns for which plan `kept_gradient` has memory; a shard's padding is known when the op runs only."""
        return self.vocab_size if self.shards is None else self.student_weight.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of logits, statistics and sums."""
        return gemm.accumulation_dtype(self.student_hidden.dtype)

    @property
    def kernels(self) -> ModuleType:
        """The back end's row kernels."""
        return BACKENDS[self.spec.backend]

    @property
    def num_models(self) -> int:
        """The number of models whose logits are formed."""
        return 1 if self.teacher_hidden is None else 2

    def workspace(self, chunk_rows: int) -> Workspace:
        """Allocates the logits of one chunk."""
        return Workspace(self, chunk_rows)

    def divided(self, total: Tensor) -> Tensor:
        """Returns a sum over the denominator."""
        return total if self.denominator is None else total / self.denominator

    def new_statistics(self) -> Tensor:
        """Allocates zeros [NUM_STATISTICS, N], or [NUM_WITH_LABELS, N] where there are labels."""
        has_labels = self.terms is not None and self.terms.labels is not None
        num_statistics = NUM_WITH_LABELS if has_labels else NUM_STATISTICS
        return self.student_hidden.new_zeros(num_statistics, self.num_rows, dtype=self.dtype)

    def term_values(self, statistics: Tensor) -> Tensor:
        """Returns the value of each term [NUM_TERMS, N] from the statistics, 0 in rows that do not count."""
        assert self.terms is not None
        rows: Rows = slice(None) if self.counted is None else self.counted.nonzero()[:, 0]
        values = statistics.new_zeros(NUM_TERMS, self.num_rows)
        values[:, rows] = self.terms.values(statistics[:, rows], rows)
        return values

    def new_sums(self, plan: Plan) -> GradientSums:
        """Allocates the sums of the gradients that the call needs."""
        return self.sums_of(self.spec.needs, plan.staging_rows, self.spec.gradient_threshold)

    def sums_of(self, needs: Needs, staging_rows: int, gradient_threshold: float = 0.0) -> GradientSums:
        """Allocates sums of some gradients."""
        return GradientSums(
            self.student_hidden, self.student_weight, self.vocab_size, needs, staging_rows, gradient_threshold,
            self.shards,
        )  # fmt: skip

    def chunks(self, chunk_rows: int) -> Iterator[Rows]:
        """Yields the rows that count, in their own order."""
        if self.counted is None:
            for begin in range(0, self.num_rows, chunk_rows):
                yield slice(begin, min(begin + chunk_rows, self.num_rows))
        else:
            rows = self.counted.nonzero()[:, 0]
            if rows.numel():  # split would give one chunk of none
                yield from rows.split(chunk_rows)

    def ordered_chunks(self, max_rows: int) -> Iterator[tuple[Rows, CreditChunk | None]]:
        """Yields the rows that count in the order that the credit needs; the second entry is None without credit."""
        if self.spec.credit.span == "none":
            for rows in self.chunks(max_rows):
                yield rows, None
        else:
            counted = None if self.counted is None else self.counted.cpu()
            device = self.student_hidden.device
            for chunk in reverse_chunks(self.lengths, counted, self.spec.credit, max_rows, device):
                yield chunk.rows, chunk

    def credit_scan(self) -> CreditScan:
        """Begins the credit of the last position."""
        is_sibling = None
        if self.counted is not None and self.spec.credit.baseline == "leave_one_out":
            is_sibling = siblings(self.lengths, self.counted.cpu()).to(self.student_hidden.device)
        return CreditScan(
            self.spec.credit, self.lengths, self.kernels, self.baseline_values, self.behaviour_logprobs, is_sibling
        )


class ScalarResult(NamedTuple):
    """Result of `scalar_loss`."""

    loss: Tensor  # [], sum over rows of weight * cost and of the terms, over the denominator
    statistics: Tensor  # [NUM_STATISTICS, N]
    credit: Tensor  # [2, N], weights a_t and cost-to-go G_t
    dropped: Tensor  # [N], share of the row's absolute gradient below the threshold
    terms: Tensor  # [NUM_TERMS, N] values; [0, N] where the loss has no terms
    gradients: Gradients


class PolicyResult(NamedTuple):
    """Result of `policy_loss`."""

    loss: Tensor  # []
    statistics: Tensor  # [NUM_STATISTICS, N]
    surrogate: Tensor  # [N]
    clipped: Tensor  # [N] bool
    penalty: Tensor  # [N]
    gradients: Gradients


class RowsResult(NamedTuple):
    """Result of `rows_statistics`."""

    statistics: Tensor  # [NUM_STATISTICS, N]
    base_hidden: Tensor  # [N, D]: gradient for unit upstream of the cost (`frozen_head`), else empty
    kept: KeptGradient


class LogitChunk(NamedTuple):
    """One chunk's inputs to the row kernels."""

    rows: Rows
    logits: LogitPair
    tokens: Tensor | None  # -1 for one of another process's shard


_FIRST_READ = Cost()  # in place of the JSD, whose second read needs statistics of the whole vocabulary


class Workspace:
    """Memory for one chunk of both models' logits, filled again for every chunk."""

    def __init__(self, inputs: Inputs, chunk_rows: int) -> None:
        self._inputs = inputs
        self._scale = None if inputs.denominator is None else inputs.denominator.reciprocal()
        num_rows = inputs.num_models * chunk_rows
        self._logits = new_rows(inputs.student_hidden, num_rows, inputs.vocab_size, inputs.dtype)

    def load(self, rows: Rows) -> LogitChunk:
        """Forms the logits of some rows; those of the chunk before are overwritten."""
        inputs = self._inputs
        hidden = inputs.student_hidden[rows]
        num_rows = hidden.shape[0]
        tokens = None if inputs.tokens is None else inputs.tokens[rows]
        if tokens is not None and inputs.shards is not None:
            tokens = inputs.shards.local_ids(tokens)

        # Without a teacher the row kernels read the student's logits twice.
        if inputs.teacher_hidden is None:
            student_logits = self._logits[:num_rows]
            gemm.lm_head(hidden, inputs.student_head, out=student_logits)
            return LogitChunk(rows, LogitPair(student_logits, student_logits), tokens)

        # A shared head reads its weight once for both models.
        teacher_hidden = inputs.teacher_hidden[rows]
        both = self._logits[: 2 * num_rows]
        pair = LogitPair(both[:num_rows], both[num_rows:])
        if inputs.teacher_weight is None:
            gemm.lm_head(torch.cat([hidden, teacher_hidden]), inputs.student_head, out=both)
        else:
            gemm.lm_head(hidden, inputs.student_head, out=pair.student)
            gemm.lm_head(teacher_hidden, inputs.teacher_weight, out=pair.teacher)
        return LogitChunk(rows, pair, tokens)

    def row_stats(self, chunk: LogitChunk) -> Tensor:
        """Returns the chunk's statistics, rows as in `Inputs.new_statistics`."""
        inputs = self._inputs
        statistics = self._row_stats(chunk)
        if inputs.terms is None:
            return statistics
        return inputs.terms.with_label_statistics(statistics, chunk.logits.student, inputs.student, chunk.rows)

    def _row_stats(self, chunk: LogitChunk) -> Tensor:
        inputs = self._inputs
        if inputs.shards is not None:
            return self._merged(self._shard_statistics(chunk), chunk)
        return inputs.kernels.row_stats(chunk.logits, inputs.student, inputs.teacher, chunk.tokens, inputs.spec.cost)

    def _shard_statistics(self, chunk: LogitChunk) -> Tensor:
        """Returns the statistics of this process's shard."""
        inputs, num_rows = self._inputs, chunk.logits.student.shape[0]
        assert inputs.shards is not None
        if not inputs.vocab_size:
            return inputs.shards.no_statistics(self._logits, num_rows)
        tokens = None if chunk.tokens is None else chunk.tokens.clamp(min=0)
        cost = _FIRST_READ if inputs.spec.cost.statistic == Statistic.JSD else inputs.spec.cost
        return inputs.kernels.row_stats(chunk.logits, inputs.student, inputs.teacher, tokens, cost)

    def _merged(self, statistics: Tensor, chunk: LogitChunk) -> Tensor:
        """Returns the statistics of the whole vocabulary; those of the JSD come from a second read."""
        inputs = self._inputs
        assert inputs.shards is not None
        statistics = inputs.shards.merged(statistics, None if inputs.tokens is None else inputs.tokens[chunk.rows])
        if inputs.spec.cost.statistic == Statistic.JSD:
            if inputs.vocab_size:
                inputs.kernels.row_mixture(chunk.logits, inputs.student, inputs.teacher, statistics, inputs.spec.cost)
            of_mixture = [Statistic.JSD, Statistic.STUDENT_MIXTURE_KL]
            statistics[of_mixture] = inputs.shards.total(statistics[of_mixture])
        return statistics

    def row_grad(
        self, chunk: LogitChunk, statistics: Tensor, cost_weight: Tensor, logprob_weight: Tensor | None, out: Tensor
    ) -> Tensor | None:
        """Writes the gradient of sum(cost_weight * cost + logprob_weight * logprob + terms) by the logits to `out`.

        Returns the residual [R] of its rows, or None if nothing was rounded.
        """
        terms = None
        if self._inputs.terms is not None:
            of_terms, (weights, labels) = self._inputs.terms.gradients(statistics, chunk.rows)
            logprob_weight = of_terms if logprob_weight is None else logprob_weight + of_terms
            terms = RowTerms(self._scaled(weights), labels)
        if logprob_weight is not None:
            logprob_weight = self._scaled(logprob_weight)
        return self._row_grad(chunk, statistics, self._scaled(cost_weight), logprob_weight, out, terms)

    def _row_grad(
        self,
        chunk: LogitChunk,
        statistics: Tensor,
        cost_weight: Tensor,
        logprob_weight: Tensor | None,
        out: Tensor,
        terms: RowTerms | None,
    ) -> Tensor | None:
        inputs = self._inputs
        if not inputs.vocab_size:
            return None
        return inputs.kernels.row_grad(
            chunk.logits, inputs.student, inputs.teacher, chunk.tokens, statistics, inputs.spec.cost, cost_weight,
            logprob_weight, out, terms,
        )  # fmt: skip

    def row_stats_grad(self, chunk: LogitChunk, cost_weight: Tensor, out: Tensor) -> tuple[Tensor, Tensor | None]:
        """Does both, if no weight depends on the statistics: a back end may then read the logits once."""
        inputs = self._inputs
        in_one_read = getattr(inputs.kernels, "row_stats_grad", None)
        if in_one_read is not None and inputs.shards is None:
            return in_one_read(
                chunk.logits, inputs.student, inputs.teacher, chunk.tokens, inputs.spec.cost,
                self._scaled(cost_weight), out,
            )  # fmt: skip
        statistics = self.row_stats(chunk)
        return statistics, self.row_grad(chunk, statistics, cost_weight, None, out)

    def _scaled(self, weight: Tensor) -> Tensor:
        """Returns row weights over the denominator.

        Dividing the summed gradients instead would be one more pass over dW, and round it twice.
        """
        return weight if self._scale is None else weight * self._scale


def scalar_loss(inputs: Inputs, plan: Plan) -> ScalarResult:
    """Computes the sum over rows of row_weight * cost and of the terms over the denominator, and its gradient."""
    compute = _in_one_pass if plan.forms_gradient_in_forward else _in_two_passes
    statistics, credit_weights, sums = compute(inputs, plan)
    total = weighted_cost(statistics, inputs.spec.cost.statistic, inputs.row_weight).sum()
    values = total.new_zeros(0, inputs.num_rows)
    if inputs.terms is not None:
        values = inputs.term_values(statistics)
        total = total + inputs.terms.total(values, statistics)
    return ScalarResult(
        inputs.divided(total), statistics[:NUM_STATISTICS], credit_weights, sums.dropped, values, sums.result()
    )


def policy_loss(
    inputs: Inputs, plan: Plan, advantages: Tensor, old_logprobs: Tensor | None, reference_logprobs: Tensor | None
) -> PolicyResult:
    """Computes the sum over rows of row_weight * (surrogate - entropy_weight * entropy + reference_weight * penalty)
    over the denominator.

    The cost of the inputs is the entropy. A row's weights follow from its own log-prob, so one pass is enough for any
    rows in any order.

    Args:
        advantages: [N].
        old_logprobs: [N]; None for the present ones, held constant.
        reference_logprobs: [N]; None for no penalty.
    """
    policy = inputs.spec.policy
    assert policy is not None
    *rows, sums = _policy_pass(inputs, plan, advantages, old_logprobs, reference_logprobs)
    statistics, surrogate, clipped, penalties = rows
    rows_loss = surrogate - policy.entropy_weight * statistics[Statistic.ENTROPY]
    if reference_logprobs is not None:
        rows_loss = rows_loss + policy.reference_weight * penalties
    total = inputs.divided((inputs.row_weight * rows_loss).sum())
    return PolicyResult(total, statistics, surrogate, clipped, penalties, sums.result())


def _policy_pass(
    inputs: Inputs, plan: Plan, advantages: Tensor, old_logprobs: Tensor | None, reference_logprobs: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, GradientSums]:
    """Returns statistics, surrogate, where it is clipped, penalty, and the sums, whose last products are not yet
    computed."""
    policy = inputs.spec.policy
    assert policy is not None
    statistics = inputs.new_statistics()
    surrogate, penalties = torch.zeros_like(inputs.row_weight), torch.zeros_like(inputs.row_weight)
    clipped = torch.zeros_like(inputs.row_weight, dtype=torch.bool)
    workspace, sums = inputs.workspace(plan.chunk_rows), inputs.new_sums(plan)
    for rows in inputs.chunks(plan.chunk_rows):
        # Log-prob and entropy of the rows, and the surrogate with its derivative by the log-prob.
        chunk, weight = workspace.load(rows), inputs.row_weight[rows]
        statistics[:, rows] = chunk_statistics = workspace.row_stats(chunk)
        old = None if old_logprobs is None else old_logprobs[rows]
        logprob = chunk_statistics[Statistic.LOGPROB]
        surrogate[rows], derivative = policy.surrogate(logprob, advantages[rows], old)
        clipped[rows] = (derivative == 0) & (surrogate[rows] != 0)
        if reference_logprobs is not None:
            penalties[rows], pull = penalty(logprob, reference_logprobs[rows])
            derivative = derivative + policy.reference_weight * pull

        # The gradient comes through the entropy and through the log-prob.
        if any(inputs.spec.needs):
            out = sums.output_buffer(chunk.logits.student)
            cost_weight = -policy.entropy_weight * weight
            residual = workspace.row_grad(chunk, chunk_statistics, cost_weight, weight * derivative, out)
            sums.add(rows, out, residual)
    return statistics, surrogate, clipped, penalties, sums


def _in_one_pass(inputs: Inputs, plan: Plan) -> tuple[Tensor, Tensor, GradientSums]:
    """Returns statistics, credit and the sums, for plans `gradient_in_forward` and `frozen_head`.

    The last products run in `sums.result()`, after the logits are freed, so that dW can take their memory.
    """
    statistics = inputs.new_statistics()
    credit_weights = inputs.row_weight.new_zeros(2, inputs.num_rows)
    scan, workspace, sums = inputs.credit_scan(), inputs.workspace(plan.chunk_rows), inputs.new_sums(plan)
    for rows, credit_chunk in inputs.ordered_chunks(plan.chunk_rows):
        chunk = workspace.load(rows)
        cost_weight, out = inputs.row_weight[rows], sums.output_buffer(chunk.logits.student)

        # Weights that are known beforehand: statistics and gradient in one read of the logits.
        if credit_chunk is None and inputs.behaviour_logprobs is None and inputs.terms is None:
            chunk_statistics, residual = workspace.row_stats_grad(chunk, cost_weight, out)

        # Else the costs give the credit of these rows, and the credit their weights.
        else:
            chunk_statistics = workspace.row_stats(chunk)
            cost_weight, chunk_credit = scan.row_weights(
                chunk_statistics, inputs.spec.cost.statistic, cost_weight, rows, credit_chunk
            )
            credit_weights[:, rows] = chunk_credit
            residual = workspace.row_grad(chunk, chunk_statistics, cost_weight, chunk_credit[0], out)
        statistics[:, rows] = chunk_statistics
        sums.add(rows, out, residual)
    return statistics, credit_weights, sums


def _in_two_passes(inputs: Inputs, plan: Plan) -> tuple[Tensor, Tensor, GradientSums]:
    """Returns statistics, credit and the sums, for plans `recompute` and `stats_only`."""
    # Statistics of every row, then all the credit.
    statistics = rows_statistics(inputs, plan).statistics
    credit_weights = inputs.row_weight.new_zeros(2, inputs.num_rows)
    scan = inputs.credit_scan()
    cost_weight = torch.zeros_like(inputs.row_weight)
    for rows, credit_chunk in inputs.ordered_chunks(max(1, inputs.num_rows)):
        cost_weight[rows], credit_weights[:, rows] = scan.row_weights(
            statistics[:, rows], inputs.spec.cost.statistic, inputs.row_weight[rows], rows, credit_chunk
        )

    # Then the gradient, from logits that are formed a second time.
    if plan.is_without_gradient:
        no_sums = inputs.sums_of(NO_GRADIENTS, staging_rows=0)
        return statistics, credit_weights, no_sums
    logprob_weight = None if inputs.spec.credit.span == "none" else credit_weights[0]
    return statistics, credit_weights, rows_backward(inputs, plan, statistics, cost_weight, logprob_weight)


def rows_statistics(inputs: Inputs, plan: Plan) -> RowsResult:
    """Computes the statistics of every row that counts (0 elsewhere), and what the plan stores for backward."""
    num_kept = count_kept(plan, inputs.tokens)
    kept = new_kept(inputs.student_hidden, inputs.vocab_size, num_kept, inputs.counted, inputs.kept_columns)
    needs_hidden = Needs(hidden=plan.is_frozen_head, weight=False, bias=False)
    staging_rows = plan.staging_rows if plan.is_frozen_head else 0
    sums = inputs.sums_of(needs_hidden, staging_rows)
    if forms_no_logits(inputs.spec, plan, inputs.num_models):
        return RowsResult(_head_statistics(inputs), sums.result().hidden, kept)

    statistics, workspace = inputs.new_statistics(), inputs.workspace(plan.chunk_rows)
    for rows in inputs.chunks(plan.chunk_rows):
        chunk = workspace.load(rows)
        if plan.keeps_gradient:
            statistics[:, rows] = _keep_gradient(workspace, chunk, kept)
        elif plan.is_frozen_head:
            ones, out = torch.ones_like(chunk.logits.student[:, 0]), sums.output_buffer(chunk.logits.student)
            statistics[:, rows], residual = workspace.row_stats_grad(chunk, ones, out)
            sums.add(rows, out, residual)
        else:
            statistics[:, rows] = workspace.row_stats(chunk)
    return RowsResult(statistics, sums.result().hidden, kept)


def forms_no_logits(spec: Spec, plan: Plan, num_models: int) -> bool:
    """Returns whether a kernel of the back end computes the statistics from hidden states and heads."""
    needs_one_read = num_models == 2 and spec.cost.statistic != Statistic.JSD
    stores_gradient = plan.keeps_gradient or plan.is_frozen_head
    if spec.shards is not None and not plan.is_without_gradient:  # processes may differ in such a plan
        return False
    return (
        needs_one_read and not stores_gradient and spec.terms is None and hasattr(BACKENDS[spec.backend], "head_stats")
    )


def _head_statistics(inputs: Inputs) -> Tensor:
    """Returns the statistics of every row that counts, from a kernel that forms no logits."""
    assert inputs.teacher_hidden is not None
    rows: Rows = slice(None) if inputs.counted is None else inputs.counted.nonzero()[:, 0]
    teacher_weight = inputs.student_head if inputs.teacher_weight is None else inputs.teacher_weight
    tokens, shards = None if inputs.tokens is None else inputs.tokens[rows], inputs.shards
    local = tokens if tokens is None or shards is None else shards.local_ids(tokens).clamp(min=0)
    hidden = inputs.student_hidden[rows]
    if shards is not None and not inputs.vocab_size:
        row_statistics = shards.no_statistics(inputs.row_weight, hidden.shape[0])
    else:
        row_statistics = inputs.kernels.head_stats(
            hidden, inputs.student_head, inputs.teacher_hidden[rows], teacher_weight, inputs.student, inputs.teacher,
            local,
        )  # fmt: skip
    if shards is not None:
        row_statistics = shards.merged(row_statistics, tokens)
    if inputs.counted is None:
        return row_statistics
    statistics = inputs.new_statistics()
    statistics[:, rows] = row_statistics
    return statistics


def _keep_gradient(workspace: Workspace, chunk: LogitChunk, kept: KeptGradient) -> Tensor:
    """Stores the gradients of the chunk's rows in `kept`, and returns the chunk's statistics."""
    rows, vocab_size = chunk.rows, chunk.logits.student.shape[1]
    ones = torch.ones_like(chunk.logits.student[:, 0])
    if isinstance(rows, Tensor):  # rows that are not consecutive go through a buffer, with the stride of `kept`
        out = torch.empty_like(kept.rows[:, : len(ones)])[:, :, :vocab_size]
    else:
        out = kept.rows[:, rows, :vocab_size]
    statistics, residual = workspace.row_stats_grad(chunk, ones, out[0])
    residuals = [residual]
    if len(out) == 2:
        residuals.append(workspace.row_grad(chunk, statistics, torch.zeros_like(ones), ones, out[1]))
    for kept_residual, residual in zip(kept.residual, residuals, strict=True):
        if residual is not None:
            kept_residual[rows] = residual
    if isinstance(rows, Tensor):
        kept.rows[:, rows, :vocab_size] = out
    return statistics


def rows_backward(
    inputs: Inputs, plan: Plan, statistics: Tensor, cost_weight: Tensor, logprob_weight: Tensor | None
) -> GradientSums:
    """Returns the gradients of sum(cost_weight * cost + logprob_weight * logprob) from logits formed a second time.

    The last products are not yet computed, as after `_in_one_pass`.

    Args:
        statistics: [NUM_STATISTICS, N].
        cost_weight, logprob_weight: [N].
    """
    workspace = inputs.workspace(plan.chunk_rows)
    sums = inputs.sums_of(inputs.spec.needs, plan.staging_rows)
    for rows in inputs.chunks(plan.chunk_rows):
        chunk = workspace.load(rows)
        out = sums.output_buffer(chunk.logits.student)
        weight = None if logprob_weight is None else logprob_weight[rows]
        residual = workspace.row_grad(chunk, statistics[:, rows].contiguous(), cost_weight[rows], weight, out)
        sums.add(rows, out, residual)
    return sums
