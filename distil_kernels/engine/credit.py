"""Credit of each sampled token: cost-to-go and baselines on packed sequences, and the order that makes them cheap.

The sequence-level gradient gives grad log S[y_t] the weight

    a_t = q_t scale (G_t - b_t),   G_t = sum_{t < i <= t + horizon} discount^(i - t) cost_i     span "future"
                                   G_t = sum_i cost_i                                           span "sequence"
                                   q_t = min(teacher_ratio_clip, T[y_t] / S[y_t]), or 1

Rows are processed from the last position to the first, so G_t is known by a running carry per sequence when the rows
of position t come up, and everything that a baseline over rollouts needs (the same position of its siblings) is in
the same chunk. Inside a chunk the costs lie on a small grid [positions, sequences]; the scan over it is a row kernel,
`cost_to_go` (the contract is in `backends`). With a horizon the carry is the next `horizon` costs of each sequence.
It needs no second pass.

Left out: whole-batch normalisation, which needs every row first.
Source: the future-credit term of DistIL's gradient (arXiv 2606.05152); all its settings are ours. Baselines that do not
know the row's own rollout leave the expected gradient alone; discount, horizon, normalisation, clips and scale bias it.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from distil_kernels.backends import Statistic, reference
from distil_kernels.engine.allocation import to_device

SPANS = ("none", "future", "sequence")
BASELINES = ("position_mean", "leave_one_out")

CreditSpan = Literal["none", "future", "sequence"]


class Credit(NamedTuple):
    """Settings by which future cost becomes the weight of a token's log-prob gradient."""

    span: str = "future"
    """One of SPANS."""
    baseline: str | None = None
    """None, a name of BASELINES, or "values" for one value per row."""
    group_size: int | None = None
    """Consecutive sequences that share a prompt (for "leave_one_out"); None: sequences are not grouped."""
    discount: float = 1.0
    horizon: int | None = None
    """Costs more tokens ahead than this do not count; None for no limit."""
    by_remaining: bool = False
    """Whether G_t is divided by sum_{t < i <= t + horizon} discount^(i - t), over the rows that count."""
    teacher_ratio_clip: float | None = None
    """Bound of the ratio T / S of the token by which a_t is multiplied; None: it is not."""
    clip: float | None = None
    """Bound of |a_t|; None for no bound."""
    scale: float = 1.0
    """Factor of a_t."""
    importance_clip: float | None = None
    """Bound of the importance ratio; None for no bound."""


NO_CREDIT = Credit(span="none")


class CreditInputs(NamedTuple):
    """Credit settings with the tensors that they refer to."""

    settings: Credit = NO_CREDIT
    baseline_values: Tensor | None = None
    """[N], for baseline "values"."""
    behaviour_logprobs: Tensor | None = None
    """[N] log-probs of the tokens under the policy that sampled them; None: the student sampled them."""


def known_in_order(credit: Credit, num_sequences: int, num_rows: int, max_rows: int) -> bool:
    """Returns whether chunks of `max_rows` rows, last position first, hold everything that their rows' weights need."""
    if credit.span == "none":
        return True
    if credit.span == "sequence":
        return num_rows <= max_rows
    widest_position = num_sequences if credit.baseline == "position_mean" else credit.group_size or 1
    return min(widest_position, num_rows) <= max_rows


def siblings(lengths: Tensor, counted: Tensor) -> Tensor:
    """Returns which sequences [B] are siblings to others: those with a row that counts, and those without any row.

    One of which no row counts was left out of the loss, and its costs are not 0 but unknown.

    Args:
        lengths: [B] int64 on the CPU.
        counted: [N] bool on the CPU.
    """
    ends = torch.nn.functional.pad(counted.cumsum(0), (1, 0))[torch.nn.functional.pad(lengths.cumsum(0), (1, 0))]
    return (ends.diff() > 0) | (lengths == 0)


def weighted_cost(statistics: Tensor, cost: int, row_weight: Tensor) -> Tensor:
    """Returns weight * cost [R] of rows; of a weight of 0 the cost may be anything."""
    return torch.where(row_weight == 0, 0.0, row_weight * statistics[cost])


class CreditChunk(NamedTuple):
    """Rows that are processed together: some consecutive positions of a block of sequences."""

    rows: Tensor
    """[R] int64 indices into the packed rows."""
    sequences: Tensor
    """[R] int64 sequence of each row, counted from `first_sequence`."""
    positions: Tensor
    """[R] int64 position of each row in its sequence, counted from the chunk's first."""
    slots: Tensor
    """[positions, sequences] int64: which of the R rows lies there, -1 for none. Positions reach from the chunk's first
    to the first of the chunk before it (positions without rows between included)."""
    first_sequence: int


