"""One run of a small model: a pre-trained student learns from answers that it samples, with one objective and teacher.

Each step samples `prompts` x `rollouts` answers. The teacher reads the correction and gives its distribution at every
state of these answers. The losses are the public ops. Everything random follows from the seed: runs with the same seed
have the same model and problems and, at the first step, the same answers.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from distil_kernels import fused_distil_loss, fused_policy_loss
from studies.compare.decoder import Decoder
from studies.compare.digit_tasks import TASKS, Task, one_sign, truncate
from studies.compare.grid import Result

BACKEND = "reference"
"""With a vocabulary of 15 characters plain torch is as fast as any kernel, and it gives the same results everywhere."""


class Objective(NamedTuple):
    """A row of the tables: its label, and the options of `fused_distil_loss` (None for the policy gradient)."""

    label: str
    options: dict[str, Any] | None


_CREDIT = {"cost": "ce", "credit_span": "future", "discount": 0.9, "baseline": "leave_one_out"}
_BOUNDED = {"teacher_ratio_clip": 1.0, "credit_clip": 0.25}
_NO_CREDIT = {"credit_span": "none"}

OBJECTIVES = {
    "distil": Objective("CE + credit (DistIL)", _CREDIT),
    "ce": Objective("CE", {"cost": "ce"} | _NO_CREDIT),
    "distil_undiscounted": Objective("CE + credit, undiscounted", _CREDIT | {"discount": 1.0}),
    "distil_kl": Objective("KL + credit", _CREDIT | {"cost": "kl"}),
    "reverse_kl": Objective("reverse KL (SDPO)", {"cost": "reverse_kl"} | _NO_CREDIT),
    "jsd": Objective("JSD (OPSD)", {"cost": "jsd"} | _NO_CREDIT),
    "policy_gradient": Objective("policy gradient (GRPO)", None),
}
"""The objectives that compete. `distil_undiscounted` is DistIL's gradient; the discount of `distil` biases it."""

CREDITS = {
    "undiscounted_no_baseline": Objective("discount 1, no baseline", _CREDIT | {"discount": 1.0, "baseline": None}),
    "discounted_no_baseline": Objective("discount .9, no baseline", _CREDIT | {"baseline": None}),
    "discount_half": Objective("discount .5", _CREDIT | {"discount": 0.5}),
    "horizon": Objective("discount 1, horizon 1", _CREDIT | {"discount": 1.0, "horizon": 1}),
    "by_remaining": Objective("discount 1, by remaining", _CREDIT | {"discount": 1.0, "normalize_by_remaining": True}),
    "credit_clip": Objective("discount .9, within .25", _CREDIT | {"credit_clip": 0.25}),
    "teacher_ratio": Objective("discount .9, teacher's ratio", _CREDIT | {"teacher_ratio_clip": 1.0}),
    "bounded": Objective("discount .9, both bounds", _CREDIT | _BOUNDED),
    "kl_undiscounted": Objective("cost KL, discount 1", _CREDIT | {"cost": "kl", "discount": 1.0}),
}
"""Variants of `distil` that explain the length of answers; they do not compete."""


@dataclass(frozen=True)
class SmallRun:
    """Everything that decides the result of a run; the field names are keys of runs.jsonl."""

    task: str
    objective: str
    teacher: str
    learning_rate: float
    seed: int
    model_seed: int
    pretrain_steps: int
    steps: int
    prompts: int
    rollouts: int
    ema_rate: float = 0.05
    max_grad_norm: float = 1.0
    eval_every: int = 10
    eval_problems: int = 96
    eval_samples: int = 2
    final_samples: int = 16


