"""Checks of one back end's `cost_to_go`, called as the driver calls it, against loops over tokens in float64."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from distil_kernels.engine.credit import Credit, CreditScan, reverse_chunks
from distil_kernels.testing import credit_by_definition

DISCOUNTS = (0.0, 0.5, 0.9, 1.0)
HORIZONS = (None, 1, 3, 1000)


def to_go_by(
    kernels: ModuleType, costs: Tensor, lengths: list[int], counted: Tensor | None, credit: Credit, max_rows: int
) -> Tensor:
    """[N] cost-to-go from chunks of at most `max_rows` rows; 0 for rows that do not count."""
    sizes, found = torch.tensor(lengths), torch.zeros_like(costs)
    scan = CreditScan(credit, sizes, kernels)
    for chunk in reverse_chunks(sizes, counted, credit, max_rows):
        # What lies around the costs is never looked at.
        beside = torch.nn.functional.pad(costs[chunk.rows], (1, 1), value=float("nan"))
        found[chunk.rows] = scan.weights(beside[1:-1], chunk)[1]
    return found


def check(
    kernels: ModuleType, lengths: list[int], counted: Tensor | None, max_rows: int, discount: float,
    horizon: int | None, by_remaining: bool, generator: torch.Generator, dtype: torch.dtype = torch.float32,
) -> None:  # fmt: skip
    """Every cost-to-go is right to a few roundings of its own size, beside costs a million times larger. (Those of a
    float64 back end are as many as the definition's.)"""
    costs = 10 ** (6 * torch.rand(sum(lengths), generator=generator, dtype=torch.float64) - 3)
    costs = costs.to(dtype)
    credit = Credit(discount=discount, horizon=horizon, by_remaining=by_remaining)
    if counted is not None:
        costs[~counted] = float("nan")  # never looked at
    found = to_go_by(kernels, costs, lengths, counted, credit, max_rows)
    costs = costs.double() if counted is None else torch.where(counted, costs.double(), 0.0)
    exact = credit_by_definition(
        costs, lengths, discount=discount, horizon=horizon, by_remaining=by_remaining, counted=counted
    )
    limit = 4 * torch.finfo(dtype).eps if dtype == torch.float32 else 1e-13
    excess = (found.double() - exact).abs() / exact.clamp(min=1e-300)
    assert (excess <= limit).all(), f"lengths {lengths}, chunks of {max_rows} rows, {counted=}: off by {excess}"


def check_random_layouts(kernels: ModuleType, generator: torch.Generator, count: int, **options: object) -> None:
    """Empty sequences, sequences of one token, masked ends and holes; chunks that cut all of them anywhere."""

    def pick(high: int) -> int:
        return int(torch.randint(high, (), generator=generator))

    for number in range(count):
        lengths = [pick(2) * pick(9) + pick(2) for _ in range(1 + pick(4))]
        counted = torch.rand(sum(lengths), generator=generator) < 0.6 if pick(2) else None
        check(
            kernels, lengths, counted, 1 + pick(12), DISCOUNTS[number % 4], HORIZONS[number // 4 % 4], bool(pick(2)),
            generator, **options,
        )  # fmt: skip


def check_long_sequences(kernels: ModuleType, generator: torch.Generator, length: int = 300, **options: object) -> None:
    """More positions, and a longer window, than one program or block adds up at once."""
    for horizon in (None, length * 7 // 8):
        check(kernels, [length, 3], None, 10**6, 0.99, horizon, False, generator, **options)
    check(kernels, [length], None, length * 2 // 3, 1.0, length // 2, True, generator, **options)
