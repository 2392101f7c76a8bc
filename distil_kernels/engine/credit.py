"""Credit of each sampled token: cost-to-go and baselines on packed sequences, and the order that makes them cheap.

The sequence-level gradient gives grad log S[y_t] the weight

    a_t = scale * (G_t - b_t),     G_t = sum_{t < i <= t + horizon} discount^(i - t) cost_i     span "future"
                                   G_t = sum_i cost_i                                           span "sequence"

Rows are processed from the last position to the first, so G_t is known by a running carry per sequence when the rows
of position t come up, and everything that a baseline over rollouts needs (the same position of its siblings) is in
the same chunk. Inside a chunk the costs lie on a small grid [positions, sequences]; the scan over it is a row kernel,
`cost_to_go` (the contract is in `backends`). With a horizon the carry is the next `horizon` costs of each sequence.
It needs no second pass.

Left out: whole-batch normalisation, which needs every row first.
Source: the future-credit term of DistIL's gradient (arXiv 2606.05152); all its settings are ours. Baselines that do not
know the row's own rollout leave the expected gradient alone; discount, horizon, normalisation, clip and scale bias it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from distil_kernels.backends import Statistic, reference

SPANS = ("none", "future", "sequence")
BASELINES = ("position_mean", "leave_one_out")

CreditSpan = Literal["none", "future", "sequence"]


@dataclass(frozen=True)
class Credit:
    """How future cost becomes the weight of a token's log-prob gradient."""

    span: str = "future"
    baseline: str | Tensor | None = None
    """None, a name of BASELINES, or one value per row [N]."""
    group_size: int = 1
    """Consecutive sequences that share a prompt (for "leave_one_out")."""
    behaviour_logprobs: Tensor | None = None
    """[N] of the tokens under the policy that sampled them; None where that is the student."""
    discount: float = 1.0
    horizon: float = math.inf
    """Costs more tokens on than this do not count."""
    by_remaining: float = False
    """Whether G_t is divided by sum_{t < i <= t + horizon} discount^(i - t), over the rows that count."""
    clip: float = math.inf
    """Bound of |a_t|."""
    scale: float = 1.0
    importance_clip: float = math.inf

    @property
    def numbers(self) -> list[float]:
        """The fields from `discount` to `importance_clip`, in order, for an op that takes no objects."""
        numbers = (self.discount, self.horizon, self.by_remaining, self.clip, self.scale, self.importance_clip)
        return [float(number) for number in numbers]

    def importance(self, logprobs: Tensor, rows: slice | Tensor) -> Tensor | None:
        """[R] truncated ratio of each row's token under the student (logprobs [R]) and where it was sampled."""
        if self.behaviour_logprobs is None:
            return None
        behaviour = self.behaviour_logprobs[rows].to(logprobs.dtype)
        return (logprobs - behaviour).exp().clamp(max=self.importance_clip)


def known_in_order(credit: Credit, num_sequences: int, num_rows: int, max_rows: int) -> bool:
    """Whether chunks of at most `max_rows` rows, last position first, hold all that their rows' weights need."""
    if credit.span == "none":
        return True
    if credit.span == "sequence":
        return num_rows <= max_rows
    widest_position = num_sequences if credit.baseline == "position_mean" else credit.group_size
    return min(widest_position, num_rows) <= max_rows


