"""Runs of a tiny model, whole and step by step, which many tests begin with."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from distil_kernels.train.__main__ import main
from distil_kernels.train.build import build
from distil_kernels.train.config import Config
from distil_kernels.train.metrics import PhaseTimer
from distil_kernels.train.models.sharding import full_tensor
from distil_kernels.train.objective import Sums, UpdateState
from distil_kernels.train.rollouts.packed_batch import PackedBatch
from distil_kernels.train.rollouts.prompt_group import PromptGroup, Rollout
from distil_kernels.train.run.checkpoint import load_state
from distil_kernels.train.run.json_lines import read_lines
from distil_kernels.train.tasks import Problem
from distil_kernels.train.trainer import Trainer

QUICK = [
    "--prompts_per_step", "3", "--rollouts_per_prompt", "2", "--max_new_tokens", "4", "--num_examples", "1",
    "--eval_problems", "4", "--eval_every", "2", "--learning_rate", "1e-3", "--warmup_steps", "1", "--cost", "ce",
]  # fmt: skip

FULL_CREDIT: dict[str, Any] = {"teacher_ratio_clip": None, "credit_clip": None}
"""Options of the sequence-level gradient as it is defined, which the defaults bound."""

TIMES = ("seconds", "tokens_per_second", "peak_")


def train(model: Path, runs: Path, name: str, *extra: str, steps: int = 3) -> Path:
    status = main(
        ["--model", str(model), "--runs_dir", str(runs), "--name", name, "--steps", str(steps), *QUICK, *extra]
    )
    assert status == 0
    return runs / name


def metrics(directory: Path) -> list[dict[str, object]]:
    """Records without what clock and memory say."""
    records = read_lines(directory / "metrics.jsonl")
    return [{key: value for key, value in record.items() if not key.startswith(TIMES)} for record in records]


def trainer(model: Path, directory: Path, **changes: object) -> Trainer:
    directory.mkdir()
    settings = {
        "model": str(model), "prompts_per_step": 4, "rollouts_per_prompt": 2, "max_new_tokens": 4, "num_examples": 1,
        "eval_problems": 2, "cost": "ce", **changes,
    }  # fmt: skip
    config = Config(**settings)
    return Trainer(config, build(config, directory), Console(quiet=True))


def sampled(*completions: list[int]) -> list[Rollout]:
    """Rollouts without a tool."""
    return [Rollout.sampled(tokens) for tokens in completions]


def give_rollouts(run: Trainer, groups: Sequence[PromptGroup], rollouts: Sequence[list[Rollout]]) -> None:
    """Gives each group these rollouts, with scores, feedback and teacher prompts as if the student had sampled them."""
    for group, given in zip(groups, rollouts, strict=True):
        run.tutor.verify([(group.problem, given)])
        group.rollouts = given
    run.tutor.give_feedback(run.student, groups, max(map(len, rollouts)))


def set_scores(group: PromptGroup, *scores: float) -> None:
    for rollout, score in zip(group.rollouts, scores, strict=True):
        rollout.feedback = rollout.feedback._replace(score=score)


def pack(groups: Sequence[PromptGroup]) -> PackedBatch:
    return PackedBatch.of(groups, torch.device("cpu"))


def packed(
    prompts: Sequence[list[int]],
    prompt_index: Sequence[int],
    completions: Sequence[list[int]],
    by_model: Sequence[list[bool]] | None = None,
    scores: Sequence[float] | None = None,
) -> PackedBatch:
    """Completions behind these prompts, which are the teacher's too; all of them have feedback."""
    groups = [PromptGroup(Problem("", "", None, ""), prompt) for prompt in prompts]
    for row, (index, tokens) in enumerate(zip(prompt_index, completions, strict=True)):
        rollout = Rollout.sampled(tokens)
        rollout.teacher_prompt = prompts[index]
        rollout.by_model = by_model[row] if by_model else rollout.by_model
        rollout.feedback = rollout.feedback._replace(score=scores[row] if scores else 0.0)
        groups[index].rollouts.append(rollout)
    return pack(groups)


def micro_batch(
    run: Trainer, groups: Sequence[PromptGroup], normalizer: float, state: UpdateState | None = None
) -> tuple[torch.Tensor, Sums]:
    """The trainer's forward and backward on these groups."""
    return run.micro_batch(pack(groups), normalizer, PhaseTimer(), state or UpdateState())


def assert_equal(ours: Any, theirs: Any) -> None:
    """Of nested states, tensors to the last bit."""
    assert type(ours) is type(theirs)
    if isinstance(theirs, torch.Tensor):
        assert torch.equal(ours, theirs)
    elif isinstance(theirs, dict):
        assert_equal(list(ours), list(theirs))
        assert_equal(list(ours.values()), list(theirs.values()))
    elif isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs)
        for our, their in zip(ours, theirs, strict=True):
            assert_equal(our, their)
    else:
        assert ours == theirs


