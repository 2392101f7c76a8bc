"""A baseline from earlier batches: for each position a moving average of the cost-to-go met there.

    b_p  <-  b_p + rate * (m_p - b_p),     m_p the mean G_p over the batch's rollouts that reach position p

The first mean enters with weight 1. The baseline of a batch is known before the batch is sampled, so it does not change
the expected gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distil_kernels.train.run.distributed import ALONE, Processes


class PositionAverage:
    """The averages of positions 0 to num_positions - 1.

    Args:
        rate: share of a batch's mean, over all processes, that enters.
    """

    def __init__(self, num_positions: int, rate: float, device: torch.device, processes: Processes = ALONE) -> None:
        self._rate, self._processes = rate, processes
        self._average = torch.zeros(num_positions, dtype=torch.float64, device=device)
        self._batch = torch.zeros(2, num_positions, dtype=torch.float64, device=device)
        """[2, num_positions]: the sum of this batch's costs-to-go at each position, and their number."""
        self._reached = torch.zeros(num_positions, dtype=torch.bool, device=device)

    def values(self, lengths: Sequence[int]) -> Tensor:
        """[N] float64 for packed sequences; 0 at positions that no earlier batch reached."""
        return self._average[self._positions(lengths)]

    def observe(self, cost_to_go: Tensor, lengths: Sequence[int], mask: Tensor | None = None) -> None:
        """Adds a micro-batch's costs-to-go [N] where `mask` [N] is True; `values` does not change until `follow`."""
        counts = torch.ones_like(cost_to_go, dtype=torch.float64) if mask is None else mask.to(torch.float64)
        rows = torch.stack([cost_to_go.to(torch.float64) * counts, counts])
        self._batch.index_add_(1, self._positions(lengths), rows)

    def follow(self) -> float:
        """Moves the average by what was observed, after an optimizer step.

        Returns:
            The largest mean cost-to-go of a position that at least half of the batch's rollouts reached.
        """
        self._processes.sum(self._batch)
        total, number = self._batch
        mean = total / number.clamp(min=1.0)
        rate = (1.0 - (1.0 - self._rate) * self._reached.double()) * (number > 0)
        self._average += rate * (mean - self._average)
        self._reached |= number > 0
        largest = float(mean[2.0 * number >= number.max()].max())
        self._batch.zero_()
        return largest

    def forget(self) -> None:
        """Drops what was observed, after a step that was skipped."""
        self._batch.zero_()

    def state_dict(self) -> dict[str, Tensor]:
        return {"average": self._average, "reached": self._reached}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._average.copy_(state["average"])
        self._reached.copy_(state["reached"])

    def _positions(self, lengths: Sequence[int]) -> Tensor:
        return torch.cat([torch.arange(length, device=self._average.device) for length in lengths])
