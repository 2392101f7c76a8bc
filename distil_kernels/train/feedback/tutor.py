"""From a problem to rollouts and what a teacher reads of them; training and evaluations collect rollouts here.

prompt -> completion -> answer -> score                             `collect`
scores of a problem's rollouts -> feedback -> teacher prompt        `give_feedback`
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from distil_kernels.train.feedback.kinds import FeedbackFn, FeedbackKind, Verifier
from distil_kernels.train.feedback.prompts import Prompts
from distil_kernels.train.models.reading import Reader
from distil_kernels.train.rollouts.prompt_group import PromptGroup, Rollout
from distil_kernels.train.rollouts.python_tool import Python, RollOut
from distil_kernels.train.rollouts.sampling import Sampling
from distil_kernels.train.tasks import Problem, Task
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

    @staticmethod
    def of(kind: FeedbackKind, task: Task, prompts: Prompts, max_critique_tokens: int) -> Tutor:
        respond = kind.respond(prompts, max_critique_tokens)
        return Tutor(task, prompts, kind.verifier, respond, kind.verifies_any_text, kind.is_read)

    def spent(self) -> dict[str, float]:
        """What the feedback has cost since the last call, by the names of metrics.jsonl; empty if it costs nothing."""
        found: Callable[[], dict[str, float]] = getattr(self.respond, "spent", dict)
        return found()

    def for_task(self, task: Task) -> Tutor:
        """The same tutor for another task."""
        return replace(self, task=task)

    def group(self, problem: Problem) -> PromptGroup | None:
        """The problem with the student's prompt; None if that does not fit, or if no part of the feedback would.

        Only feedback that is known before any answer can be found too long: that to an empty text.
        """
        prompt = self.prompts.student(problem)
        if prompt is None:
            return None
        if self.verifies_any_text and not self.prompts.fits(problem, self.verifier(self.task, problem, "")):
            return None
        return PromptGroup(problem, prompt)

    def collect(
        self,
        groups: Sequence[PromptGroup],
        num_rollouts: int,
        roll_out: RollOut,
        sampling: Sampling,
        tool: Python | None,
    ) -> None:
        """Samples `num_rollouts` rollouts for each group, verifies them, and adds them to it."""
        prompt_index = [index for index in range(len(groups)) for _ in range(num_rollouts)]
        rollouts = roll_out([group.prompt for group in groups], prompt_index, sampling, tool)
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
        for _, rollouts in groups:
            for rollout in rollouts:
                rollout.answer = self.prompts.answer(rollout.tokens)
        answers = [(problem, [rollout.answer for rollout in rollouts]) for problem, rollouts in groups]
        feedback = verified(self.verifier, self.task, answers, may_thread=self.verifies_any_text)
        for (_, rollouts), responses in zip(groups, feedback, strict=True):
            for rollout, response in zip(rollouts, responses, strict=True):
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
