"""Accuracy on held-out problems, greedy and sampled, with standard errors, and the teacher's own as an alarm.

The problems are the same at each evaluation and sampling starts from the same seed, in a forked generator that leaves
the training's draws alone. Standard errors are over problems: a problem's samples are averaged first, because they
are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from distil_kernels.hf import CausalLM
from distil_kernels.train.feedback import Prompts, verify
from distil_kernels.train.rollout import Sampling, sample
from distil_kernels.train.tasks import Problem, Task
from distil_kernels.train.teacher import Teacher

BATCH_ROWS = 128


@dataclass(frozen=True)
class Evaluation:
    """Means in 0 to 1 with their standard errors, and mean length in tokens."""

    sampled: float
    sampled_se: float
    greedy: float
    greedy_se: float
    teacher: float
    teacher_se: float
    length: float
    problems: int


class Evaluator:
    """Holds the held-out problems and how to answer them."""

    def __init__(
        self,
        task: Task,
        prompts: Prompts,
        held_out: Sequence[Problem],
        sampling: Sampling,
        num_samples: int,
        seed: int,
        share: bool,
    ) -> None:
        self._task, self._prompts, self._sampling = task, prompts, sampling
        self._num_samples, self._seed, self._share = num_samples, seed, share
        self._problems, self._student, self._teacher = [], [], []
        for problem in held_out:
            student = prompts.student(problem)
            teacher = prompts.teacher(problem, verify(task, problem, ""))
            if student and teacher:
                self._problems.append(problem)
                self._student.append(student)
                self._teacher.append(teacher)
        if not self._problems:
            raise ValueError(f"[max_prompt_tokens] none of {len(held_out)} held-out problems fits")

    def __call__(
        self, student: CausalLM, teacher: Teacher, stop: Callable[[], bool] = lambda: False
    ) -> Evaluation | None:
        """None when `stop` became true between batches."""
        devices = [student.weight.device] if student.weight.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(self._seed)
            answers = []
            for lm, prompts, greedy in (
                (student, self._student, False),
                (student, self._student, True),
                (teacher.lm, self._teacher, False),
            ):
                with teacher.reading() if prompts is self._teacher else torch.no_grad():
                    answers.append(self._answers(lm, prompts, greedy, stop))
                if stop():
                    return None
        (sampled, length), (greedy_scores, _), (taught, _) = answers
        return Evaluation(
            *mean_and_error(sampled), *mean_and_error(greedy_scores), *mean_and_error(taught), length, len(sampled)
        )

    def _answers(
        self, lm: CausalLM, prompts: Sequence[list[int]], greedy: bool, stop: Callable[[], bool]
    ) -> tuple[list[float], float]:
        """Mean score of each problem, and mean length."""
        num_samples = 1 if greedy or prompts is self._teacher else self._num_samples
        sampling = replace(self._sampling, temperature=0.0) if greedy else self._sampling
        per_batch = max(1, BATCH_ROWS // num_samples)
        scores: list[float] = []
        num_tokens = 0
        for begin in range(0, len(prompts), per_batch):
            if stop():
                break
            batch = prompts[begin : begin + per_batch]
            rows = [row for row in range(len(batch)) for _ in range(num_samples)]
            completions = sample(lm, batch, rows, sampling, self._share)
            num_tokens += sum(map(len, completions))
            for first in range(0, len(rows), num_samples):
                problem = self._problems[begin + rows[first]]
                own = completions[first : first + num_samples]
                scores.append(
                    sum(verify(self._task, problem, self._prompts.answer(c)).score for c in own) / num_samples
                )
        return scores, num_tokens / max(1, len(scores) * num_samples)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error (n - 1 in the variance; nan for fewer than two values)."""
    count = len(values)
    mean = sum(values) / count if count else math.nan
    if count < 2:
        return mean, math.nan
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1) / count)
