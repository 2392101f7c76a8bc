"""Kinds of feedback, one row each in `FEEDBACK`; a user's function is a kind too.

A new kind is a function below and its row. The row says what the configuration checks:

    corrections, siblings     the teacher reads nothing of the rollout: credit_span="future" is the exact credit
    traces, self-evaluation   the feedback is computed from the rollout: credit_span="sequence" is
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from distil_kernels.train.feedback.siblings import right_sibling
from distil_kernels.train.feedback.time_limit import TookTooLong, time_limit
from distil_kernels.train.imported import imported, raised, source_file
from distil_kernels.train.tasks import Feedback, Problem, Task
from distil_kernels.train.tasks.sandbox import JudgeFailed

if TYPE_CHECKING:
    from distil_kernels.train.feedback.prompts import Prompts
    from distil_kernels.train.models.reading import Reader
    from distil_kernels.train.rollouts.prompt_group import PromptGroup

Verifier = Callable[[Task, Problem, str], Feedback]
"""(task, problem, answer) -> score and feedback that need no other answer and no model."""
FeedbackFn = Callable[["Reader", "Sequence[PromptGroup]", int], list[list[Feedback]]]
"""(student, groups of verified rollouts, count) -> the feedback to the first `count` rollouts of each group."""


class FeedbackKind(NamedTuple):
    """How answers are scored, what the teacher reads of that, and what the configuration must know of it."""

    verifier: Verifier
    respond: Callable[[Prompts, int], FeedbackFn]
    """(prompts, max_critique_tokens) -> the function that turns verified rollouts into feedback."""
    depends_on_rollout: bool
    """True if the feedback is computed from the rollout that it is given to."""
    compares_rollouts: bool = False
    """True if the feedback to a rollout shows another one of its problem."""
    has_demonstration: bool = True
    """False if the feedback is words only."""
    is_read: bool = True
    """False if the teacher reads what the student reads, and no feedback."""
    verifies_any_text: bool = True
    """False if the verifier must be given answers only, and no empty text to learn what is known before any answer."""


def correction_feedback(task: Task, problem: Problem, answer: str) -> Feedback:
    """Scores an answer and corrects it by the expert's."""
    if not problem.answer:
        raise ValueError("[feedback] a record has no expert's answer to correct with: expected --feedback trace")
    return _correction(task.score(answer.strip(), problem.entry), problem.answer)


def no_feedback(task: Task, problem: Problem, answer: str) -> Feedback:
    """Scores an answer and says nothing."""
    return Feedback(task.score(answer.strip(), problem.entry), "", "")


def sibling_feedback(task: Task, problem: Problem, answer: str) -> Feedback:
    """Scores an answer; a right one becomes the correction of its siblings (`right_sibling`)."""
    score = task.score(answer.strip(), problem.entry)
    return _correction(score, answer.strip()) if score >= 1.0 else Feedback(score, "", "")


def self_evaluation_feedback(task: Task, problem: Problem, answer: str) -> Feedback:
    """Scores an answer; the text is that of a right critique of a right answer, which worked examples need."""
    score = task.score(answer.strip(), problem.entry)
    return Feedback(score, verdict(answer.strip(), answer.strip()) if score >= 1.0 else "", "")


def trace_feedback(task: Task, problem: Problem, answer: str) -> Feedback:
    """Runs an answer and reports what happened."""
    run = getattr(task, "trace", None)
    if run is None:
        raise ValueError("[feedback] answers of this task are not run: expected correction, got trace")
    score, text = run(answer.strip(), problem.entry)
    return Feedback(score, text, "")


def trace_and_correction_feedback(task: Task, problem: Problem, answer: str) -> Feedback:
    """Reports what happened, then the expert's answer if there is one."""
    score, text, _ = trace_feedback(task, problem, answer)
    correction = f"\nThe correct answer is {problem.answer}." if problem.answer else ""
    return Feedback(score, text + correction, problem.answer)


def verdict(answer: str, right_answer: str) -> str:
    """The judgement of an answer, in the words that worked examples of a critique have."""
    return f"{'Yes' if answer == right_answer else 'No'}, the correct answer is {right_answer}."


def _correction(score: float, right_answer: str) -> Feedback:
    return Feedback(score, f"The correct answer is {right_answer}.", right_answer)


def _as_verified(prompts: Prompts, max_critique_tokens: int) -> FeedbackFn:
    """The verifier's feedback as it is."""
    return lambda student, groups, count: [[r.feedback for r in group.rollouts[:count]] for group in groups]


