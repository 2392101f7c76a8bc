"""Rewards beside a teacher, routing by outcome, question weights, the reference's penalty, tokens that are left out."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from runs import metrics, micro_batch, set_scores, train, trainer

from distil_kernels.train.config import Config
from distil_kernels.train.metrics import PhaseTimer, token_means
from distil_kernels.train.mixture import of_outcome, outcome_weights
from distil_kernels.train.objective import UpdateState
from distil_kernels.train.rollouts.packed_batch import PackedBatch, TokenMask
from distil_kernels.train.rollouts.prompt_group import PromptGroup
from distil_kernels.train.trainer import Trainer


def logprobs(run, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """[T, V] by the model's own head."""
    logits = run.student.model(torch.tensor([prompt + completion])).logits[0]
    return logits[len(prompt) - 1 : -1].double().log_softmax(-1)


SCORES = [1.0, 0.0, 0.25, 1.0, 0.0, 0.0, 1.0, 1.0]  # two rollouts of each of four problems


def moved_and_scored(run: Trainer) -> list[PromptGroup]:
    """Moves the student from the reference, and returns a batch of its rollouts with the SCORES."""
    with torch.no_grad():
        for parameter in run.student.model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    batch = next(run.batches)
    run.roll_out(batch)
    for index, group in enumerate(batch):
        set_scores(group, *SCORES[2 * index : 2 * index + 2])
    return batch


@pytest.mark.parametrize(
    "settings",
    [
        {"reward_weight": 0.7},
        {"reward_weight": 0.7, "reward_on": "succeeded", "distil_on": "failed"},
        {"distil_on": "failed", "distil_weight": 0.3},
        {"question_weight": "spread"},
        {"reference_weight": 0.2, "reward_weight": 0.5, "skip_first_tokens": 1},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_gradient_by_definition(tiny_model: Path, tmp_path: Path, settings: dict) -> None:
    run = trainer(tiny_model, tmp_path / "run", objective="reverse_kl", credit_span="none", teacher="frozen",
                  normalize_advantages=False, **settings)  # fmt: skip
    batch = moved_and_scored(run)
    packed = PackedBatch.of(batch, torch.device("cpu"), run.config.skip_first_tokens, run._leaves_out)
    run.micro_batch(packed, 8.0, PhaseTimer(), UpdateState())
    found = {name: p.grad.clone() for name, p in run.student.model.named_parameters()}
    run.student.model.zero_grad()

    total, config = torch.zeros((), dtype=torch.float64), run.config
    start = run.teacher.lm.model
    for index, group in enumerate(batch):
        pair = SCORES[2 * index : 2 * index + 2]
        share = sum(score >= 1.0 for score in pair) / 2
        for rollout, score in zip(group.rollouts, pair, strict=True):
            is_right = score >= 1.0
            distilled = config.distil_on == "all" or (config.distil_on == "succeeded") == is_right
            rewarded = config.reward_on == "all" or (config.reward_on == "succeeded") == is_right
            weight = config.distil_weight * distilled
            if config.question_weight == "spread":
                weight *= math.sqrt(share * (1 - share))
            s = logprobs(run, group.prompt, rollout.tokens)
            with torch.no_grad():
                t = logprobs_of(start, rollout.teacher_prompt, rollout.tokens)
                r = logprobs_of(start, group.prompt, rollout.tokens)
            place = torch.tensor(rollout.tokens)[:, None]
            chosen, reference = s.gather(1, place)[:, 0], r.gather(1, place)[:, 0]
            total = total + weight * (s.exp() * (s - t)).sum(1)[config.skip_first_tokens :].sum() / 8
            if rewarded:
                total = total - config.reward_weight * (score - sum(pair) / 2) * chosen.sum() / 8
            log_ratio = reference - chosen
            total = total + config.reference_weight * (log_ratio.expm1() - log_ratio).sum() / 8
    total.backward()
    for name, parameter in run.student.model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=2e-3, atol=3e-6)


def test_a_policy_gradient_is_held_to_the_start(tiny_model: Path, tmp_path: Path) -> None:
    """GRPO with its penalty, by definition, as the student has moved from the start."""
    run = trainer(tiny_model, tmp_path / "run", objective="policy_gradient", teacher="live", reference_weight=0.2,
                  normalize_advantages=False)  # fmt: skip
    start = copy.deepcopy(run.student.model)
    batch = moved_and_scored(run)
    _, sums = micro_batch(run, batch, 8.0)
    found = {name: p.grad.clone() for name, p in run.student.model.named_parameters()}
    run.student.model.zero_grad()
    total, penalties = torch.zeros((), dtype=torch.float64), []
    for index, group in enumerate(batch):
        pair = SCORES[2 * index : 2 * index + 2]
        for rollout, score in zip(group.rollouts, pair, strict=True):
            place = torch.tensor(rollout.tokens)[:, None]
            chosen = logprobs(run, group.prompt, rollout.tokens).gather(1, place)[:, 0]
            with torch.no_grad():
                reference = logprobs_of(start, group.prompt, rollout.tokens).gather(1, place)[:, 0]
            log_ratio = reference - chosen
            penalties += (log_ratio.expm1() - log_ratio).tolist()
            total = total - (score - sum(pair) / 2) * chosen.sum() / 8
            total = total + 0.2 * (log_ratio.expm1() - log_ratio).sum() / 8
    total.backward()
    for name, parameter in run.student.model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=2e-3, atol=3e-6)
    assert token_means([sums])["reference"] == pytest.approx(sum(penalties) / len(penalties), rel=1e-3)


