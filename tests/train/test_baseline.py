"""The moving average of the cost-to-go by position, against its definition."""

from __future__ import annotations

import pytest
import torch

from distil_kernels.train.baseline import PositionAverage

RATE = 0.3


def test_definition(generator: torch.Generator) -> None:
    """Batches in micro-batches of uneven lengths; the second step reaches no position beyond 1, the third all."""
    average = PositionAverage(4, RATE, torch.device("cpu"))
    steps = [[[3, 1], [2]], [[1, 2, 0]], [[4], [4, 1]]]
    expected: list[float | None] = [None] * 4
    for micro_batches in steps:
        seen: list[list[float]] = [[] for _ in range(4)]
        for lengths in micro_batches:
            values = torch.randn(sum(lengths), generator=generator, dtype=torch.float64)
            before = average.values([4])
            assert before.tolist() == pytest.approx([value or 0.0 for value in expected], rel=1e-12)
            average.observe(values, lengths)
            assert torch.equal(average.values([4]), before)  # a batch is not compared with itself
            rows = iter(values.tolist())
            for length in lengths:
                for position in range(length):
                    seen[position].append(next(rows))
        average.follow()
        for position, found in enumerate(seen):
            if found:
                mean, old = sum(found) / len(found), expected[position]
                expected[position] = mean if old is None else (1 - RATE) * old + RATE * mean
    assert None not in expected
    assert average.values([2, 0, 4]).tolist() == pytest.approx([*expected[:2], *expected])


def test_rows_that_do_not_count_are_not_noticed() -> None:
    average, without = (PositionAverage(3, RATE, torch.device("cpu")) for _ in range(2))
    average.observe(torch.tensor([4.0, 0.0, 6.0, 0.0]), [3, 1], torch.tensor([True, False, True, False]))
    without.observe(torch.tensor([4.0]), [1])
    assert without.follow() == 4.0
    assert average.follow() == 6.0  # position 2 is reached by half of the rollouts
    assert average.values([3]).tolist() == [4.0, 0.0, 6.0] and not average.state_dict()["reached"][1]
    assert average.values([1]).equal(without.values([1]))


def test_state_is_all_that_the_next_batch_needs() -> None:
    average, other = (PositionAverage(3, RATE, torch.device("cpu")) for _ in range(2))
    average.observe(torch.tensor([1.0, 2.0]), [2])
    average.follow()
    other.load_state_dict(average.state_dict())
    for one in (average, other):
        one.observe(torch.tensor([4.0, 5.0, 6.0]), [3])
        one.follow()
    assert torch.equal(average.values([3]), other.values([3]))
    assert average.values([3]).tolist() == pytest.approx([1.9, 2.9, 6.0])
