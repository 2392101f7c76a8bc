"""Two steps of one batch each have one loss and one gradient, however the batch is cut up.

Micro-batches of 1, 2 or all problems, prompts shared or whole rows packed or padded, layers recomputed or kept, one
process or two (of which one has two problems and the other three). Only the rollouts are given, so that all see the
same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import trainer, two_steps
from two_processes import together

from distil_kernels.train.models import activation_checkpointing

pytestmark = pytest.mark.slow

WAYS = {
    "whole": {},
    "micro-batches of 1": {"micro_batch_prompts": 1},
    "micro-batches of 2": {"micro_batch_prompts": 2},
    "shared prompts": {"reading": "shared"},
    "packed rows": {"reading": "packed"},
    "padded rows": {"reading": "padded"},
    "recomputed layers": {"gradient_checkpointing": True},
}
METHODS = {
    "leave one out": {"teacher": "frozen"},
    "moving average": {"teacher": "ema", "baseline": "moving_average", "baseline_rate": 0.5},
    "policy gradient": {"teacher": "live", "objective": "policy_gradient"},
    "adapters": {"teacher": "frozen", "lora_rank": 2},
}


def in_every_way(rank: int, model: Path, directory: Path, method: str) -> None:
    for way, settings in WAYS.items():
        steps = two_steps(model, directory / f"{way} {rank}", **METHODS[method], **settings)
        torch.save(steps, directory / f"{way} {rank}.pt")


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_has_one_gradient(tiny_model: Path, tmp_path: Path, method: str) -> None:
    alone, two = tmp_path / "alone", tmp_path / "two"
    alone.mkdir()
    two.mkdir()
    in_every_way(0, tiny_model, alone, method)
    assert together(in_every_way, tiny_model, two, method) == [0, 0]
    expected = torch.load(alone / "whole 0.pt")
    assert expected[0]["gradient"].abs().max() > 0 and expected[0]["loss"] != expected[1]["loss"]
    for way in WAYS:
        found, first, second = (
            torch.load(path / f"{way} {rank}.pt") for path, rank in ((alone, 0), (two, 0), (two, 1))
        )
        for step, reference in enumerate(expected):
            # Between the two to the last bit, or their weights drift apart.
            assert torch.equal(first[step]["gradient"], second[step]["gradient"])
            for record in (found[step], first[step]):
                wanted = reference["gradient"]
                scale = float(wanted.abs().max())
                torch.testing.assert_close(record.pop("gradient"), wanted, rtol=1e-3, atol=1e-5 * scale)
                assert record == {name: pytest.approx(reference[name], rel=1e-4, abs=1e-6) for name in record}


def test_layers_run_again_where_there_are_gradients_alone(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_gradients: list[bool] = []

    def checkpoint(forward: Any, *inputs: Any, use_reentrant: bool, preserve_rng_state: bool, **options: Any) -> Any:
        with_gradients.append(torch.is_grad_enabled())
        return forward(*inputs, **options)

    monkeypatch.setattr(activation_checkpointing, "checkpoint", checkpoint)
    trainer(tiny_model, tmp_path / "run", gradient_checkpointing=True).train_step()
    assert with_gradients and all(with_gradients)
