"""Rollouts of several turns: the model writes, an environment answers, and the model goes on.

    A: price pear     Q: 17 / A:     calculate 3 * 17     Q: 51 / A:     51
       by the model   observed       by the model         observed       by the model

What is observed is context, for the student and its teacher alike, and no action: no cost, no score term, part of no
count or mean. Costs of later turns reach the earlier ones across an observation; it keeps its positions, as masked rows
of the loss do, and so a discount below 1 counts them. Credit over turns is exact as far as it is over tokens: what an
environment says depends on what the model wrote, and not on its weights.

A turn ends with a token that ends an answer, or, of an environment with a `stop`, with that text. Each round samples
the rollouts whose turn has ended and whose episode goes on, until none does or the limit on observations is met. The
length limit is on what the model writes in all turns. A turn that it cuts is the last one, and an observation with no
token left after it is not put in.

An environment that raises, or returns something else than its interface says, ends the run in one line. An episode that
is not over at a limit has what it has earned so far, and is counted (`num_unfinished`). A step that takes longer than
its limit, or a sandbox that died, leaves the rollout without a verdict, as a judge's would.

Environments run one after the other, in the order of the rollouts.
"""

from __future__ import annotations

import math
import numbers
import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from distil_kernels.train.environments import Environment, Turn
from distil_kernels.train.feedback.time_limit import TookTooLong, time_limit
from distil_kernels.train.imported import raised
from distil_kernels.train.rollouts.prompt_group import Outcome, Rollout
from distil_kernels.train.rollouts.sampling import Generate, Sampling
from distil_kernels.train.tasks import Problem
from distil_kernels.train.tasks.sandbox import JudgeFailed

ROUNDING = 1e-6
"""By which rewards that add up to 1 may miss it."""


class Texts(NamedTuple):
    """How the texts of an environment and the tokens of a model are made of each other."""

    read: Callable[[Sequence[int]], str]
    """The text of a turn's tokens."""
    ids: Callable[[str], list[int]]
    """The tokens of a text."""
    frame: tuple[str, str]
    """What stands before and after an observation."""


