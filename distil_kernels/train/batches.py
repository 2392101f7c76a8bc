"""The problems of a step with all that belongs to them, and what is recorded of them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch

from distil_kernels.train.feedback.kinds import KINDS, Prompts, Verifier, verifier
from distil_kernels.train.feedback.siblings import Say
from distil_kernels.train.models.reading import Reader
from distil_kernels.train.rollouts.python_tool import Rollouts
from distil_kernels.train.run.distributed import Processes
from distil_kernels.train.tasks import Feedback, Problem, Task, problems

OWN_FEEDBACK = [verifier(kind) for kind in KINDS]


class Sample:
    """A problem of the batch with all that belongs to it."""

    def __init__(self, problem: Problem, prompt: list[int]) -> None:
        self.problem, self.prompt = problem, prompt
        self.completions: list[list[int]] = []
        self.written: list[list[bool]] = []
        """Of each token of a completion whether the model wrote it; the others a tool put in."""
        self.logprobs: list[list[float]] | None = None
        """Of each token of a completion where a rollout server sampled it, as the server says."""
        self.feedback: list[Feedback] = []
        self.teacher_prompts: list[list[int]] = []
        self.taught: list[bool] = []
        """Whether the teacher reads anything of a rollout's feedback; else its prompt is the student's, and masked."""

    @property
    def counts(self) -> list[list[bool]]:
        """Of each token of a completion whether it is learnt from the teacher."""
        return [[taught and own for own in row] for row, taught in zip(self.written, self.taught, strict=True)]

    def answered_with(self, prompts: Prompts, rollouts: Rollouts, feedback: list[Feedback]) -> None:
        """Builds what the teacher reads for each rollout."""
        (self.completions, self.written, self.logprobs), self.feedback = rollouts, feedback
        read = [prompts.teacher(self.problem, said) for said in feedback]
        self.taught = [prompt is not None for prompt in read]
        self.teacher_prompts = [prompt or self.prompt for prompt in read]


class Batches:
    """The run's problems, `count` at a call, the same in all processes.

    Left out, and counted in `skipped`, are those whose prompts do not fit, and `worked` ones (by key), whose answers
    stand in every prompt.
    """

    def __init__(
        self, task: Task, verify: Verifier, prompts: Prompts, worked: set[str], count: int, processes: Processes
    ) -> None:
        self._task, self._verify, self._prompts, self._worked = task, verify, prompts, worked
        self._count, self._processes = count, processes
        self._position = 0
        self.skipped = 0

    def __call__(self) -> list[Sample]:
        batch: list[Sample] = []
        misses = worked = 0  # in a row
        for position, problem in problems(self._task, held_out=False, start=self._position):
            self._position = position
            is_worked = problem.key in self._worked
            prompt = None if is_worked else self._prompts.student(problem)
            if prompt is None or not fits(self._task, self._verify, self._prompts, problem):
                self.skipped += 1
                misses += 1
                worked += is_worked
                if worked == 1000:
                    raise ValueError("[num_examples] a thousand problems in a row are worked examples: take fewer")
                if misses == 1000:
                    raise ValueError("[max_prompt_tokens] a thousand problems in a row did not fit: raise the limit")
                continue
            misses = worked = 0
            batch.append(Sample(problem, prompt))
            if len(batch) == self._count:
                break
        # A trace may not be the same twice.
        batch, self._position, self.skipped = self._processes.from_main((batch, self._position, self.skipped))
        return batch

    def state_dict(self) -> dict[str, int]:
        return {"position": self._position, "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._position, self.skipped = state["position"], state["skipped"]


def fits(task: Task, verify: Verifier, prompts: Prompts, problem: Problem) -> bool:
    """Whether the teacher can read some of what is known before any answer: of the feedback to come, the correction is
    all that can be too long. A user's function is asked of answers only."""
    return verify not in OWN_FEEDBACK or prompts.fits(problem, verify(task, problem, ""))


