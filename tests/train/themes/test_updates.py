"""Several updates on one batch of rollouts: weighted by the ratio to the policy that sampled, resumed exactly."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from runs import metrics, set_scores, states, train, trainer
from two_processes import together

from distil_kernels.train.__main__ import main
from distil_kernels.train.models.sharding import local_shard
from distil_kernels.train.run.json_lines import read_lines
from distil_kernels.train.teachers.in_process import InProcessTeacher
from distil_kernels.train.trainer import Trainer


def gradients(run: Trainer) -> list[dict[str, torch.Tensor]]:
    """Of every update of one step, before its optimiser step."""
    found: list[dict[str, torch.Tensor]] = []
    run.optimizer.optimizer.register_step_pre_hook(
        lambda *_: found.append({name: p.grad.clone() for name, p in run.student.model.named_parameters()})
    )
    run.record = run.train_step()  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize("objective", ["forward_ce", "policy_gradient"])
def test_the_second_gradient_by_definition(tiny_model: Path, tmp_path: Path, objective: str) -> None:
    """With a temperature, a bound that some ratios meet, and weights that the first update has moved."""
    run = trainer(
        tiny_model, tmp_path / "run", objective=objective, credit_span="none", teacher="frozen", temperature=0.8,
        updates_per_batch=2, importance_clip=1.05, learning_rate=3e-3, warmup_steps=0, max_grad_norm=1e9,
        normalize_advantages=False,
    )  # fmt: skip
    roll_out = run.roll_out

    def seen(batch: Any, *rest: Any) -> None:
        roll_out(batch, *rest)
        for index, group in enumerate(batch):
            set_scores(group, float(index), float(index + 1))
        run.seen = batch  # type: ignore[attr-defined]
        run.old = [logprobs.detach() for logprobs in states(run)]  # type: ignore[attr-defined]

    run.roll_out = seen  # type: ignore[method-assign]
    take, at_second = run.optimizer.step, []

    def step() -> None:
        take()
        if not at_second:  # the weights that the second update sees
            at_second.append({name: value.clone() for name, value in run.student.model.state_dict().items()})

    run.optimizer.step = step
    _, second = gradients(run)
    run.student.model.load_state_dict(at_second[0])
    run.student.model.zero_grad()
    total, drift, ratios = torch.zeros((), dtype=torch.float64), [], []
    new = states(run)
    rollouts = [rollout for group in run.seen for rollout in group.rollouts]  # type: ignore[attr-defined]
    for index, (rollout, old, s) in enumerate(zip(rollouts, run.old, new, strict=True)):  # type: ignore[attr-defined]
        done = rollout.tokens
        tokens = torch.tensor(done)[:, None]
        log_ratio = (s - old).gather(1, tokens)[:, 0]
        drift += (-log_ratio).tolist()
        ratios += log_ratio.exp().tolist()
        if objective == "policy_gradient":
            advantage = -0.5 if index % 2 == 0 else 0.5
            ratio = log_ratio.exp()
            total = total - torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).sum()
            continue
        prompt = rollout.teacher_prompt
        with torch.no_grad():
            t = run.teacher.lm.model(torch.tensor([prompt + done])).logits[0, len(prompt) - 1 : -1]
            t = t.double().log_softmax(-1)
        weight = log_ratio.exp().detach().clamp(max=1.05)
        total = total - (weight[:, None] * t.exp() * s).sum()
    (total / 8).backward()
    assert min(ratios) < 0.95 and max(ratios) > 1.06
    for name, parameter in run.student.model.named_parameters():
        scale = float(parameter.grad.abs().max())
        torch.testing.assert_close(second[name], parameter.grad, rtol=2e-3, atol=2e-4 * scale)
    record, low, high = run.record, *((0.8, 1.2) if objective == "policy_gradient" else (1 / 1.05, 1.05))  # type: ignore
    assert record["drift"] == pytest.approx(sum(drift) / len(drift), rel=1e-3, abs=1e-5)
    assert record["ratio"] == pytest.approx(sum(ratios) / len(ratios), rel=1e-3)
    tail = sum(not low <= ratio <= high for ratio in ratios) / len(ratios)
    assert record["ratio_tail"] == pytest.approx(tail, abs=1e-6) and (objective == "policy_gradient" or tail > 0)


@pytest.mark.parametrize("teacher", ["frozen", "ema", "live"])
def test_the_teacher_is_asked_again_only_where_it_moved(
    tiny_model: Path, tmp_path: Path, teacher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    target = InProcessTeacher.target
    monkeypatch.setattr(InProcessTeacher, "target", lambda self, *rest: (calls.append(1), target(self, *rest))[1])
    run = trainer(tiny_model, tmp_path / "run", teacher=teacher, updates_per_batch=3, micro_batch_prompts=2)
    run.train_step()
    assert len(calls) == (2 if teacher == "frozen" else 6)


def test_the_moving_average_is_of_fresh_rollouts(tiny_model: Path, tmp_path: Path) -> None:
    averages = []
    for updates in (1, 3):
        run = trainer(tiny_model, tmp_path / str(updates), baseline="moving_average", updates_per_batch=updates)
        run.train_step()
        averages.append(run.average.values([4]))
    assert torch.equal(*averages) and averages[0].abs().max() > 0


def test_a_resumed_run_repeats_an_uninterrupted_one(tiny_model: Path, tmp_path: Path) -> None:
    extra = ("--teacher", "ema", "--baseline", "moving_average", "--updates_per_batch", "3")
    whole = train(tiny_model, tmp_path, "whole", *extra, steps=4)
    parts = train(tiny_model, tmp_path, "parts", *extra, steps=2)
    assert main(["--resume", str(parts), "--steps", "4"]) == 0
    assert metrics(parts) == metrics(whole)
    assert read_lines(parts / "rollouts.jsonl") == read_lines(whole / "rollouts.jsonl")
    ours, theirs = ((run / "checkpoint" / "model.safetensors").read_bytes() for run in (parts, whole))
    assert ours == theirs
    steps = [record for record in metrics(whole) if record["kind"] == "step"]
    assert all(record["drift"] != 0 for record in steps)
    (state,) = torch.load(whole / "checkpoint" / "trainer.pt")["optimizer"]["param_groups"]
    assert state["lr"] == 1e-3  # the schedule counts batches


def test_more_updates_go_further(tiny_model: Path, tmp_path: Path) -> None:
    """The same first update, and a later batch whose teacher is closer."""
    runs = [
        metrics(train(tiny_model, tmp_path, str(n), "--updates_per_batch", str(n), "--credit_span", "none", steps=6))
        for n in (1, 4)
    ]
    once, often = ([record for record in run if record["kind"] == "step"] for run in runs)
    assert "drift" not in once[0] and once[0]["loss"] == often[0]["loss"]
    assert once[0]["grad_norm"] == often[0]["grad_norm"]
    assert often[-1]["kl"] < once[-1]["kl"]


def harmed(run: Trainer, bad: float, at: set[int]) -> None:
    """Makes an entry of the gradient `bad` in these of the run's updates, counted from 0."""
    update, count = run.micro_batch, itertools.count()

    def micro_batch(*rest: Any) -> Any:
        out = update(*rest)
        if next(count) in at:
            run.average.observe(torch.tensor([bad]), [1])
            for weight in run.models.trained:
                weight.grad.view(-1)[0] = bad
        return out

    run.micro_batch = micro_batch  # type: ignore[method-assign]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_moves_nothing(tiny_model: Path, tmp_path: Path, bad: float) -> None:
    run = trainer(
        tiny_model, tmp_path / "run", teacher="ema", ema_rate=0.5, baseline="moving_average", learning_rate=1e-2
    )
    run.log.print = said = Mock()  # type: ignore[method-assign]
    harmed(run, bad, {1, 3})
    parts = run.student.model, run.teacher.lm.model  # type: ignore[union-attr]
    for step in range(4):
        before = [weight.clone() for part in parts for weight in part.parameters()]
        record = run.train_step()
        after = [weight for part in parts for weight in part.parameters()]
        moved = [not torch.equal(*pair) for pair in zip(before, after, strict=True)]
        assert any(moved) == (step % 2 == 0) and record["num_skipped_updates"] == step % 2
        assert bool(run.average.values([4]).isfinite().all()) and all(bool(w.isfinite().all()) for w in after)
    assert said.call_count == 1 and "step 2 is not finite" in said.call_args[0][0]