def assert_same_steps(found: list[dict[str, Any]], expected: list[dict[str, Any]], name: str) -> None:
    """The gradient and the other values of each step, but for what is added up in another order."""
    assert len(found) == len(expected)
    for own, wanted in zip(found, expected, strict=True):
        scale = float(wanted["gradient"].abs().max())
        assert scale > 0
        torch.testing.assert_close(own["gradient"], wanted["gradient"], rtol=1e-3, atol=1e-5 * scale, msg=name)
        own, wanted = ({key: each[key] for key in each if key != "gradient"} for each in (own, wanted))
        assert own == {key: pytest.approx(wanted[key], rel=1e-4, abs=1e-6) for key in wanted}, name


def assert_close_records(ours: Path, theirs: Path) -> None:
    """Two runs with the same rollouts, and records that differ by rounding."""
    rollouts = [read_lines(run / "rollouts.jsonl") for run in (ours, theirs)]
    assert [record["tokens"] for record in rollouts[0]] == [record["tokens"] for record in rollouts[1]]
    for found, wanted in zip(metrics(ours), metrics(theirs), strict=True):
        assert found == {
            name: pytest.approx(value, rel=1e-3, abs=1e-5) if isinstance(value, float) else value
            for name, value in wanted.items()
        }


EXTRA = ["--teacher", "ema", "--ema_rate", "0.3", "--baseline", "moving_average", "--eval_problems", "3"]


def start(model: Path, runs: Path, name: str, steps: int) -> list[str]:
    return ["--model", str(model), "--runs_dir", str(runs), "--name", name, "--steps", str(steps), *QUICK, *EXTRA]


def run_main(rank: int, arguments: list[str]) -> int:
    return main(arguments)


def refused(rank: int, arguments: list[str], directory: Path) -> int:
    with (directory / f"{rank}.txt").open("w") as file, redirect_stderr(file):
        return main(arguments)


def run_interrupted(rank: int, arguments: list[str], interrupted: int, number: int = signal.SIGINT) -> int:
    """A signal reaches one of the processes, in its second step."""
    take_step = Trainer.train_step

    def step(self: Trainer) -> dict[str, object]:
        if self.step == 1 and rank == interrupted:
            os.kill(os.getpid(), number)
        return take_step(self)

    Trainer.train_step = step  # type: ignore[method-assign]
    return main(arguments)


def assert_same(ours: Path, theirs: Path) -> None:
    assert metrics(ours) == metrics(theirs)
    assert read_lines(ours / "rollouts.jsonl") == read_lines(theirs / "rollouts.jsonl")
    files = [run / "checkpoint" / "model.safetensors" for run in (ours, theirs)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert_equal(load_state(ours / "checkpoint"), load_state(theirs / "checkpoint"))


def two_steps(model: Path, directory: Path, prompts_per_step: int = 5, **settings: Any) -> list[dict[str, Any]]:
    """Records of two steps that leave the weights alone, each with its last gradient."""
    settings |= {"prompts_per_step": prompts_per_step, "learning_rate": 0.0, "weight_decay": 0.0, "max_grad_norm": 1e9}
    run = trainer(model, directory, **settings)

    def roll_out(groups: Sequence[PromptGroup], *_: Any) -> None:
        for group in groups:
            a, b, c = group.prompt[-9:-6]
            give_rollouts(run, [group], [sampled([a, b, c, 40][: 1 + a % 4], [21, c])])
            set_scores(group, a / 300, b / 300)

    run.roll_out = roll_out  # type: ignore[method-assign]
    gradients: list[torch.Tensor] = []
    run.optimizer.optimizer.register_step_pre_hook(
        lambda *_: gradients.append(
            torch.cat([full_tensor(parameter.grad).flatten() for parameter in run.models.trained])
        )
    )
    records = [run.train_step() for _ in range(2)]
    updates = run.config.updates_per_batch
    names = (
        "loss",
        "accuracy",
        "ce",
        "kl",
        "entropy",
        "length",
        "grad_norm",
        "equal_score_groups",
        "teacher_prefers_right",
    )
    return [
        {**{name: record[name] for name in names if record.get(name) is not None}, "gradient": gradient}
        for record, gradient in zip(records, gradients[updates - 1 :: updates], strict=True)
    ]


def states(run: Trainer) -> list[torch.Tensor]:
    """Log-probs [T, V] of the student for each completion of the last batch, by the model's own head."""
    found = []
    for group in run.seen:  # type: ignore[attr-defined]
        for rollout in group.rollouts:
            tokens = torch.tensor([group.prompt + rollout.tokens])
            logits = run.student.model(tokens).logits[0, len(group.prompt) - 1 : -1]
            found.append((logits / run.config.temperature).double().log_softmax(-1))
    return found