def answered(
    student: Reader,
    task: Task,
    verify: Verifier,
    say: Say,
    prompts: Prompts,
    batch: Sequence[Sample],
    rollouts: Sequence[Rollouts],
) -> None:
    """Takes the rollouts of each problem, with what is said of them and what the teacher reads of that."""
    problems = [entry.problem for entry in batch]
    texts = [[prompts.answer(done) for done in own.completions] for own in rollouts]
    answers = [
        [(text, verify(task, problem, text)) for text in own] for problem, own in zip(problems, texts, strict=True)
    ]
    feedback = say(student, problems, answers, max(map(len, texts)))
    for entry, own, said in zip(batch, rollouts, feedback, strict=True):
        entry.answered_with(prompts, own, said)


def rollout_records(
    kind: str, step: int, batch: Sequence[Sample], prompts: Prompts, columns: list[dict[str, Any]] | None = None
) -> list[dict[str, Any]]:
    """A line of rollouts.jsonl for each rollout; `columns` are what `samples` knows of each."""
    records = [
        {
            "kind": kind,
            "step": step,
            "question": entry.problem.question,
            "answer": prompts.answer(completion),
            "expected": entry.problem.answer,
            "score": feedback.score,
            "feedback": feedback.text,
            "taught": taught,
            "tokens": completion,
            "put_in": [index for index, own in enumerate(written) if not own],
        }
        for entry in batch
        for completion, written, feedback, taught in zip(
            entry.completions, entry.written, entry.feedback, entry.taught, strict=True
        )
    ]
    for record, column in zip(records, columns or [], strict=columns is not None):
        record.update(column)
    return records


def unique(lists: list[list[int]]) -> tuple[list[list[int]], list[int]]:
    """Different lists in order of appearance, and the index of each."""
    index: dict[tuple[int, ...], int] = {}
    rows = [index.setdefault(tuple(tokens), len(index)) for tokens in lists]
    return [list(tokens) for tokens in index], rows


def sampled_logprobs(batch: Sequence[Sample], device: torch.device) -> torch.Tensor | None:
    """[N] of the completions' tokens, packed, as the rollout server says; None where the student sampled them."""
    known = [value for entry in batch for row in entry.logprobs or [] for value in row]
    return torch.tensor(known, device=device) if known else None


def figures(
    batch: Sequence[Sample],
    prompts: Prompts,
    stop_ids: Sequence[int],
    teacher_logprobs: Sequence[torch.Tensor | None],
) -> dict[str, float | None]:
    """What a step's record says of its rollouts; arguments of `prefers_right` and of `rollout.Sampling`."""
    return {
        "accuracy": statistics.fmean(feedback.score for entry in batch for feedback in entry.feedback),
        "truncated": statistics.fmean(done[-1] not in stop_ids for entry in batch for done in entry.completions),
        "equal_groups": statistics.fmean(len({f.score for f in entry.feedback}) == 1 for entry in batch),
        "teacher_prefers_right": prefers_right(batch, teacher_logprobs),
        "left_out": sum(not taught for entry in batch for taught in entry.taught),
        "cut": sum(prompts.cuts(entry.problem, feedback) for entry in batch for feedback in entry.feedback),
    }


def prefers_right(batch: Sequence[Sample], teacher_logprobs: Sequence[torch.Tensor | None]) -> float | None:
    """Share of (right, wrong) pairs of a problem's taught rollouts where the teacher finds the right one likelier."""
    known = [part for part in teacher_logprobs if part is not None]
    if not known:
        return None
    wins = pairs = 0
    values = iter(torch.cat(known).tolist())
    for entry in batch:
        scored = [(feedback.score, next(values)) for feedback in entry.feedback]
        scored = [pair for pair, taught in zip(scored, entry.taught, strict=True) if taught]
        for score, value in scored:
            for other_score, other in scored:
                if score > other_score:
                    pairs += 1
                    wins += value > other
    return wins / pairs if pairs else None