@dataclass(frozen=True)
class Episodes:
    """Makes the episodes of an environment.

    Args:
        name: of the environment, for messages.
        max_observations: in a rollout; what comes after them is its last turn.
        max_tokens: of an observation; the remainder is cut off.
        seconds: time limit of a step.
    """

    environment: type[Environment]
    name: str
    texts: Texts
    max_observations: int
    max_tokens: int
    seconds: float = math.inf

    @property
    def stop(self) -> str:
        return self.environment.stop

    @property
    def longest(self) -> int:
        """The largest number of tokens that observations add to a completion."""
        before, after = map(self.texts.ids, self.texts.frame)
        return self.max_observations * (len(before) + self.max_tokens + len(after))

    def made(self) -> Environment:
        """Returns a new environment.

        Raises:
            ValueError: it says that it cannot work here.
            RuntimeError: it raised anything else.
        """
        try:
            return self.environment()
        except Exception as error:
            if str(error).startswith("["):
                raise
            raise raised("environment", self.name, error) from error

    def posed(self, record: Problem) -> Problem:
        """Returns the problem with its first observation as the question.

        Raises:
            ValueError: the environment took longer than its limit.
        """
        try:
            return record._replace(question=self._begun(record)[1])
        except JudgeFailed as error:
            raise ValueError(str(error)) from None

    def start(self, record: Problem, question: str) -> Episode:
        """Returns the episode of a rollout that begins with this question."""
        try:
            environment, observed = self._begun(record)
        except JudgeFailed:
            return Episode(self, None)
        if observed != question:
            raise RuntimeError(
                f"[environment] {self.name} reset to {reprlib.repr(observed)}, expected what it said of the same "
                f"record before, {reprlib.repr(question)}"
            )
        return Episode(self, environment)

    def worked(self, record: Problem) -> Outcome:
        """Returns the outcome of the environment's own solution of a problem."""
        episode = self.start(record, self.posed(record).question)
        solution = self.call(episode.environment, "solution", record)
        if not isinstance(solution, (list, tuple)) or not solution:
            raise RuntimeError(
                f"[environment] {self.name}.solution gave {reprlib.repr(solution)}, expected a list of turns"
            )
        for text in solution:
            if not episode.is_over:
                episode.step(self.text(text, "solution"))
        outcome, (before, after) = episode.outcome(), self.texts.frame
        if not self.stop:
            return outcome
        *earlier, last = outcome.turns
        whole = "".join(turn.text + before + turn.observation + after for turn in earlier) + last.text
        return outcome._replace(turns=(Turn(whole, ""),))

    def ends_turn(self, tokens: Sequence[int]) -> bool:
        """True if the last of these tokens ends a turn by the text `stop`."""
        return self.stop in self.texts.read(tokens[-len(self.stop) :])  # a token has at least one character

    def observation(self, text: str) -> list[int]:
        """Returns the tokens of an observation as they stand in a rollout."""
        ids, (before, after) = self.texts.ids, self.texts.frame
        # A blank belongs to the word behind it.
        lead = " " * (len(before) - len(before.rstrip(" ")))
        return ids(before.rstrip(" ")) + ids(lead + text)[: self.max_tokens] + ids(after)

    def call(self, environment: Any, method: str, *arguments: Any) -> Any:
        """Returns what a method of the environment returns.

        Raises:
            JudgeFailed: it took longer than its limit, or the sandbox died.
            RuntimeError: it raised.
        """
        try:
            with time_limit(self.seconds):
                return getattr(type(environment), method)(environment, *arguments)  # an attribute may have its name
        except TookTooLong:
            raise JudgeFailed(f"[environment] {self.name} took longer than {self.seconds:g} s in {method}") from None
        except JudgeFailed:
            raise
        except Exception as error:
            raise raised("environment", self.name, error) from error

    def text(self, value: Any, method: str) -> str:
        """Returns the text that a method returned.

        Raises:
            RuntimeError: it is none.
        """
        if not isinstance(value, str):
            raise RuntimeError(f"[environment] {self.name}.{method} gave {reprlib.repr(value)}, expected a text")
        return value.encode(errors="replace").decode()  # a tokenizer takes no half of a surrogate pair

    def _begun(self, record: Problem) -> tuple[Environment, str]:
        """Returns an environment and its first observation."""
        environment = self.made()
        return environment, self.text(self.call(environment, "reset", record), "reset")


