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
from test_run import trainer, written
from two_processes import together

from distil_kernels.train import models
from distil_kernels.train.sharding import full

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


def two_steps(model: Path, directory: Path, prompts_per_step: int = 5, **settings: Any) -> list[dict[str, Any]]:
    """Records of two steps that leave the weights alone, each with its last gradient."""
    settings |= {"prompts_per_step": prompts_per_step, "learning_rate": 0.0, "weight_decay": 0.0, "max_grad_norm": 1e9}
    run = trainer(model, directory, **settings)

    def roll_out(batch: Any, *_: Any) -> None:
        for entry in batch:
            a, b, c = entry.prompt[-9:-6]
            run.answered([entry], [written([a, b, c, 40][: 1 + a % 4], [21, c])])
            first, second = entry.feedback
            entry.feedback = [first._replace(score=a / 300), second._replace(score=b / 300)]

    run.roll_out = roll_out  # type: ignore[method-assign]
    gradients: list[torch.Tensor] = []
    run.optimizer.optimizer.register_step_pre_hook(
        lambda *_: gradients.append(torch.cat([full(parameter.grad).flatten() for parameter in run.trained]))
    )
    records = [run.train_step() for _ in range(2)]
    updates = run.config.updates_per_batch
    names = ("loss", "accuracy", "ce", "kl", "entropy", "length", "grad_norm", "equal_groups", "teacher_prefers_right")
    return [
        {**{name: record[name] for name in names if record.get(name) is not None}, "gradient": gradient}
        for record, gradient in zip(records, gradients[updates - 1 :: updates], strict=True)
    ]


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

    monkeypatch.setattr(models, "checkpoint", checkpoint)
    trainer(tiny_model, tmp_path / "run", gradient_checkpointing=True).train_step()
    assert with_gradients and all(with_gradients)
