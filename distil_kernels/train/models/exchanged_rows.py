"""A vocabulary that stays in shards: the rows of all processes come to it, and it does not come to them.

    embeddings    all processes' token ids are gathered; each looks up those of its shard; a reduce-scatter gives every
                  process its own
    head          all processes' hidden states are gathered; the loss is that of all rows, by the head in shards
                  (`vocab_group`); the gradient of a process's hidden states is its slice

`exchange_is_leaner` decides between this and gathering embeddings and heads for each process's own rows. Processes may
have any numbers of rows, also none.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

NUMBER = 4
"""Bytes of a number, float32."""
STATISTICS = 44
"""Bytes of a row's statistics, which each process gets from every other (docs/distributed.md)."""


class Sizes(NamedTuple):
    """What decides whether rows are exchanged."""

    num_processes: int
    rows: int
    """Tokens of all processes that the heads see."""
    ids: int
    """Tokens of all processes that are read, padding included."""
    vocab_size: int
    hidden_size: int
    teacher_hidden_size: int = 0
    """Of a teacher with a head of its own in shards; 0 for none."""
    is_tied: bool = True
    """Embeddings and head are one."""
    is_trained: bool = True
    """Embeddings and head have gradients."""


class Cost(NamedTuple):
    """Bytes of one process for one micro-batch."""

    sent: float
    """What it receives from the others, or they from it."""
    held: float
    """What it holds beyond its shards."""


def cost_of_gathering(sizes: Sizes) -> Cost:
    """Embeddings and heads come, and the gradient of the student's goes back."""
    own = sizes.hidden_size * (1 + sizes.is_trained) * (1 if sizes.is_tied else 2)
    size = NUMBER * sizes.vocab_size * (own + sizes.teacher_hidden_size)
    return Cost(size * (1 - 1 / sizes.num_processes), size)


def cost_of_exchange(sizes: Sizes) -> Cost:
    """Rows of both models come, with their statistics; dh is summed by an all-reduce, twice the bytes of a gather.

    Looked-up embeddings go to their processes by a reduce-scatter, and their gradients come by a gather.
    """
    states = sizes.rows * (sizes.hidden_size + sizes.teacher_hidden_size)
    gradient = sizes.rows * sizes.hidden_size
    embedded = sizes.ids * sizes.hidden_size
    share = 1 - 1 / sizes.num_processes
    sent = NUMBER * share * (states + 2 * gradient + embedded * (1 + sizes.is_trained))
    statistics = STATISTICS * sizes.rows * (sizes.num_processes - 1)
    return Cost(sent + statistics, NUMBER * (states + gradient + embedded))


def exchange_is_leaner(sizes: Sizes) -> bool:
    """Returns whether exchanging rows sends fewer bytes than gathering embeddings and heads, and holds fewer."""
    exchange, gathering = cost_of_exchange(sizes), cost_of_gathering(sizes)
    return exchange.sent < gathering.sent and exchange.held < gathering.held


def all_rows(rows: Tensor, group: Any) -> Tensor:
    """Returns the rows [R, ...] of all processes one after the other; the gradient of a process's own is a slice.

    That slice is the whole gradient where all processes compute one loss of all rows.
    """
    result: Tensor = _AllRows.apply(rows, group)
    return result


def looked_up(ids: Tensor, weight: DTensor, padding_index: int | None) -> Tensor:
    """Returns the embeddings [..., D] of this process's token ids by a table in shards of its rows.

    All processes call it at once, with any numbers of ids.

    Args:
        padding_index: a row without gradient, as of torch.nn.Embedding.
    """
    group = weight.device_mesh.get_group()
    size = -(-weight.shape[0] // group.size())  # of torch.chunk, which FSDP shards by
    begin = min(group.rank() * size, weight.shape[0])
    shard = weight.to_local()
    result: Tensor = _LookedUp.apply(shard, ids.flatten(), begin, padding_index, group)
    return result.view(*ids.shape, weight.shape[1])


class _AllRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: Any) -> Tensor:
        padded, counts = _gathered(rows, group)
        ctx.begin, ctx.count = sum(counts[: group.rank()]), len(rows)
        return torch.cat([part[:count] for part, count in zip(padded, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient[ctx.begin : ctx.begin + ctx.count], None


class _LookedUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shard: Tensor, ids: Tensor, begin: int, padding_index: int | None, group: Any) -> Tensor:
        padded, _ = _gathered(ids, group)
        every = torch.cat(padded) - begin  # padding is id 0, whose embedding nobody takes
        is_here = (every >= 0) & (every < len(shard))
        found = shard.new_zeros(len(every), shard.shape[1])
        found[is_here] = shard[every[is_here]]
        own = found.new_empty(len(padded[0]), shard.shape[1])
        if own.numel():
            _reduce_scatter(own, found, group)
        has_gradient = is_here if padding_index is None else is_here & (every != padding_index - begin)
        ctx.rows, ctx.has_gradient, ctx.group, ctx.shape = every[has_gradient], has_gradient, group, shard.shape
        return own[: len(ids)]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:  # type: ignore[override]
        padded, _ = _gathered(gradient, ctx.group)
        every = torch.cat(padded)
        of_shard = gradient.new_zeros(ctx.shape)
        of_shard.index_add_(0, ctx.rows, every[ctx.has_gradient])
        return of_shard, None, None, None, None


def _gathered(rows: Tensor, group: Any) -> tuple[list[Tensor], list[int]]:
    """Returns the rows of each process, padded by zeros to the most that one has, and their numbers."""
    counts = [torch.empty(1, dtype=torch.int64, device=rows.device) for _ in range(group.size())]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device), group=group)
    numbers = torch.cat(counts).tolist()
    most = max(numbers)
    own = rows.new_zeros(most, *rows.shape[1:])
    own[: len(rows)] = rows
    every = [torch.empty_like(own) for _ in numbers]
    if own.numel():
        dist.all_gather(every, own, group=group)
    return every, numbers


def _reduce_scatter(out: Tensor, whole: Tensor, group: Any) -> None:
    """Writes to `out` this process's part of the sum of all `whole`."""
    distributed: Any = dist  # in torch 2.13 the function has another name, and warns of this one
    function = getattr(distributed, "reduce_scatter_single", None) or distributed.reduce_scatter_tensor
    function(out, whole, group=group)
