"""Accuracy on held-out problems, greedy and sampled, with standard errors, and the teacher's, whose fall is an alarm.

The problems are the same at each evaluation, and shared out among the processes. Each process has one seed for all
evaluations, and samples with a forked generator that leaves the one of training as it is. Standard errors are over
problems: the scores of a problem's samples are averaged first, because they are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch

from distil_kernels.train.feedback.tutor import Tutor
from distil_kernels.train.models.reading import Reader
from distil_kernels.train.rollouts.prompt_group import PromptGroup
from distil_kernels.train.rollouts.sampling import Generate, Sampling, generate
from distil_kernels.train.run.distributed import ALONE, Processes
from distil_kernels.train.tasks import Problem
from distil_kernels.train.teachers.base import Teacher

BATCH_ROWS = 128
"""Completions that are sampled at once; the greedy ones to the same problems are beside them."""


@dataclass(frozen=True)
class Evaluation:
    """Mean scores from 0 to 1 with their standard errors, and the mean length in tokens."""

    sampled: float
    sampled_se: float
    greedy: float
    greedy_se: float
    teacher: float
    teacher_se: float
    length: float
    """Of the sampled answers, without what they observed."""
    num_problems: int
    pass_at: dict[int, tuple[float, float]]
    """By k = 1, 2, 4, ..., eval_samples: the chance that one of k sampled answers is right, and its standard error."""
    num_correct: list[int]
    """For each problem, the number of its sampled answers that are right (score 1)."""
    num_without_verdict: int = 0
    """Answers whose judge hung or died, which are left out of all of this."""


class _Scores(NamedTuple):
    """A process's part of an evaluation."""

    by_kind: tuple[list[list[float]], ...]
    """Of sampled, greedy and teacher's answers: for each problem the scores of its answers with a verdict."""
    num_tokens: int
    """Tokens of the model in the sampled answers."""
    num_without_verdict: int


