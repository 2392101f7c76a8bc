"""Rows of several processes before a vocabulary in shards: the rule, embeddings and losses, any numbers of rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from members import Members
from torch import Tensor, nn

import distil_kernels as dk
from distil_kernels.train.models.exchanged_rows import (
    Cost,
    Sizes,
    all_rows,
    cost_of_exchange,
    cost_of_gathering,
    exchange_is_leaner,
    looked_up,
)

V, D = 29, 6


def test_bytes_by_hand() -> None:
    """Two processes, 10 tokens of 30 that are read, a vocabulary of 1000 of size 8 and a teacher's head of size 4."""
    sizes = Sizes(2, 10, 30, 1000, 8, 4)
    # Head, its gradient and the teacher's head, of which half is there already.
    assert cost_of_gathering(sizes) == Cost(4 * 1000 * (8 + 8 + 4) / 2, 4 * 1000 * 20)
    assert cost_of_gathering(sizes._replace(is_tied=False)).held == 4 * 1000 * (16 + 16 + 4)
    assert cost_of_gathering(sizes._replace(is_trained=False)).held == 4 * 1000 * (8 + 4)
    # States of both, dh twice, embeddings there and their gradients back; statistics of the other's shard.
    numbers = 10 * (8 + 4) + 2 * 10 * 8 + 2 * 30 * 8
    assert cost_of_exchange(sizes) == Cost(4 * numbers / 2 + 44 * 10, 4 * (10 * 12 + 10 * 8 + 30 * 8))


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        (Sizes(2, 192, 16 * 72, 49152, 576, 576), True),  # a micro-batch of the main job
        (Sizes(8, 8 * 2048, 8 * 4096, 151936, 4096), True),  # four thousand tokens of each of eight GPUs
        (Sizes(8, 8 * 8192, 8 * 16384, 151936, 4096), False),  # four times as many
        (Sizes(2, 400, 4000, 260, 32, 32), False),  # a vocabulary smaller than the batch
    ],
)
def test_rows_move_where_they_are_fewer_than_tokens_of_the_vocabulary(sizes: Sizes, expected: bool) -> None:
    assert exchange_is_leaner(sizes) is expected
    exchange, gathering = cost_of_exchange(sizes), cost_of_gathering(sizes)
    assert expected == (exchange.sent < gathering.sent and exchange.held < gathering.held)


@pytest.fixture(scope="module")
def members() -> Iterator[Members]:
    group = Members(3)
    yield group
    group.close()


def in_shards(rank: int, ids: Tensor, table: Tensor, numbers: Sequence[int], teacher: Tensor) -> list[Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (3,))
    weight = nn.Parameter(distribute_tensor(table, mesh, [Shard(0)]))
    own = ids.split(list(numbers))[rank]
    hidden = looked_up(own[None], weight, 3)[0]
    rows = all_rows((2.0 * hidden).tanh(), mesh.get_group())
    states = all_rows(teacher.split(list(numbers))[rank], mesh.get_group())
    loss = dk.fused_forward_kl(rows, weight, states, weight.detach(), vocab_group=mesh.get_group(), reduction="sum")
    loss.backward()
    gradient: Any = weight.grad
    return [hidden.detach(), loss.detach(), gradient.full_tensor()]


@pytest.mark.slow
@pytest.mark.parametrize("numbers", [(4, 0, 7), (0, 0, 3), (5, 5, 5)], ids=str)
def test_losses_and_gradients_are_those_of_one_process(
    members: Members, numbers: tuple[int, ...], generator: torch.Generator
) -> None:
    ids = torch.randint(V, (sum(numbers),), generator=generator)
    ids[0] = 3  # the row without gradient as an input
    table = torch.randn(V, D, generator=generator)
    teacher = torch.randn(len(ids), D, generator=generator)
    whole = nn.Embedding(V, D, padding_idx=3)
    whole.weight = nn.Parameter(table.clone())
    hidden = whole(ids)
    wanted = dk.fused_forward_kl((2.0 * hidden).tanh(), whole.weight, teacher, table, reduction="sum")
    wanted.backward()
    results = members.results(in_shards, ids, table, numbers, teacher)
    assert torch.equal(torch.cat([each[0] for each in results]), hidden.detach())
    for _, loss, gradient in results:
        torch.testing.assert_close(loss, wanted.detach(), rtol=1e-5, atol=0.0)
        torch.testing.assert_close(gradient, whole.weight.grad, rtol=1e-4, atol=1e-5)