def _from_siblings(prompts: Prompts, max_critique_tokens: int) -> FeedbackFn:
    return right_sibling


def _from_self_evaluation(prompts: Prompts, max_critique_tokens: int) -> FeedbackFn:
    # Imported late: the configuration reads this table before seconds of imports.
    from distil_kernels.train.feedback.self_evaluation import SelfEvaluation

    return SelfEvaluation(prompts, max_critique_tokens)


FEEDBACK = {
    "correction": FeedbackKind(correction_feedback, _as_verified, depends_on_rollout=False),
    "trace": FeedbackKind(trace_feedback, _as_verified, depends_on_rollout=True, has_demonstration=False),
    "both": FeedbackKind(trace_and_correction_feedback, _as_verified, depends_on_rollout=True),
    "siblings": FeedbackKind(sibling_feedback, _from_siblings, depends_on_rollout=False, compares_rollouts=True),
    "self_evaluation": FeedbackKind(
        self_evaluation_feedback, _from_self_evaluation, depends_on_rollout=True, has_demonstration=False
    ),
    # `expert.expert_kind` gives the row its endpoint.
    "expert": FeedbackKind(self_evaluation_feedback, _as_verified, depends_on_rollout=True, has_demonstration=False),
    "none": FeedbackKind(no_feedback, _as_verified, depends_on_rollout=False, has_demonstration=False, is_read=False),
}


def feedback_kind(name: str, seconds: float = math.inf, num_characters: int | None = None) -> FeedbackKind:
    """A kind of feedback by name: one of FEEDBACK, or a user's function as `module:function`.

    The function is called with (problem, answer), and returns a Feedback, or a score and a text.

    Args:
        seconds: time limit of a user's function; an answer that it takes longer for has no verdict.
        num_characters: what is read of each of its texts; None for all.

    Raises:
        ValueError: `name` is neither. The verifier of a user's function raises ValueError if the function returns
            something else, and RuntimeError if the function itself raises.
    """
    if name in FEEDBACK:
        return FEEDBACK[name]
    return users_kind(_users_verifier(name, _imported(name), seconds, num_characters))


def judge_source(name: str) -> Path | None:
    """The file that a user's function stands in; None for the kinds of FEEDBACK, and where there is no file."""
    if name in FEEDBACK:
        return None
    return source_file(_imported(name))


def _imported(name: str) -> Callable[..., Any]:
    """The function that `module:function` names."""
    return imported("feedback", name, f"one of {', '.join(FEEDBACK)}, or module:function")


def users_kind(verifier: Verifier) -> FeedbackKind:
    """The kind of a user's verifier, of which nothing is known."""
    return FeedbackKind(verifier, _as_verified, depends_on_rollout=True, verifies_any_text=False)


def _users_verifier(name: str, function: Callable[..., Any], seconds: float, num_characters: int | None) -> Verifier:
    def verify(task: Task, problem: Problem, answer: str) -> Feedback:
        try:
            with time_limit(seconds):
                result = function(problem, answer)
        except TookTooLong:
            raise JudgeFailed(f"[feedback] {name} took longer than {seconds:g} s") from None
        except Exception as error:
            raise raised("feedback", name, error) from error
        feedback = _as_feedback(result, problem)
        if feedback is None:
            raise ValueError(
                f"[feedback] {name} gave {reprlib.repr(result)}, expected (score from 0 to 1, text) or "
                "distil_kernels.train.tasks.Feedback(score from 0 to 1, text, demonstration)"
            )
        score, text, demonstration = feedback
        return Feedback(score, text[:num_characters], demonstration[:num_characters])

    return verify


def _as_feedback(result: Any, problem: Problem) -> Feedback | None:
    """What a user's function returned, or None if it is no score with its text."""
    if not isinstance(result, tuple) or len(result) not in (2, 3):
        return None
    score, *texts = result if len(result) == 3 else (*result, problem.answer)
    if isinstance(score, str) or not all(isinstance(text, str) for text in texts):
        return None
    try:
        score = float(score)
    except (TypeError, ValueError):
        return None
    # A tokenizer takes no half of a surrogate pair, which texts of programs and files may hold.
    texts = [text.encode(errors="replace").decode() for text in texts]
    return Feedback(score, *texts) if 0.0 <= score <= 1.0 else None