class Evaluator:
    """The held-out problems, and how they are answered.

    Args:
        held_out: problems; those whose prompts do not fit are left out.
        sampling: parameters of the student's sampled answers.
        num_samples: sampled answers to each problem.
        teacher_temperature: temperature of the teacher's answers.

    Raises:
        ValueError: none of the problems fits.
    """

    def __init__(
        self,
        tutor: Tutor,
        held_out: Sequence[Problem],
        sampling: Sampling,
        num_samples: int,
        seed: int,
        processes: Processes = ALONE,
        teacher_temperature: float = 1.0,
    ) -> None:
        self.tutor, self._sampling, self._num_samples, self._seed = tutor, sampling, num_samples, seed
        self._processes = processes
        self._teacher_sampling = replace(sampling, temperature=teacher_temperature)
        self._teacher_answered: tuple[list[list[int]], list[list[float]]] = [], []
        """The teacher's last prompts, and the scores of its answers."""
        fitting = [group for group in map(tutor.group, held_out) if group is not None]
        self._groups: list[PromptGroup] = processes.from_main(fitting)
        if not self._groups:
            raise ValueError(f"[max_prompt_tokens] none of {len(held_out)} held-out problems fits")

    def groups(self, count: int | None = None) -> list[PromptGroup]:
        """The first `count` held-out problems, without rollouts; None for all."""
        return [group.without_rollouts() for group in self._groups[:count]]

    @contextmanager
    def seeded(self, device: torch.device) -> Iterator[None]:
        """A context in which sampling starts from the evaluation's seed; the generator of training is left as it is."""
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(self._processes.seed(self._seed))
            yield

    def evaluate(
        self, student: Reader, teacher: Teacher, stop: Callable[[], bool] = lambda: False
    ) -> Evaluation | None:
        """None if `stop` became true between batches, in any process."""
        with student.opened(), teacher.opened(), self.seeded(student.weight.device):
            with self._processes.all_or_none():
                scores = self._scores(student, teacher, stop)
            parts = self._processes.gather([scores])
        complete = [part for part in parts if part is not None]
        if len(complete) < len(parts):
            return None
        sampled, greedy, by_teacher = ([s for part in complete for s in part.by_kind[kind]] for kind in range(3))
        means = [
            mean_and_error([sum(scores) / len(scores) for scores in kind if scores])
            for kind in (sampled, greedy, by_teacher)
        ]
        return Evaluation(
            *means[0], *means[1], *means[2],
            length=sum(part.num_tokens for part in complete) / (len(sampled) * self._num_samples),
            num_problems=len(sampled),
            pass_at=pass_at(sampled),
            num_correct=[sum(score >= 1.0 for score in scores) for scores in sampled],
            num_without_verdict=sum(part.num_without_verdict for part in complete),
        )  # fmt: skip

    def _scores(self, student: Reader, teacher: Teacher, stop: Callable[[], bool]) -> _Scores | None:
        """The scores of this process's share of the problems; None if `stop` became true."""
        share = self._processes.share(self.groups())
        # Greedy and sampled answers come from one reading of the prompts. The greedy answer is the first of a problem.
        count = 1 + self._num_samples
        first_rows = range(0, count * len(share), count)
        by_student = partial(generate, student)
        size = max(1, BATCH_ROWS // self._num_samples)
        sampling = replace(self._sampling, greedy_rows=first_rows)
        if not self._collect(share, count, by_student, sampling, size, stop):
            return None
        # The teacher's prompt contains the feedback on the greedy answer (the sampled answers are its siblings).
        # Without feedback it is the student's prompt.
        self.tutor.give_feedback(student, share, 1)
        advised = [group.without_rollouts(group.rollouts[0].teacher_prompt) for group in share]
        by_teacher = self._teacher_scores(teacher, advised, stop)
        if by_teacher is None:
            return None
        scores = [[rollout.feedback.score for rollout in group.rollouts] for group in share]
        kinds = ([kind[1:] for kind in scores], [kind[:1] for kind in scores], by_teacher)
        return _Scores(
            tuple([[score for score in group if not math.isnan(score)] for group in kind] for kind in kinds),
            sum(sum(rollout.by_model) for group in share for rollout in group.rollouts[1:]),
            sum(math.isnan(score) for kind in kinds for group in kind for score in group),
        )

    def _teacher_scores(
        self, teacher: Teacher, groups: Sequence[PromptGroup], stop: Callable[[], bool]
    ) -> list[list[float]] | None:
        """The scores of the teacher's answers, which a teacher that does not move gives equal prompts once; none of one
        that cannot answer."""
        if not teacher.answers:
            return [[] for _ in groups]
        prompts = [group.prompt for group in groups]
        known_prompts, known_scores = self._teacher_answered
        if prompts == known_prompts and not teacher.moves:
            return known_scores
        # By a seed of its own: a resumed run, which knows no earlier answers, gets the same ones.
        torch.manual_seed(self._processes.seed(self._seed) + 1)
        if not self._collect(groups, 1, teacher.generate, self._teacher_sampling, BATCH_ROWS, stop):
            return None
        scores = [[rollout.feedback.score for rollout in group.rollouts] for group in groups]
        self._teacher_answered = prompts, scores
        return scores

    def _collect(
        self,
        groups: Sequence[PromptGroup],
        count: int,
        by: Generate,
        sampling: Sampling,
        size: int,
        stop: Callable[[], bool],
    ) -> bool:
        """Gives each group `count` rollouts, `size` groups at once; False if `stop` became true."""
        for begin in range(0, len(groups), size):
            if self._processes.once(stop):
                return False
            self.tutor.collect(groups[begin : begin + size], count, by, sampling)
        return not self._processes.once(stop)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error (n - 1 in the variance; nan for fewer than two values)."""
    count = len(values)
    mean = sum(values) / count if count else math.nan
    if count < 2:
        return mean, math.nan
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1) / count)


def pass_at(scores: Sequence[Sequence[float]]) -> dict[int, tuple[float, float]]:
    """Mean and standard error over problems of the unbiased pass@k, k = 1, 2, 4, ... and the number of samples.

    1 - C(n - c, k) / C(n, k) for c right ones (score 1) of n samples (Chen et al., arXiv 2107.03374, section 2.1), over
    the problems with at least k of them.
    """
    num_samples = max(1, *map(len, scores))
    rates = {}
    for k in sorted({*(2**i for i in range(num_samples.bit_length())), num_samples}):
        chances = []
        for of_problem in scores:
            num_wrong = sum(score < 1.0 for score in of_problem)
            if len(of_problem) >= k:
                chances.append(1.0 - math.comb(num_wrong, k) / math.comb(len(of_problem), k))
        rates[k] = mean_and_error(chances)
    return rates
