"""What answers the turns of a rollout.

    reset(record)   the record's first observation, which is the question of the prompt
    step(text)      after each turn of the model: observation, reward, whether the episode is over

One object answers one rollout. What it observes is read by student and teacher and learnt by neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from distil_kernels.train.tasks import Problem


class Turn(NamedTuple):
    """What the model wrote, and what the environment said to it."""

    text: str
    observation: str


class Environment:
    """A world of text. A subclass has `reset` and `step`, is made without arguments, and may change the others.

    The rewards of an episode add up to its score, from 0 to 1; where all are None the task's verifier gives the score.
    """

    stop: str = ""
    """The text that ends a turn in the middle of an answer, which then goes on behind the observation. Empty: a turn is
    a whole answer, as a chat's, and an observation the next question."""
    frame: tuple[str, str] = ("", "")
    """With `stop`: what stands before and after an observation."""
    example: tuple[str, str] | None = None
    """A question and its answer that every prompt begins with."""

    def reset(self, record: Problem) -> str:
        """Begins the episode of a problem, and returns its first observation: the same for the same record."""
        return record.question

    def step(self, text: str) -> tuple[str, float | None, bool]:
        """Returns observation, reward (None for no word on it) and whether the episode is over, after a turn."""
        raise NotImplementedError

    def solution(self, record: Problem) -> list[str]:
        """Returns the turns of a right episode, which worked examples show."""
        return [record.answer]

    def answer(self, turns: Sequence[str]) -> str:
        """Returns the text that a verifier reads, of the model's turns."""
        return turns[-1]

    def feedback(self, turns: Sequence[Turn], reward: float | None) -> str:
        """Returns what the teacher reads of an episode under feedback trace and both."""
        said = [f"turn {number}: {turn.observation}" for number, turn in enumerate(turns, 1) if turn.observation]
        return "; ".join([*said, *([] if reward is None else [f"score {reward:g}"])])


def with_defaults(factory: type[Any]) -> type[Environment]:
    """Returns the class, with what an Environment has where it is none."""
    return factory if issubclass(factory, Environment) else type(factory.__name__, (factory, Environment), {})
