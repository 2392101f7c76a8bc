"""A minute of random calls with fresh seeds; `python tests/fuzz/random_calls.py` runs them for longer."""

from __future__ import annotations

import pytest
import random_calls
import torch

import distil_kernels

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("part", range(2))
def test_random_calls_are_their_definitions(part: int, generator: torch.Generator) -> None:
    first_seed = int(torch.randint(2**40, (), generator=generator))
    assert random_calls.run(first_seed, 10_000, seconds=20) > 20


def test_every_op_is_drawn_and_a_wrong_one_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    ops = {random_calls.draw(seed).op for seed in range(100)}
    assert ops == {*random_calls.TOKEN_LOSSES.values(), "fused_distil_loss", "token_stats", "token_logprobs",
                   "fused_policy_loss"}  # fmt: skip
    right = distil_kernels.fused_jsd
    monkeypatch.setattr(distil_kernels, "fused_jsd", lambda *heads, **options: right(*heads, **options) * 1.0001)
    with pytest.raises(AssertionError, match=r"call of seed \d+: value: error(.|\n)*fused_jsd"):
        random_calls.run(0, 500, seconds=60)
