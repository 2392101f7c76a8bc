"""Warnings: each from records that deserve it, none from those of a sound run."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import train

from distil_kernels.train.config import Config
from distil_kernels.train.run.health import WINDOW, warnings


def steps(first: dict, last: dict) -> list[dict]:
    sound = {
        "kind": "step",
        "kl": 0.3,
        "entropy": 1.0,
        "length": 8.0,
        "equal_score_groups": 0.5,
        "num_without_feedback": 0,
    }
    sound["truncated"] = 0.1
    return [{**sound, **first}] * WINDOW + [{**sound, **last}] * WINDOW


def evaluation(step: int, teacher: float, sampled: float) -> dict:
    return {"kind": "evaluation", "step": step, "teacher": teacher, "teacher_se": 0.03, "sampled": sampled}


def said(records: list[dict], **settings: object) -> dict[str, str]:
    return dict(warnings(records, Config(max_new_tokens=16, **settings)))


def test_a_sound_run_is_left_alone() -> None:
    records = [
        evaluation(0, 0.9, 0.2),
        *steps({}, {"kl": 0.05, "entropy": 0.4, "length": 7.0}),
        evaluation(9, 0.88, 0.9),
    ]
    assert said(records) == {}
    assert said(records, objective="policy_gradient") == {}


@pytest.mark.parametrize(
    ("kind", "text", "last", "settings"),
    [
        ("signal", "scored the same", {"equal_score_groups": 1.0}, {"objective": "policy_gradient"}),
        ("signal", "differ by 1.0e-05 nats", {"kl": 1e-5}, {}),
        (
            "signal",
            "no rollout had feedback",
            {"num_without_feedback": 16, "kl": 0.0, "entropy": 0.0},
            {"feedback": "siblings"},
        ),
        ("entropy", "collapsed entropy: 0.01 nats", {"entropy": 0.01}, {}),
        ("length", "answers run into the limit: 60% of the last 5 steps' have 16 tokens", {"truncated": 0.6}, {}),
        ("length", "shrinking answers: 2.2 tokens, 8.0 at the start", {"length": 2.2}, {}),
    ],
)
def test_each_fault_is_named(kind: str, text: str, last: dict, settings: dict) -> None:
    found = said(steps({}, last), **settings)
    assert set(found) == {kind} and text in found[kind]
    assert said(steps({}, last)[WINDOW - 1 : -1], **settings) == {}  # too early to say


FULL_CREDIT = {"teacher_ratio_clip": None, "credit_clip": None}


def test_early_ends_are_told_before_answers_shrink() -> None:
    """From the first step on, where nothing bounds what an end gains by what it saves."""
    first = steps({"cost_to_come": 1.4}, {})[:1]
    assert "saves up to 1.4 nats" in said(first, **FULL_CREDIT)["early ends"]
    assert "credit_clip" in said(first, **FULL_CREDIT | {"credit_clip": 0.6})["early ends"]
    assert said(steps({"cost_to_come": 0.9}, {})[:1], **FULL_CREDIT) == {}
    for bound in ({}, {"credit_clip": 0.5}, {"teacher_ratio_clip": 1.0}, {"credit_span": "none"}):
        assert said(first, **(FULL_CREDIT | bound if bound else bound)) == {}
    assert said(first, **FULL_CREDIT, objective="reverse_kl") == {}  # of another local gradient
    assert "keeps the credit from paying" in said(steps({}, {"length": 2.2}), **FULL_CREDIT)["length"]


def test_a_teacher_that_is_no_use() -> None:
    assert "no better than the student: 0.20" in said([evaluation(0, 0.2, 0.25)])["teacher"]
    assert "has become worse: 0.40" in said([evaluation(0, 0.9, 0.2), evaluation(5, 0.4, 0.4)])["teacher"]
    assert said([evaluation(0, 0.2, 0.25)], objective="policy_gradient") == {}


def test_a_run_says_it_once(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A random model answers nothing right, so no group has an advantage."""
    train(tiny_model, tmp_path, "run", "--preset", "grpo", "--eval_every", "0", steps=2 * WINDOW + 2)
    assert capsys.readouterr().out.count("warning: no signal: in the last") == 1
