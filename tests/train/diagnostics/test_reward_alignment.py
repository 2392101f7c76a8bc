"""First-order reward alignment of the objectives, against plain float64 autograd on the model's own logits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from runs import FULL_CREDIT, give_rollouts, micro_batch, pack, sampled, set_scores, trainer

from distil_kernels.train.diagnostics.reward_alignment import NAMES, alignment_metrics
from distil_kernels.train.models.reading import reader


def by_hand(run, groups) -> dict[str, float]:
    """The same metrics from whole logits in float64."""
    batch = pack(groups)
    done = batch.completions
    teacher_prompts = [rollout.teacher_prompt for group in groups for rollout in group.rollouts]
    with torch.no_grad():
        hidden = reader(run.student, "padded").states(batch.prompts, batch.prompt_index, done).double()
        taught = reader(run.teacher.lm, "padded").states(teacher_prompts, range(len(done)), done).double()
    hidden.requires_grad_()
    weight = run.student.weight.detach().double()
    s, t = (hidden @ weight.t()).log_softmax(-1), (taught @ run.teacher.lm.weight.double().t()).log_softmax(-1)
    p = t.exp()
    tokens = torch.tensor([token for own in done for token in own])
    logprob = s[torch.arange(len(tokens)), tokens]
    scores = batch.scores.double()
    advantages = (scores.unflatten(0, (-1, 2)) - scores.unflatten(0, (-1, 2)).mean(1, keepdim=True)).flatten()
    lengths = torch.tensor([len(own) for own in done])
    ce = -(p * s).sum(-1)
    mixture = (0.5 * s.exp() + 0.5 * p).log()
    jsd = 0.5 * (p * (t - mixture)).sum(-1) + 0.5 * (s.exp() * (s - mixture)).sum(-1)
    future = torch.zeros(len(tokens), dtype=torch.float64)
    start = 0
    for length in lengths.tolist():
        for position in range(length - 2, -1, -1):
            later = start + position + 1
            future[start + position] = 0.9 * (ce[later] + future[later]).detach()
        start += length
    losses = {
        "forward_ce": ce.sum(),
        "forward_ce_credit": ce.sum() + (future * logprob).sum(),
        "reverse_kl": (s.exp() * (s - t)).sum(),
        "jsd": jsd.sum(),
    }
    reward = torch.autograd.grad(-(advantages.repeat_interleave(lengths) * logprob).sum(), hidden, retain_graph=True)[0]
    found = {name: torch.autograd.grad(loss, hidden, retain_graph=True)[0] for name, loss in losses.items()}
    shown = {f"align_{name}": float((own * reward).sum() / (own.norm() * reward.norm())) for name, own in found.items()}
    credit = found["forward_ce_credit"] - found["forward_ce"]
    return shown | {"credit_to_local": float(credit.norm() / found["forward_ce"].norm())}


def batch_of(run, scores) -> list:
    groups = next(run.batches)
    give_rollouts(run, groups, [sampled([20 + i, 30, 41], [21, 31 + i]) for i in range(len(groups))])
    for group in groups:
        set_scores(group, *scores)
    return groups


@pytest.mark.parametrize("size", [4, 1])
def test_figures_are_those_of_plain_autograd(tiny_model: Path, tmp_path: Path, size: int) -> None:
    run = trainer(
        tiny_model, tmp_path / "run", alignment_every=1, cost="ce", baseline="none", discount=0.9, credit_span="future",
        teacher="frozen", **FULL_CREDIT,
    )  # fmt: skip
    batch = batch_of(run, (1.0, 0.0))
    parts = [micro_batch(run, batch[i : i + size], 8.0)[1] for i in range(0, len(batch), size)]
    found = alignment_metrics([part.inner_products for part in parts])
    expected = by_hand(run, batch)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=2e-4), name
    assert len({round(found[f"align_{name}"], 5) for name in NAMES}) == len(NAMES)


def test_no_figure_without_a_reward(tiny_model: Path, tmp_path: Path) -> None:
    run = trainer(tiny_model, tmp_path / "run", alignment_every=1)
    batch = batch_of(run, (1.0, 1.0))
    found = alignment_metrics([micro_batch(run, batch, 8.0)[1].inner_products])
    assert all(found[f"align_{name}"] is None for name in NAMES)
    assert found["credit_to_local"] > 0
    json.dumps(found, allow_nan=False)


def test_every_other_step(tiny_model: Path, tmp_path: Path) -> None:
    run = trainer(tiny_model, tmp_path / "run", alignment_every=2)
    records = [run.train_step() for _ in range(3)]
    assert ["align_jsd" in record for record in records] == [False, True, False]