def logprobs_of(model, prompt: list[int], completion: list[int]) -> torch.Tensor:
    logits = model(torch.tensor([prompt + completion])).logits[0]
    return logits[len(prompt) - 1 : -1].double().log_softmax(-1)


def test_weights_by_outcome() -> None:
    scores = torch.tensor([1.0, 0.5, math.nan, 0.0, 1.0, 1.0, math.nan, 1.0, 0.0, 0.0, 0.0, 0.0])
    assert of_outcome(scores[:4], "failed").tolist() == [0, 1, 0, 1]
    assert of_outcome(scores[:4], "succeeded").tolist() == [1, 0, 0, 0]
    spread = outcome_weights(scores, 4, Config(question_weight="spread"))
    # One of three right; all of three; none of four.
    torch.testing.assert_close(spread[::4], torch.tensor([math.sqrt(2) / 3, 0.0, 0.0]))
    assert torch.equal(spread, spread[::4].repeat_interleave(4))


def test_weight_of_the_distillation_goes_in_a_line() -> None:
    config = Config(steps=6, distil_weight=0.3, distil_weight_end=0.05)
    assert [round(config.distil_weight_at(step), 4) for step in range(7)] == [0.3, 0.25, 0.2, 0.15, 0.1, 0.05, 0.05]
    assert Config(distil_weight=0.3).distil_weight_at(5) == 0.3


def test_nothing_is_learnt_from_what_was_cut_off(tiny_model: Path, tmp_path: Path) -> None:
    run = trainer(tiny_model, tmp_path / "run", mask_truncated=True, skip_first_tokens=2)
    batch = next(run.batches)
    run.roll_out(batch)
    stop = run.sampling.stop_ids[0]
    for group in batch:
        for index, rollout in enumerate(group.rollouts):
            rollout.tokens, rollout.by_model = [5, 6, 7, stop if index else 8], [True] * 4
    packed = PackedBatch.of(batch, torch.device("cpu"), 2, run._leaves_out)
    expected = [False] * 6 + [True] * 2
    assert packed.learns.values is not None and packed.learns.values.tolist() == expected * len(batch)
    assert packed.judged.values is not None and packed.judged.values.tolist() == ([False] * 4 + [True] * 4) * len(batch)


def test_masks_join() -> None:
    left, right = (TokenMask.of(flags, torch.device("cpu")) for flags in ([True, False, False], [False, False, True]))
    assert left.either(right).values.tolist() == [True, False, True] and left.either(right).num_tokens == 2
    every = TokenMask(None, 3)
    assert left.either(every) is every and every.either(left) is every


@pytest.mark.parametrize("layout", ["all right", "all wrong"])
def test_groups_without_spread_teach_by_the_teacher_alone(tiny_model: Path, tmp_path: Path, layout: str) -> None:
    """Equal scores have no advantage: with rewards the gradient is that without."""
    found = []
    for weight in (0.0, 1.0):
        run = trainer(tiny_model, tmp_path / f"run{weight}", reward_weight=weight, credit_span="none")
        batch = next(run.batches)
        run.roll_out(batch)
        for group in batch:
            set_scores(group, *[1.0 if layout == "all right" else 0.0] * len(group.rollouts))
        micro_batch(run, batch, 8.0)
        found.append([parameter.grad for parameter in run.student.model.parameters()])
    for without, beside in zip(*found, strict=True):
        torch.testing.assert_close(beside, without, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("settings", "score"),
    [
        ({"objective": "policy_gradient", "teacher": "live"}, 0.0),
        ({"objective": "policy_gradient", "teacher": "live"}, 1.0),
        ({"question_weight": "spread"}, 0.0),
        ({"question_weight": "spread", "reward_weight": 1.0}, 1.0),
        ({"distil_on": "failed", "reward_on": "succeeded", "reward_weight": 1.0}, 1.0),
        ({"distil_on": "succeeded"}, 0.0),
    ],
)
def test_batches_that_teach_nothing_move_nothing(
    tiny_model: Path, tmp_path: Path, settings: dict, score: float
) -> None:
    """All wrong or all right, a whole step: no weight moves, and every number of the record is one."""
    run = trainer(tiny_model, tmp_path / "run", weight_decay=0.0, **settings)
    roll_out = run.roll_out

    def scored(groups, *rest) -> None:
        roll_out(groups, *rest)
        for group in groups:
            set_scores(group, *[score] * len(group.rollouts))

    run.roll_out = scored  # type: ignore[method-assign]
    before = [parameter.clone() for parameter in run.student.model.parameters()]
    record = run.train_step()
    assert record["grad_norm"] == 0.0 and record["accuracy"] == score and record["equal_score_groups"] == 1.0
    assert all(torch.equal(*pair) for pair in zip(before, run.student.model.parameters(), strict=True))
    assert all(math.isfinite(record[name]) for name in ("loss", "entropy", "length"))


def test_a_run_records_the_penalty(tiny_model: Path, tmp_path: Path) -> None:
    directory = train(
        tiny_model, tmp_path, "run", "--reference_weight", "0.1", "--teacher", "ema", "--reward_weight", "1",
        "--mask_truncated", steps=2,
    )  # fmt: skip
    steps = [record for record in metrics(directory) if record["kind"] == "step"]
    assert steps[0]["reference"] == pytest.approx(0.0, abs=1e-6) and steps[1]["reference"] >= 0.0
