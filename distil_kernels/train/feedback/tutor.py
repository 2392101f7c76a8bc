"""From a problem to rollouts and what a teacher reads of them; training and evaluations collect rollouts here.

prompt -> completion -> answer -> score                             `collect`
scores of a problem's rollouts -> feedback -> teacher prompt        `give_feedback`
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from distil_kernels.train.feedback.kinds import FeedbackFn, FeedbackKind, Verifier
from distil_kernels.train.feedback.prompts import Prompts
from distil_kernels.train.models.reading import Reader
from distil_kernels.train.rollouts.episodes import Episodes, roll_out
from distil_kernels.train.rollouts.prompt_group import Outcome, PromptGroup, Rollout
from distil_kernels.train.rollouts.sampling import Generate, Sampling
from distil_kernels.train.run.distributed import ALONE, Processes
from distil_kernels.train.tasks import Problem, Task
from distil_kernels.train.tasks.sandbox import JudgeFailed
from distil_kernels.train.tasks.verdicts import verified


@dataclass
class Tutor:
    """Verifies answers to a task, and gives the feedback that the teacher reads."""

    task: Task
    prompts: Prompts
    verifier: Verifier
    respond: FeedbackFn
    verifies_any_text: bool = True
    """As of `FeedbackKind`."""
    is_read: bool = True
    """As of `FeedbackKind`."""
    episodes: Episodes | None = None
    """Of the environment that rollouts are made in."""
    processes: Processes = ALONE
    """Of which the members that hold a model together hear one verdict."""

    @staticmethod
    def of(
        kind: FeedbackKind,
        task: Task,
        prompts: Prompts,
        max_critique_tokens: int,
        episodes: Episodes | None = None,
        processes: Processes = ALONE,
    ) -> Tutor:
        respond = kind.respond(prompts, max_critique_tokens)
        return Tutor(task, prompts, kind.verifier, respond, kind.verifies_any_text, kind.is_read, episodes, processes)

    def spent(self) -> dict[str, float]:
        """What the feedback has cost since the last call, by the names of metrics.jsonl; empty if it costs nothing."""
        found: Callable[[], dict[str, float]] = getattr(self.respond, "spent", dict)
        return found()

    def for_task(self, task: Task) -> Tutor:
        """The same tutor for another task."""
        return replace(self, task=task)

    def group(self, record: Problem) -> PromptGroup | None:
        """The problem with the student's prompt; None if that does not fit, or if no part of the feedback would.

        Only feedback that is known before any answer can be found too long: that to an empty text.
        """
        problem = self.episodes.posed(record) if self.episodes else record
        prompt = self.prompts.student(problem)
        if prompt is None:
            return None
        nothing = None if self.episodes is None else Outcome((), None, False, "", "")
        if self.verifies_any_text:
            known = self.verifier(judged(self.task, nothing), problem, "")
            if not self.prompts.fits(problem, known):
                return None
        return PromptGroup(problem, prompt, record=record)

    def collect(
        self,
        groups: Sequence[PromptGroup],
        num_rollouts: int,
        generate: Generate,
        sampling: Sampling,
    ) -> None:
        """Samples `num_rollouts` rollouts for each group, verifies them, and adds them to it."""
        prompt_index = [index for index in range(len(groups)) for _ in range(num_rollouts)]
        episodes = []
        if self.episodes is not None:
            started = [groups[index] for index in prompt_index]
            episodes = [self.episodes.start(group.record or group.problem, group.problem.question) for group in started]
        rollouts = roll_out(generate, [group.prompt for group in groups], prompt_index, sampling, episodes)
        sampled = [rollouts[index * num_rollouts : (index + 1) * num_rollouts] for index in range(len(groups))]
        self.verify([(group.problem, added) for group, added in zip(groups, sampled, strict=True)])
        for group, added in zip(groups, sampled, strict=True):
            group.rollouts += added

    def take_answers(self, groups: Sequence[PromptGroup], sampling: Sampling) -> None:
        """Adds to each group the expert's own answer as its rollout, cut where a sampled one would be."""
        answered = []
        for group in groups:
            tokens = self.prompts.completion(group.problem.answer, sampling.stop_ids)
            answered.append((group.problem, [Rollout.sampled(tokens[: sampling.max_new_tokens])]))
        self.verify(answered)
        for group, (_, rollouts) in zip(groups, answered, strict=True):
            group.rollouts += rollouts

    def verify(self, groups: Sequence[tuple[Problem, Sequence[Rollout]]]) -> None:
        """Fills in answer and score of some rollouts of problems, and the feedback that needs no other rollout."""
        answered = [(problem, rollout) for problem, rollouts in groups for rollout in rollouts]
        for _, rollout in answered:
            outcome = rollout.outcome
            rollout.answer = self.prompts.answer(rollout.tokens) if outcome is None else outcome.answer
        answers = [(judged(self.task, rollout.outcome), problem, rollout.answer) for problem, rollout in answered]
        # Programs are waited for; other judges may use signals, which are the main thread's.
        may_thread = self.verifies_any_text and hasattr(self.task, "trace")
        feedback = self.processes.once(lambda: verified(self.verifier, answers, may_thread))
        for (_, rollout), response in zip(answered, feedback, strict=True):
            rollout.feedback = response

    def give_feedback(self, student: Reader, groups: Sequence[PromptGroup], count: int) -> None:
        """Fills in feedback and teacher prompt of the first `count` rollouts of each group, if they have a verdict."""
        for group, responses in zip(groups, self.respond(student, groups, count), strict=True):
            for rollout, feedback in zip(group.rollouts[:count], responses, strict=True):
                if not rollout.feedback.has_verdict:
                    continue
                rollout.feedback = feedback
                prompt = self.prompts.teacher(group.problem, feedback) if self.is_read else group.prompt
                rollout.teacher_prompt = prompt


class _OfEpisode:
    """A task's verifier where an environment has the first word on score and trace."""

    def __init__(self, task: Task, outcome: Outcome) -> None:
        self._task, self._outcome = task, outcome

    def score(self, answer: str, entry: Any) -> float:
        reward = self._outcome.reward
        if reward is None:
            return self._task.score(answer, entry)
        if math.isnan(reward):
            raise JudgeFailed("[environment] an episode has no verdict")
        return reward

    def trace(self, answer: str, entry: Any) -> tuple[float, str]:
        """Returns what happened to a program of the answer, or in the episode."""
        if self._outcome.reward is None and hasattr(self._task, "trace"):
            return self._task.trace(answer, entry)  # type: ignore[no-any-return]
        return self.score(answer, entry), self._outcome.feedback

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)


def judged(task: Task, outcome: Outcome | None) -> Task:
    """Returns the task as verifiers see it for an answer with this outcome, None for one without an environment."""
    return task if outcome is None else cast(Task, _OfEpisode(task, outcome))
