"""Accuracy on held-out problems, greedy and sampled, with standard errors, and the teacher's own as an alarm.

The problems are the same at each evaluation, and shared out among the processes. Sampling starts from the same seed,
its own in each process, in a forked generator that leaves the training's draws alone. Standard errors are over
problems: a problem's samples are averaged first, because they are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch

from distil_kernels.train.batches import fits
from distil_kernels.train.feedback.kinds import Prompts, Verifier
from distil_kernels.train.feedback.siblings import Said, Say
from distil_kernels.train.models.reading import Reader
from distil_kernels.train.rollouts.python_tool import Python, Rollouts, roll_out
from distil_kernels.train.rollouts.sampling import Sampling, sample
from distil_kernels.train.run.distributed import ALONE, Processes
from distil_kernels.train.tasks import Problem, Task
from distil_kernels.train.teachers.local import Teacher
from distil_kernels.train.teachers.remote import RemoteTeacher

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
    pass_at: dict[int, tuple[float, float]]
    """Chance that one of k sampled answers is right, with its standard error, by k: 1, 2, 4, ..., eval_samples."""
    correct: list[int]
    """Of each problem, how many of its sampled answers are right (score 1)."""


class _Answers(NamedTuple):
    scores: list[list[list[float]]]
    """Of the sampled, the greedy and the teacher's answers to each problem."""
    num_tokens: int
    """Of the sampled answers."""


class Evaluator:
    """Holds the held-out problems and how to answer them."""

    def __init__(
        self,
        task: Task,
        verify: Verifier,
        say: Say,
        prompts: Prompts,
        held_out: Sequence[Problem],
        sampling: Sampling,
        num_samples: int,
        seed: int,
        tool: Python | None = None,
        processes: Processes = ALONE,
        teacher_temperature: float = 1.0,
    ) -> None:
        self._task, self._verify, self._say, self._prompts, self._sampling = task, verify, say, prompts, sampling
        self._num_samples, self._seed, self._tool, self._processes = num_samples, seed, tool, processes
        self._teachers_sampling = replace(sampling, temperature=teacher_temperature)
        fitting = []
        for problem in held_out:
            student = prompts.student(problem)
            if student and fits(task, verify, prompts, problem):
                fitting.append((problem, student))
        self.student_prompts: list[tuple[Problem, list[int]]] = processes.from_main(fitting)
        """The held-out problems that fit, with what the student reads."""
        if not self.student_prompts:
            raise ValueError(f"[max_prompt_tokens] none of {len(held_out)} held-out problems fits")

    @contextmanager
    def own_draws(self, student: Reader) -> Iterator[None]:
        """In it, sampling starts from the evaluation's seed; training's generator is left alone."""
        devices = [student.weight.device] if student.weight.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(self._processes.seed(self._seed))
            yield

    def __call__(
        self, student: Reader, teacher: Teacher | RemoteTeacher, stop: Callable[[], bool] = lambda: False
    ) -> Evaluation | None:
        """None when `stop` became true between batches, in any process."""
        with self.own_draws(student):
            parts = self._processes.gather([self._own_answers(student, teacher, stop)])
        found = [part for part in parts if part is not None]
        if len(found) < len(parts):
            return None
        scores = [[own for part in found for own in part.scores[kind]] for kind in range(3)]
        means = [mean_and_error([sum(own) / len(own) for own in by_problem]) for by_problem in scores]
        length = sum(part.num_tokens for part in found) / (len(scores[0]) * self._num_samples)
        correct = [sum(score >= 1.0 for score in own) for own in scores[0]]
        return Evaluation(*means[0], *means[1], *means[2], length, len(scores[0]), pass_at(scores[0]), correct)

    def _own_answers(
        self, student: Reader, teacher: Teacher | RemoteTeacher, stop: Callable[[], bool]
    ) -> _Answers | None:
        """To this process's share of the problems."""
        problems = self._processes.share(self.student_prompts)
        draw = partial(roll_out, partial(sample, student))
        sampled, num_tokens = self._answers(draw, problems, self._num_samples, self._sampling, stop)
        greedy, _ = self._answers(draw, problems, 1, replace(self._sampling, temperature=0.0), stop)
        if stop():
            return None
        # The teacher reads what is said of the greedy answer, whose siblings are the sampled ones; where that is
        # nothing, what the student reads.
        groups = [first + others for first, others in zip(greedy, sampled, strict=True)]
        said = self._say(student, [problem for problem, _ in problems], groups, 1)
        read = [
            (problem, self._prompts.teacher(problem, first[0]) or prompt)
            for (problem, prompt), first in zip(problems, said, strict=True)
        ]
        taught, _ = self._answers(teacher.answers, read, 1, self._teachers_sampling, stop)
        if stop():
            return None
        scores = [[[feedback.score for _, feedback in own] for own in answers] for answers in (sampled, greedy, taught)]
        return _Answers(scores, num_tokens)

    def _answers(
        self,
        draw: Callable[[Sequence[list[int]], Sequence[int], Sampling, Python | None], Rollouts],
        problems: Sequence[tuple[Problem, list[int]]],
        num_samples: int,
        sampling: Sampling,
        stop: Callable[[], bool],
    ) -> tuple[list[list[Said]], int]:
        """The answers to each problem, behind its prompt, with what is said of them, and their number of tokens."""
        per_batch = max(1, BATCH_ROWS // num_samples)
        answers: list[list[Said]] = []
        num_tokens = 0
        for begin in range(0, len(problems), per_batch):
            if stop():
                break
            batch = problems[begin : begin + per_batch]
            rows = [row for row in range(len(batch)) for _ in range(num_samples)]
            found = draw([prompt for _, prompt in batch], rows, sampling, self._tool)
            num_tokens += sum(map(sum, found.written))
            for row, (problem, _) in enumerate(batch):
                done = found.completions[row * num_samples : (row + 1) * num_samples]
                own = [self._prompts.answer(tokens) for tokens in done]
                answers.append([(text, self._verify(self._task, problem, text)) for text in own])
        return answers, num_tokens


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error (n - 1 in the variance; nan for fewer than two values)."""
    count = len(values)
    mean = sum(values) / count if count else math.nan
    if count < 2:
        return mean, math.nan
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1) / count)


def pass_at(scores: Sequence[Sequence[float]]) -> dict[int, tuple[float, float]]:
    """Mean and standard error over problems of the unbiased pass@k, k = 1, 2, 4, ... and the number of samples.

    1 - C(n - c, k) / C(n, k) for c right ones (score 1) of n samples (Chen et al., arXiv 2107.03374, section 2.1).
    """
    num_samples = len(scores[0])
    rates = {}
    for k in sorted({*(2**i for i in range(num_samples.bit_length())), num_samples}):
        chances = []
        for own in scores:
            wrong = sum(score < 1.0 for score in own)
            chances.append(1.0 - math.comb(wrong, k) / math.comb(num_samples, k))
        rates[k] = mean_and_error(chances)
    return rates
