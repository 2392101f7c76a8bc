"""The teacher between start and student: its distribution, what it samples, and a run."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from runs import assert_same, metrics, packed, train, trainer
from tiny import llama_config
from transformers import AutoModelForCausalLM

from distil_kernels.hf import split
from distil_kernels.train.__main__ import main
from distil_kernels.train.config import Config
from distil_kernels.train.models.lora import with_adapters
from distil_kernels.train.models.reading import Reader, reader
from distil_kernels.train.rollouts.sampling import Sampling
from distil_kernels.train.teachers.trust_region import TrustRegionTeacher

PROMPTS, COMPLETIONS = [[7, 8, 9], [7, 3]], [[20, 30, 40], [21, 31], [22], [23, 33, 43, 53]]
SHARE = 0.3


def student(kind: str) -> Reader:
    torch.manual_seed(3)
    config = llama_config(vocab_size=64, tie_word_embeddings=kind == "tied", attention_bias=kind == "bias")
    model = AutoModelForCausalLM.from_config(config).eval()
    if kind == "adapters":
        model = with_adapters(model, 4, 16.0, "")
    return reader(split(model))


def move(lm: Reader) -> None:
    with torch.no_grad():
        for parameter in lm.model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)


def logits(lm: Reader, rows: list[list[int]]) -> list[torch.Tensor]:
    with torch.no_grad():
        return [lm.model(torch.tensor([row])).logits[0].double() for row in rows]


@pytest.mark.parametrize("kind", ["tied", "untied", "adapters"])
def test_its_logits_lie_between_those_of_start_and_student(kind: str) -> None:
    lm = student(kind)
    rows = [PROMPTS[index // 2] + tokens for index, tokens in enumerate(COMPLETIONS)]
    teacher, before = TrustRegionTeacher(lm, SHARE), logits(lm, rows)
    move(lm)
    after = logits(lm, rows)
    target = teacher.target(packed(PROMPTS, [0, 0, 1, 1], COMPLETIONS))
    weight = lm.weight if target.weight is None else target.weight
    assert (target.weight is None) == (kind == "adapters")
    found = target.states.double() @ weight.double().T
    between = [
        torch.lerp(start, now, SHARE)[len(PROMPTS[index // 2]) - 1 : -1]
        for index, (start, now) in enumerate(zip(before, after, strict=True))
    ]
    torch.testing.assert_close(found, torch.cat(between), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(torch.cat(before), torch.cat(after), atol=1e-2)


@pytest.mark.parametrize("kind", ["untied", "adapters"])
def test_it_answers_by_these_logits(kind: str) -> None:
    lm = student(kind)
    start = student(kind)  # the same weights, which stay
    teacher = TrustRegionTeacher(lm, SHARE)
    move(lm)
    index = [0, 1, 1]
    rollouts = teacher.generate(PROMPTS, index, Sampling(5, [63], temperature=0.0))
    for rollout, place in zip(rollouts, index, strict=True):
        row = list(PROMPTS[place])
        for token in rollout.tokens:
            (before,), (after,) = logits(start, [row]), logits(lm, [row])
            assert token == int(torch.lerp(before[-1], after[-1], SHARE).argmax())
            row.append(token)


def test_a_softcap_is_refused() -> None:
    lm = dataclasses.replace(student("tied"), logit_softcap=30.0)
    with pytest.raises(ValueError, match=r"\[teacher\] trust_region interpolates logits: expected a model without a"):
        TrustRegionTeacher(lm, SHARE)
    with pytest.raises(ValueError, match=r"\[shard\] teacher trust_region takes False, got True"):
        Config(teacher="trust_region", shard=True).check()


def test_a_run_is_resumed_and_shares_its_start_with_the_penalty(tiny_model: Path, tmp_path: Path) -> None:
    options = ("--teacher", "trust_region", "--ema_rate", "0.3", "--reference_weight", "0.1", "--eval_every", "1")
    whole = train(tiny_model, tmp_path, "whole", *options)
    parts = train(tiny_model, tmp_path, "parts", *options, steps=1)
    assert main(["--resume", str(parts), "--steps", "3"]) == 0
    assert_same(parts, whole)
    evaluations = [record for record in metrics(whole) if record["kind"] == "evaluation"]
    assert all(0.0 <= record["teacher"] <= 1.0 for record in evaluations)
    run = trainer(tiny_model, tmp_path / "run", teacher="trust_region", reference_weight=0.1)
    assert run.models.reference is run.teacher and run.models.fingerprint
