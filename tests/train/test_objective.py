"""Every objective through the trainer: its gradient by definition, a run with each, presets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runs import metrics, micro_batch, packed, set_scores, train, trainer

from distil_kernels.train.command_line import parse
from distil_kernels.train.metrics import token_means
from distil_kernels.train.objective import distil_loss, group_advantages
from distil_kernels.train.presets import PRESETS
from distil_kernels.train.teachers.base import TopKTarget


def logprobs(run, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """[T, V] by the model's own head."""
    logits = run.student.model(torch.tensor([prompt + completion])).logits[0]
    return logits[len(prompt) - 1 : -1].double().log_softmax(-1)


@pytest.mark.parametrize("objective", ["reverse_kl", "jsd", "policy_gradient"])
def test_gradient_by_definition(tiny_model: Path, tmp_path: Path, objective: str) -> None:
    run = trainer(tiny_model, tmp_path / "run", objective=objective, credit_span="none", teacher="live", jsd_weight=0.3,
                  normalize_advantages=False)  # fmt: skip
    batch = next(run.batches)
    run.roll_out(batch)
    scores = torch.rand(8, dtype=torch.float64)
    for index, group in enumerate(batch):  # random scores: a random model's are all 0
        set_scores(group, *scores[2 * index : 2 * index + 2].tolist())
    micro_batch(run, batch, 8.0)
    found = {name: p.grad.clone() for name, p in run.student.model.named_parameters()}
    run.student.model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for index, group in enumerate(batch):
        mean = scores[2 * index : 2 * index + 2].mean()
        for i, rollout in enumerate(group.rollouts):
            s = logprobs(run, group.prompt, rollout.tokens)
            if objective == "policy_gradient":
                advantage = scores[2 * index + i] - mean
                total = total - advantage * s.gather(1, torch.tensor(rollout.tokens)[:, None]).sum() / 8
                continue
            with torch.no_grad():
                t = logprobs(run, rollout.teacher_prompt, rollout.tokens)
            m = torch.logaddexp(t + torch.tensor(0.3).log(), s + torch.tensor(0.7).log())
            reverse_kl = (s.exp() * (s - t)).sum()
            jsd = 0.3 * (t.exp() * (t - m)).sum() + 0.7 * (s.exp() * (s - m)).sum()
            total = total + (reverse_kl if objective == "reverse_kl" else jsd) / 8
    total.backward()
    for name, parameter in run.student.model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=2e-3, atol=2e-6)


def test_means_of_a_top_k_teacher_are_over_tokens_that_count(tiny_model: Path, tmp_path: Path) -> None:
    """What a tool said is no token of the student's: with it or without, the means are the same."""
    run = trainer(tiny_model, tmp_path / "run", credit_span="none", baseline="none", rollouts_per_prompt=1)
    spoken, heard = [5, 6], [5, 6, 7, 8]

    def logged(completion: list[int]) -> dict[str, float]:
        torch.manual_seed(0)
        hidden = torch.randn(4, run.student.weight.shape[1])[: len(completion)].requires_grad_()
        probabilities = torch.rand(4, 2).sort(1, descending=True).values / 2
        target = TopKTarget(torch.tensor([[3, 4]] * 4), probabilities.log(), torch.rand(4) / 10)
        target = TopKTarget(*(part[: len(completion)] for part in target))
        batch = packed([[1]], [0], [completion], [[index < len(spoken) for index in range(len(completion))]])
        return token_means([distil_loss(run.student, hidden, target, batch, run.config, run.average, 1.0)[1]])

    found, expected = logged(heard), logged(spoken)
    assert expected["tail"] > 0 and expected["unmapped"] > 0 and expected["cost"] > 0
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("preset", sorted(PRESETS.keys() - {"kd"}))  # which has a test of its own: themes/test_data_set
def test_a_run_with_each_preset(tiny_model: Path, tmp_path: Path, preset: str) -> None:
    directory = train(tiny_model, tmp_path, "run", "--preset", preset, steps=2)
    steps = [record for record in metrics(directory) if record["kind"] == "step"]
    assert len(steps) == 2
    for record in steps:
        assert ("ce" in record) == (preset != "grpo")
        if preset != "advisd":  # whose teacher reads right siblings, and a random model has none
            assert record["entropy"] > 0
        if preset in ("sdpo", "opsd"):
            assert record["loss"] == pytest.approx(record["cost"] * record["length"], rel=1e-5)
            assert record["credit_to_cost"] == 0
    if preset == "opsd":
        assert 0 < steps[0]["cost"] < torch.log(torch.tensor(2.0))
    assert (directory / "plot.svg").is_file()


def test_options_go_before_a_file_and_a_file_before_a_preset(tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("teacher: live\nema_rate: 0.2\n")
    config, given = parse(["--preset", "sdpo", "--config", str(file), "--ema_rate", "0.3"])
    assert (config.objective, config.credit_span, config.teacher, config.ema_rate) == (
        "reverse_kl",
        "none",
        "live",
        0.3,
    )
    assert {"objective", "teacher", "ema_rate"} <= given
    assert parse(["--preset", "distil"])[0] == replace(parse([])[0], cost="ce")


def test_group_advantages() -> None:
    scores = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    plain = group_advantages(scores, 4, normalize=False)
    assert plain.tolist() == [0.75, -0.25, -0.25, -0.25, 0, 0, 0, 0]
    torch.testing.assert_close(group_advantages(scores, 4, normalize=True), plain / 0.5)


@pytest.mark.parametrize("normalize", [False, True])
def test_advantages_are_over_rollouts_with_a_verdict(normalize: bool) -> None:
    missing = float("nan")
    scores = torch.tensor([1.0, missing, 0.0, 0.5, missing, missing, 1.0, missing])
    found = group_advantages(scores, 4, normalize)
    torch.testing.assert_close(found[[0, 2, 3]], group_advantages(scores[[0, 2, 3]], 3, normalize))
    assert found[[1, 4, 5, 6, 7]].tolist() == [0.0] * 5


def test_one_rollout_has_no_group(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--objective", "policy_gradient", "--rollouts_per_prompt", "1"])
    assert "[rollouts_per_prompt] objective policy_gradient" in capsys.readouterr().err