def execute(run: SmallRun, pretrained: Decoder) -> Result:
    """Trains a copy of the pre-trained model and evaluates it on held-out problems on the way and at the end."""
    begin = time.process_time()
    task, student = TASKS[run.task], copy.deepcopy(pretrained)
    objective = (OBJECTIVES | CREDITS)[run.objective]
    teacher = student if run.teacher == "live" else copy.deepcopy(pretrained)
    optimizer = torch.optim.AdamW(student.parameters(), run.learning_rate, weight_decay=0.0, fused=True)
    generator = torch.Generator().manual_seed(run.seed)
    held_out = task.problems(run.eval_problems, torch.Generator().manual_seed(10_000 + run.model_seed), held_out=True)
    result = Result([], [], [], [], [], [], 0.0)
    for step in range(run.steps + 1):
        if step % run.eval_every == 0 or step == run.steps:
            _evaluate(result, step, run, task, student, teacher if objective.options else None, held_out)
        if step == run.steps:
            break
        problems = task.problems(run.prompts, generator)
        loss = _loss(objective, run.rollouts, task, student, teacher, problems, generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), run.max_grad_norm)
        optimizer.step()
        if run.teacher == "ema":
            with torch.no_grad():
                torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), run.ema_rate)
    answers = _sample(task, student, held_out, run.final_samples, run.seed)
    scores = _scores(task, held_out, answers).view(-1, run.final_samples)
    result.correct = scores.long().sum(1).tolist()
    result.seconds = time.process_time() - begin
    return result


def _loss(
    objective: Objective,
    rollouts: int,
    task: Task,
    student: Decoder,
    teacher: Decoder,
    problems: Tensor,
    generator: Generator,
) -> Tensor:
    prompts = task.prompts(problems)
    answers = student.answers(prompts, task.answer_width, rollouts, generator)
    _, mask = truncate(answers)
    hidden, tokens, lengths = student.answer_hidden(prompts, answers)[mask], answers[mask], mask.sum(1)
    if objective.options is None:
        scores = _scores(task, problems, answers).view(-1, rollouts)
        centred = scores - scores.mean(1, keepdim=True)
        advantages = (centred / scores.std(1, keepdim=True).clamp(min=1e-6)).flatten().repeat_interleave(lengths)
        return fused_policy_loss(
            hidden, student.head.weight, tokens=tokens, advantages=advantages, normalizer=len(answers), backend=BACKEND
        ).loss
    with torch.no_grad():
        teacher_hidden = teacher.answer_hidden(task.prompts(problems, task.answer(problems)), answers)[mask]
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    return fused_distil_loss(
        hidden, student.head.weight, teacher_hidden, None if teacher is student else teacher.head.weight,
        tokens=tokens, cu_seqlens=cu_seqlens, group_size=rollouts, backend=BACKEND, **objective.options,
    ).loss  # fmt: skip


def _evaluate(
    result: Result, step: int, run: SmallRun, task: Task, student: Decoder, teacher: Decoder | None, problems: Tensor
) -> None:
    sampled = _sample(task, student, problems, run.eval_samples, run.seed + step)
    greedy = student.answers(task.prompts(problems), task.answer_width)
    result.steps.append(step)
    result.sampled.append(_scores(task, problems, sampled).mean().item())
    result.greedy.append(_scores(task, problems, greedy).mean().item())
    result.length.append(truncate(sampled)[1].sum(1).double().mean().item())
    if teacher is not None:
        generator = torch.Generator().manual_seed(run.seed + step)
        prompts = task.prompts(problems, task.answer(problems))
        teacher_answers = teacher.answers(prompts, task.answer_width, 1, generator)
        result.teacher.append(_scores(task, problems, teacher_answers).mean().item())


def _sample(task: Task, model: Decoder, problems: Tensor, count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(20_000 + seed)
    return model.answers(task.prompts(problems), task.answer_width, count, generator)


def _scores(task: Task, problems: Tensor, answers: Tensor) -> Tensor:
    """The scores [B * copies] of answers, as float: 1 where all characters are right, else 0."""
    expected = task.answer(problems).repeat_interleave(len(answers) // len(problems), 0)
    return (one_sign(answers) == expected).all(1).float()