class Chunk(NamedTuple):
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
) -> Iterator[Chunk]:
    """Cuts packed rows into chunks, last position first; a position of a block of sequences is never divided.

    One by one: a GPU is at work on the first while the next is cut.

    Args:
        lengths: [B] int64 on the CPU.
        counted: [N] bool on the CPU, rows that exist for the loss; None for all.
        max_rows: rows of a chunk, exceeded only where one position of one block has more.
        device: of the chunks' indices; None for the CPU.

    A block is as many whole groups as leave a chunk at least eight positions (every sequence for "position_mean"),
    so that chunks come out nearly full.
    """
    num_sequences = lengths.numel()
    if credit.baseline == "position_mean":
        block_size = num_sequences
    else:
        groups = max(1, max_rows // 8 // credit.group_size)
        block_size = min(num_sequences, groups * credit.group_size)
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

    # Where a chunk may end: the ends of runs of equal (block, position).
    ends = torch.cat([(key[1:] != key[:-1]).nonzero()[:, 0] + 1, torch.tensor([key.numel()], device=cpu)])
    blocks = (sequences[rows] // block_size)[ends - 1]
    begin = previous_low = 0
    previous_sequence = -1
    while begin < rows.numel():
        first = int(torch.searchsorted(ends, begin, right=True))
        last = int(torch.searchsorted(ends, begin + max_rows, right=True)) - 1
        last = max(first, min(last, int(torch.searchsorted(blocks, blocks[first], right=True)) - 1))
        end = int(ends[last])
        chunk_rows = rows[begin:end]
        first_sequence = int(blocks[first]) * block_size
        chunk_positions = positions[chunk_rows]
        low = int(chunk_positions.min())
        high = previous_low if first_sequence == previous_sequence else int(chunk_positions.max()) + 1
        where = (chunk_positions - low, sequences[chunk_rows] - first_sequence)
        slots = rows.new_full((high - low, min(block_size, num_sequences - first_sequence)), -1)
        slots[where] = torch.arange(end - begin, device=cpu)
        begin, previous_low, previous_sequence = end, low, first_sequence
        chunk = Chunk(chunk_rows, where[1], where[0], slots, first_sequence)
        yield chunk if device is None else _on_device(chunk, device)


def _on_device(chunk: Chunk, device: torch.device) -> Chunk:
    """One copy, for which nothing waits."""
    fields = chunk[:4]
    flat = torch.cat([field.flatten() for field in fields])
    if device.type == "cuda":
        flat = flat.pin_memory()
    parts = flat.to(device, non_blocking=True).split([field.numel() for field in fields])
    rows, sequences, positions, slots = (part.view_as(field) for part, field in zip(parts, fields, strict=True))
    return Chunk(rows, sequences, positions, slots, chunk.first_sequence)


class CreditScan:
    """Turns the costs of chunks, given in `reverse_chunks` order, into the weights and costs-to-go of their rows."""

    def __init__(self, credit: Credit, lengths: Tensor, kernels: ModuleType) -> None:
        self._credit = credit
        self._costs_to_go = _ToGo(credit, lengths, kernels)
        self._tokens_to_go = _ToGo(credit, lengths, kernels)

    def row_weights(
        self, statistics: Tensor, cost: int, row_weight: Tensor, rows: slice | Tensor, chunk: Chunk | None
    ) -> tuple[Tensor, Tensor]:
        """Of rows with statistics [NUM_STATISTICS, R]: weights [R] of their cost's gradient; a_t and G_t as [2, R].

        `chunk` is None where there is no credit. Costs of other rows are not weighted by importance (see `distil`).
        """
        if chunk is None:
            credit = torch.zeros_like(statistics[:2])
        else:
            credit = self.weights(row_weight * statistics[cost], chunk)
        ratio = self._credit.importance(statistics[Statistic.LOGPROB], rows)
        if ratio is not None:
            row_weight, credit = row_weight * ratio, torch.stack([credit[0] * ratio, credit[1]])
        return row_weight, credit

    def weights(self, costs: Tensor, chunk: Chunk) -> Tensor:
        """[2, R]: a_t and G_t of a chunk's rows from their costs [R] (already times the token weight)."""
        credit = self._credit
        where = (chunk.positions, chunk.sequences)
        if credit.span == "sequence":
            to_go = reference.on_grid(costs, chunk.slots).sum(0, keepdim=True).expand(chunk.slots.shape)
        else:
            to_go = self._costs_to_go(costs, chunk)
            if credit.by_remaining:  # where no token remains both are 0
                tokens = self._tokens_to_go(torch.ones_like(costs), chunk)
                to_go = to_go / tokens.clamp(min=torch.finfo(costs.dtype).tiny)
        found = weights = to_go[where]
        if credit.baseline is not None:
            weights = found - self._baseline(to_go, where, chunk)
        return torch.stack([(credit.scale * weights).clamp(-credit.clip, credit.clip), found])

    def _baseline(self, to_go: Tensor, where: tuple[Tensor, Tensor], chunk: Chunk) -> Tensor:
        credit = self._credit
        if isinstance(credit.baseline, Tensor):
            return credit.baseline[chunk.rows].to(to_go.dtype)
        if credit.baseline == "leave_one_out":
            groups = to_go.unflatten(1, (-1, credit.group_size))
            others = (groups.sum(-1, keepdim=True) - groups) / (credit.group_size - 1)
            return others.flatten(1)[where]
        alive = chunk.slots >= 0
        mean = (to_go * alive).sum(1) / alive.sum(1).clamp(min=1)
        return mean[where[0]]


class _ToGo:
    """Discounted sums of what comes after each position, chunk by chunk."""

    def __init__(self, credit: Credit, lengths: Tensor, kernels: ModuleType) -> None:
        self._discount = credit.discount
        self._horizon = int(credit.horizon) if credit.horizon < int(lengths.max()) else None
        self._cost_to_go = getattr(kernels, "cost_to_go", reference.cost_to_go)
        self._block = -1
        self._later: Tensor | None = None

    def __call__(self, costs: Tensor, chunk: Chunk) -> Tensor:
        """[positions, sequences] of the chunk whose rows have `costs` [R]."""
        later = self._later if chunk.first_sequence == self._block else None
        to_go, self._later = self._cost_to_go(costs, chunk.slots, later, self._discount, self._horizon)
        self._block = chunk.first_sequence
        return to_go