def test_only_the_update_with_it_is_left_out(tiny_model: Path, tmp_path: Path) -> None:
    run = trainer(tiny_model, tmp_path / "run", updates_per_batch=3)
    harmed(run, math.nan, {1})
    record = run.train_step()
    assert record["num_skipped_updates"] == 1 and math.isfinite(record["grad_norm"])
    assert {int(state["step"]) for state in run.optimizer.state.values()} == {2}


def test_a_run_that_diverges_stops_and_keeps_what_was_good(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = train(tiny_model, tmp_path, "run", "--checkpoint_every", "1", "--eval_every", "0", steps=2)
    names = {"checkpoint-000001", "checkpoint-000002"}
    assert {path.name for path in directory.glob("checkpoint-*")} == names
    take_step = Trainer.train_step

    def step(self: Trainer) -> dict[str, Any]:
        if self.step == 2:
            harmed(self, math.nan, set(range(100)))
        return take_step(self)

    monkeypatch.setattr(Trainer, "train_step", step)
    capsys.readouterr()
    assert main(["--resume", str(directory), "--steps", "50"]) == 1
    said = capsys.readouterr()
    assert "warning: the gradient of step 3 is not finite" in said.out
    assert "stopped at step 7: the gradient of 5 steps in a row was not finite" in said.err
    assert {path.name for path in directory.glob("checkpoint-*")} == names
    lines = [json.loads(line, parse_constant=pytest.fail) for line in (directory / "metrics.jsonl").open()]
    assert [line["num_skipped_updates"] for line in lines if line["kind"] == "step"] == [0, 0, 1, 1, 1, 1, 1]
    assert lines[-1]["grad_norm"] is None
    assert main(["report", str(directory)]) == 0
    monkeypatch.undo()
    assert main(["--resume", str(directory), "--steps", "4"]) == 0


def test_weights_that_are_not_finite_are_not_saved(tiny_model: Path, tmp_path: Path) -> None:
    run = trainer(tiny_model, tmp_path / "run")
    run.train_step()
    with torch.no_grad():
        run.models.trained[-1].view(-1)[0] = math.inf
    with pytest.raises(FloatingPointError, match="stopped at step 1: the weights are not finite"):
        run.save()
    assert list(run.directory.glob("checkpoint*")) == []


def harmed_in_one(rank: int, model: Path, directory: Path, is_sharded: bool) -> None:
    run = trainer(model, directory / str(rank), shard=is_sharded)
    summed = run.processes.sum_gradients

    def sum_gradients(parameters: Any) -> None:
        if rank == 1:
            local_shard(run.models.trained[0].grad).view(-1)[0] = math.nan
        summed(parameters)

    object.__setattr__(run.processes, "sum_gradients", sum_gradients)
    before = [local_shard(weight).clone() for weight in run.models.trained]
    record = run.train_step()
    assert record["num_skipped_updates"] == 1 and math.isnan(record["grad_norm"])
    assert all(torch.equal(local_shard(weight), old) for weight, old in zip(run.models.trained, before, strict=True))
    run.models.trained[0].data.fill_(math.nan if rank == 0 else 0.0)
    with pytest.raises(FloatingPointError):
        run.save()


@pytest.mark.parametrize("is_sharded", [False, True])
def test_all_processes_leave_out_the_same(tiny_model: Path, tmp_path: Path, is_sharded: bool) -> None:
    assert together(harmed_in_one, tiny_model, tmp_path, is_sharded) == [0, 0]
