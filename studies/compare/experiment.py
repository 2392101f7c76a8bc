"""One run: a pre-trained student learns from its own answers, with one objective and one teacher.

Each step samples `prompts` x `rollouts` answers; the teacher reads the correction and says, at every state of them,
what it would have done. The losses are the public ops. Everything random follows from the seed, so that runs with the
same seed see the same model, problems and, at the first step, the same answers.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from distil_kernels import fused_distil_loss, fused_policy_loss
from studies.compare.grid import Result
from studies.compare.model import Decoder
from studies.compare.tasks import TASKS, Task, cut, one_sign

BACKEND = "reference"
"""For 16 characters plain torch is as quick as any kernel, and it runs everywhere alike."""


class Objective(NamedTuple):
    label: str
    options: dict[str, Any] | None
    """Of `fused_distil_loss`; None is the policy gradient."""


_CREDIT = {"cost": "ce", "credit_span": "future", "discount": 0.9, "baseline": "leave_one_out"}
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
"""The competitors. `distil_undiscounted` is DistIL's own gradient, without a bias but for variance."""

CREDITS = {
    "undiscounted_no_baseline": Objective("discount 1, no baseline", _CREDIT | {"discount": 1.0, "baseline": None}),
    "discounted_no_baseline": Objective("discount .9, no baseline", _CREDIT | {"baseline": None}),
    "discount_half": Objective("discount .5", _CREDIT | {"discount": 0.5}),
    "horizon": Objective("discount 1, horizon 1", _CREDIT | {"discount": 1.0, "horizon": 1}),
    "by_remaining": Objective("discount 1, by remaining", _CREDIT | {"discount": 1.0, "normalize_by_remaining": True}),
    "kl_undiscounted": Objective("cost KL, discount 1", _CREDIT | {"cost": "kl", "discount": 1.0}),
}
"""Variants of `distil` that explain what becomes of the length; no competitors."""


@dataclass(frozen=True)
class Run:
    """Everything that decides the result of a run."""

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


def execute(run: Run, pretrained: Decoder) -> Result:
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
    right = _right(task, held_out, answers).view(-1, run.final_samples)
    result.correct = right.long().sum(1).tolist()
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
    _, belongs = cut(answers)
    hidden, tokens, lengths = student.answer_hidden(prompts, answers)[belongs], answers[belongs], belongs.sum(1)
    if objective.options is None:
        scores = _right(task, problems, answers).view(-1, rollouts)
        centred = scores - scores.mean(1, keepdim=True)
        advantages = (centred / scores.std(1, keepdim=True).clamp(min=1e-6)).flatten().repeat_interleave(lengths)
        return fused_policy_loss(
            hidden, student.head.weight, tokens=tokens, advantages=advantages, normalizer=len(answers), backend=BACKEND
        ).loss
    with torch.no_grad():
        advised = teacher.answer_hidden(task.prompts(problems, task.answer(problems)), answers)[belongs]
    borders = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    return fused_distil_loss(
        hidden, student.head.weight, advised, None if teacher is student else teacher.head.weight,
        tokens=tokens, cu_seqlens=borders, group_size=rollouts, backend=BACKEND, **objective.options,
    ).loss  # fmt: skip


def _evaluate(
    result: Result, step: int, run: Run, task: Task, student: Decoder, teacher: Decoder | None, problems: Tensor
) -> None:
    sampled = _sample(task, student, problems, run.eval_samples, run.seed + step)
    greedy = student.answers(task.prompts(problems), task.answer_width)
    result.steps.append(step)
    result.sampled.append(_right(task, problems, sampled).mean().item())
    result.greedy.append(_right(task, problems, greedy).mean().item())
    result.length.append(cut(sampled)[1].sum(1).double().mean().item())
    if teacher is not None:
        generator = torch.Generator().manual_seed(run.seed + step)
        prompts = task.prompts(problems, task.answer(problems))
        advised = teacher.answers(prompts, task.answer_width, 1, generator)
        result.teacher.append(_right(task, problems, advised).mean().item())


def _sample(task: Task, model: Decoder, problems: Tensor, count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(20_000 + seed)
    return model.answers(task.prompts(problems), task.answer_width, count, generator)


def _right(task: Task, problems: Tensor, answers: Tensor) -> Tensor:
    """[B * copies] float: 1 where the whole answer is right."""
    expected = task.answer(problems).repeat_interleave(len(answers) // len(problems), 0)
    return (one_sign(answers) == expected).all(1).float()