class Episode:
    """An environment with one rollout under way.

    Args:
        environment: which has begun; None for one that did not in time.
    """

    def __init__(self, episodes: Episodes, environment: Environment | None) -> None:
        self.episodes, self.environment = episodes, environment
        self._turns: list[Turn] = []
        self._rewards: list[float] = []
        self._has_verdict = environment is not None
        self._is_cut = False
        """The length limit has cut the last turn off."""
        self.is_over = environment is None
        """The environment has nothing more to say."""

    def answer(self, tokens: Sequence[int], at_stop_token: bool, has_room: bool) -> list[int] | None:
        """Takes a turn of the model, and returns what it observes; None if the rollout ends here.

        Args:
            tokens: of the turn.
            at_stop_token: the last one ends an answer.
            has_room: the length limit leaves tokens for another turn.
        """
        if self.is_over:
            return None
        episodes, text = self.episodes, self.episodes.texts.read(tokens)
        may_observe = len(self._turns) < episodes.max_observations
        is_inside = bool(episodes.stop) and not at_stop_token and may_observe and episodes.ends_turn(tokens)
        if is_inside:
            text = text[: text.rindex(episodes.stop) + len(episodes.stop)]
        self._is_cut = not (at_stop_token or is_inside)
        self.step(text)
        # Of a turn inside an answer the answer's end is the end.
        self.is_over |= bool(episodes.stop) and at_stop_token
        goes_on = may_observe and has_room and (is_inside if episodes.stop else at_stop_token)
        return episodes.observation(self._turns[-1].observation) if goes_on and not self.is_over else None

    def step(self, text: str) -> None:
        """Hands a turn to the environment.

        Raises:
            RuntimeError: it raised, or returned something else than observation, reward and whether it is over.
        """
        episodes = self.episodes
        try:
            result = episodes.call(self.environment, "step", text)
        except JudgeFailed:
            self._turns.append(Turn(text, ""))
            self._has_verdict, self.is_over = False, True
            return
        if not isinstance(result, tuple) or len(result) != 3 or not _is_reward(result[1]):
            raise RuntimeError(
                f"[environment] {episodes.name}.step gave {reprlib.repr(result)}, expected (observation, reward or "
                "None, whether it is over)"
            )
        observation, reward, is_over = result
        self._turns.append(Turn(text, episodes.text(observation, "step")))
        self._rewards += [] if reward is None else [float(reward)]
        self.is_over = bool(is_over)

    def outcome(self) -> Outcome:
        """Returns what became of the episode.

        Raises:
            RuntimeError: its rewards do not add up to a score.
        """
        is_finished = self.is_over and not self._is_cut
        reward = sum(self._rewards) if self._rewards else None
        if reward is not None and not -ROUNDING <= reward <= 1.0 + ROUNDING:
            raise RuntimeError(
                f"[environment] the rewards of {self.episodes.name} add up to {reward:g}, expected 0 to 1"
            )
        reward = None if reward is None else min(1.0, max(0.0, reward))
        if not self._has_verdict:
            return Outcome(tuple(self._turns), math.nan, is_finished, "", "")
        episodes, environment = self.episodes, self.environment
        answer = episodes.call(environment, "answer", [turn.text for turn in self._turns])
        feedback = episodes.call(environment, "feedback", list(self._turns), reward)
        texts = episodes.text(answer, "answer"), episodes.text(feedback, "feedback")
        return Outcome(tuple(self._turns), reward, is_finished, *texts)


def _is_reward(value: Any) -> bool:
    return value is None or (isinstance(value, numbers.Real) and math.isfinite(value))


def roll_out(
    generate: Generate,
    prompts: Sequence[list[int]],
    prompt_index: Sequence[int],
    sampling: Sampling,
    episodes: Sequence[Episode] = (),
) -> list[Rollout]:
    """Returns the rollouts of `generate`, with what their episodes answered put in.

    Args:
        episodes: one for each rollout; empty for answers of one turn.
    """
    if not episodes:
        return generate(prompts, prompt_index, sampling, None)
    of_all = episodes[0].episodes
    ends = of_all.ends_turn if of_all.stop else None
    rollouts = generate(prompts, prompt_index, sampling, ends)
    # The tokens of each rollout's latest turn.
    latest = {index: rollout.tokens for index, rollout in enumerate(rollouts)}
    for num_observations in range(1, of_all.max_observations + 2):
        remaining = {index: sampling.max_new_tokens - sum(rollouts[index].by_model) for index in latest}
        going_on = []
        for index, tokens in latest.items():
            inserted = episodes[index].answer(tokens, tokens[-1] in sampling.stop_ids, remaining[index] > 0)
            if inserted is not None:
                rollouts[index].append(Rollout(inserted, [False] * len(inserted)))
                going_on.append(index)
        if not going_on:
            break
        continued = [prompts[prompt_index[index]] + rollouts[index].tokens for index in going_on]
        # One limit for all of them, the longest; what is over a rollout's own limit is cut off.
        limits = replace(
            sampling,
            max_new_tokens=max(remaining[index] for index in going_on),
            greedy_rows=[place for place, index in enumerate(going_on) if index in sampling.greedy_rows],
        )
        is_last = num_observations == of_all.max_observations
        more = generate(continued, range(len(continued)), limits, None if is_last else ends)
        latest = {}
        for index, rollout in zip(going_on, more, strict=True):
            length = remaining[index]
            part = Rollout.sampled(rollout.tokens[:length], rollout.logprobs and rollout.logprobs[:length])
            rollouts[index].append(part)
            latest[index] = part.tokens
    for rollout, episode in zip(rollouts, episodes, strict=True):
        rollout.outcome = episode.outcome()
    return rollouts