def reverse_chunks(
    lengths: Tensor, counted: Tensor | None, credit: Credit, max_rows: int, device: torch.device | None = None
) -> Iterator[CreditChunk]:
    """Cuts packed rows into chunks, last position first; a position of a block of sequences is never divided.

    Chunks are yielded one by one: a GPU works on the first while the next is cut. A block is as many whole groups as
    leave a chunk at least eight positions (every sequence for "position_mean"), so that chunks come out nearly full.

    Args:
        lengths: [B] int64 on the CPU.
        counted: [N] bool on the CPU, rows that exist for the loss; None for all.
        max_rows: rows of a chunk, exceeded only where one position of one block has more.
        device: of the chunks' indices; None for the CPU.
    """
    num_sequences = lengths.numel()
    if credit.baseline == "position_mean":
        block_size = num_sequences
    else:
        group_size = credit.group_size or 1
        groups = max(1, max_rows // 8 // group_size)
        block_size = min(num_sequences, groups * group_size)

    # Sequence and position of every row; then the rows that count, sorted by block and by falling position.
    cpu = lengths.device  # whatever the default device is
    sequences = torch.repeat_interleave(torch.arange(num_sequences, device=cpu), lengths)
    every = torch.arange(sequences.numel(), device=cpu)
    positions = every - torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
    rows = every if counted is None else counted.nonzero()[:, 0]
    if rows.numel() == 0:
        return
    longest = int(lengths.max())
    key = (sequences // block_size) * longest + (longest - 1 - positions)
    rows = rows[torch.argsort(key[rows], stable=True)]
    key = key[rows]

    # A chunk may end where a run of equal (block, position) ends.
    ends = torch.cat([(key[1:] != key[:-1]).nonzero()[:, 0] + 1, torch.tensor([key.numel()], device=cpu)])
    blocks = (sequences[rows] // block_size)[ends - 1]
    begin = previous_low = 0
    previous_sequence = -1
    while begin < rows.numel():
        # The last end within `max_rows` and within the block of the first row.
        first = int(torch.searchsorted(ends, begin, right=True))
        last = int(torch.searchsorted(ends, begin + max_rows, right=True)) - 1
        last = max(first, min(last, int(torch.searchsorted(blocks, blocks[first], right=True)) - 1))
        end = int(ends[last])
        chunk_rows = rows[begin:end]

        # The grid of the chunk: from its first position to the first one of the chunk before.
        first_sequence = int(blocks[first]) * block_size
        chunk_positions = positions[chunk_rows]
        low = int(chunk_positions.min())
        high = previous_low if first_sequence == previous_sequence else int(chunk_positions.max()) + 1
        cells = (chunk_positions - low, sequences[chunk_rows] - first_sequence)
        slots = rows.new_full((high - low, min(block_size, num_sequences - first_sequence)), -1)
        slots[cells] = torch.arange(end - begin, device=cpu)
        begin, previous_low, previous_sequence = end, low, first_sequence
        chunk = CreditChunk(chunk_rows, cells[1], cells[0], slots, first_sequence)
        yield chunk if device is None else _on_device(chunk, device)


def _on_device(chunk: CreditChunk, device: torch.device) -> CreditChunk:
    """Returns the chunk with its indices on a device, in one copy that does not synchronise."""
    fields = chunk[:4]
    flat = to_device(torch.cat([field.flatten() for field in fields]), device)
    parts = flat.split([field.numel() for field in fields])
    rows, sequences, positions, slots = (part.view_as(field) for part, field in zip(parts, fields, strict=True))
    return CreditChunk(rows, sequences, positions, slots, chunk.first_sequence)


class CreditScan:
    """Computes weights and costs-to-go of rows from the costs of their chunks, given in `reverse_chunks` order.

    Args:
        lengths: [B] int64 on the CPU.
        kernels: the back end, whose `cost_to_go` runs if it has one.
        baseline_values, behaviour_logprobs: as in `CreditInputs`.
        is_sibling: [B] bool, which sequences the baseline "leave_one_out" has means over (`siblings`); None for all.
    """

    def __init__(
        self,
        credit: Credit,
        lengths: Tensor,
        kernels: ModuleType,
        baseline_values: Tensor | None = None,
        behaviour_logprobs: Tensor | None = None,
        is_sibling: Tensor | None = None,
    ) -> None:
        self._credit = credit
        self._baseline_values, self._behaviour_logprobs = baseline_values, behaviour_logprobs
        self._is_sibling = is_sibling
        self._costs_to_go = _CostToGo(credit, lengths, kernels)
        self._tokens_to_go = _CostToGo(credit, lengths, kernels)

    def row_weights(
        self, statistics: Tensor, cost: int, row_weight: Tensor, rows: slice | Tensor, chunk: CreditChunk | None
    ) -> tuple[Tensor, Tensor]:
        """Returns the weights [R] of the rows' cost gradients, and a_t and G_t as [2, R].

        Args:
            statistics: [NUM_STATISTICS, R].
            cost: the statistic that rows cost.
            rows: which of the N rows these are.
            chunk: None without credit.

        The importance ratio of a row weighs its own gradient; costs of later rows are not weighted (see `distil`).
        """
        if chunk is None:
            credit = torch.zeros_like(statistics[:2])
        else:
            ratio = self._teacher_ratio(statistics)
            credit = self.weights(weighted_cost(statistics, cost, row_weight), chunk, ratio)
        if self._behaviour_logprobs is not None:
            ratio = self._importance(statistics[Statistic.LOGPROB], self._behaviour_logprobs[rows])
            row_weight, credit = row_weight * ratio, torch.stack([credit[0] * ratio, credit[1]])
        return row_weight, credit

    def weights(self, costs: Tensor, chunk: CreditChunk, ratio: Tensor | float = 1.0) -> Tensor:
        """Returns a_t and G_t [2, R] of a chunk's rows.

        Args:
            costs: [R], already times the token weight.
            ratio: [R], a further factor of a_t.
        """
        credit = self._credit
        cells = (chunk.positions, chunk.sequences)

        # Cost-to-go of every cell of the grid [positions, sequences].
        if credit.span == "sequence":
            to_go = reference.on_grid(costs, chunk.slots).sum(0, keepdim=True).expand(chunk.slots.shape)
        else:
            to_go = self._costs_to_go(costs, chunk)
            if credit.by_remaining:  # where no token remains both are 0
                tokens = self._tokens_to_go(torch.ones_like(costs), chunk)
                to_go = to_go / tokens.clamp(min=torch.finfo(costs.dtype).tiny)

        # Baseline, factors and clip of the cells that hold a row.
        cost_to_go = weights = to_go[cells]
        if credit.baseline is not None:
            weights = cost_to_go - self._baseline(to_go, cells, chunk)
        weights = credit.scale * ratio * weights
        if credit.clip is not None:
            bound = min(credit.clip, torch.finfo(weights.dtype).max)
            weights = weights.clamp(-bound, bound)
        return torch.stack([weights, cost_to_go])

    def _teacher_ratio(self, statistics: Tensor) -> Tensor | float:
        """Returns the bounded ratio [R] of each token's probability under the teacher and under the student."""
        bound = self._credit.teacher_ratio_clip
        if bound is None:
            return 1.0
        ratio = (statistics[Statistic.TEACHER_LOGPROB] - statistics[Statistic.LOGPROB]).exp()
        ratio = ratio.clamp(max=min(bound, torch.finfo(ratio.dtype).max))
        return ratio.nan_to_num(nan=0.0)  # of a token that a top-K teacher did not name

    def _importance(self, logprobs: Tensor, behaviour_logprobs: Tensor) -> Tensor:
        """Returns the bounded ratio [R] of each token's probability under the student and under the older policy."""
        ratio = (logprobs - behaviour_logprobs.to(logprobs.dtype)).exp()
        bound = self._credit.importance_clip
        return ratio if bound is None else ratio.clamp(max=min(bound, torch.finfo(ratio.dtype).max))

    def _baseline(self, to_go: Tensor, cells: tuple[Tensor, Tensor], chunk: CreditChunk) -> Tensor:
        """Returns the baseline [R] of a chunk's rows from the cost-to-go of the grid."""
        if self._credit.baseline == "values":
            assert self._baseline_values is not None
            return self._baseline_values[chunk.rows].to(to_go.dtype)
        if self._credit.baseline == "leave_one_out":
            group_size = self._credit.group_size or 1
            groups = to_go.unflatten(1, (-1, group_size))
            num_others: int | Tensor = group_size - 1
            if self._is_sibling is not None:
                first = chunk.first_sequence
                counts = self._is_sibling[first : first + to_go.shape[1]].to(to_go.dtype).unflatten(0, (-1, group_size))
                num_others = (counts.sum(-1, keepdim=True) - counts).clamp(min=1)
            others = (groups.sum(-1, keepdim=True) - groups) / num_others
            return others.flatten(1)[cells]
        alive = chunk.slots >= 0
        mean = (to_go * alive).sum(1) / alive.sum(1).clamp(min=1)
        return mean[cells[0]]


class _CostToGo:
    """Discounted sums of the costs behind each position, chunk by chunk."""

    def __init__(self, credit: Credit, lengths: Tensor, kernels: ModuleType) -> None:
        self._discount = credit.discount
        is_limited = credit.horizon is not None and credit.horizon < int(lengths.max())
        self._horizon = credit.horizon if is_limited else None
        self._cost_to_go = getattr(kernels, "cost_to_go", reference.cost_to_go)
        self._first_sequence = -1
        self._later: Tensor | None = None

    def __call__(self, costs: Tensor, chunk: CreditChunk) -> Tensor:
        """Returns the cost-to-go [positions, sequences] of the chunk whose rows have `costs` [R]."""
        later = self._later if chunk.first_sequence == self._first_sequence else None
        to_go, self._later = self._cost_to_go(costs, chunk.slots, later, self._discount, self._horizon)
        self._first_sequence = chunk.first_sequence
        return to_go
