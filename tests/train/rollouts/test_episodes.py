"""Rollouts of several turns: credit and masks by enumeration of every rollout of a tiny policy, limits and errors."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from itertools import combinations_with_replacement

import pytest
import torch
from runs import FULL_CREDIT
from tiny import byte_tokenizer, llama_config
from transformers import AutoModelForCausalLM

from distil_kernels.hf import split
from distil_kernels.train.baseline import PositionAverage
from distil_kernels.train.config import Config
from distil_kernels.train.environments import Environment, Turn, environment_class
from distil_kernels.train.feedback.prompts import Example, Prompts
from distil_kernels.train.models.reading import Reader, reader
from distil_kernels.train.objective import distil_loss, policy_loss
from distil_kernels.train.rollouts.episodes import Episodes, Texts, roll_out
from distil_kernels.train.rollouts.packed_batch import PackedBatch
from distil_kernels.train.rollouts.prompt_group import PromptGroup, Rollout
from distil_kernels.train.rollouts.sampling import Ends, Sampling
from distil_kernels.train.tasks import Feedback, Problem
from distil_kernels.train.teachers.base import HiddenTarget

VOCABULARY, STOP, LIMIT = 4, 0, 3
LETTERS = {1: "a", 2: "b", 3: "c"}
RECORD, PROMPT = Problem("a", "", None, ""), [2, 1, 1]


class Says(Environment):
    """Says another thing to a turn with an a, and ends with the second turn."""

    def reset(self, record: Problem) -> str:
        self.said = 0
        return record.question

    def step(self, text: str) -> tuple[str, float | None, bool]:
        self.said += 1
        is_over = self.said == 2
        return "ab" if "a" in text else "b", (1.0 if text == "a" else 0.25) if is_over else None, is_over

    def feedback(self, turns: list[Turn], reward: float | None) -> str:
        return "".join(turn.observation for turn in turns) + ("a" if (reward or 0.0) > 0.5 else "")


class SaysInside(Says):
    """The same, of turns that end with a b."""

    stop, frame = "b", ("a", "")


def letters(environment: type[Environment], limit: int = 1) -> Episodes:
    """Episodes of a vocabulary of four tokens: a stop token and three letters."""
    texts = Texts(
        lambda tokens: "".join(LETTERS.get(token, "") for token in tokens),
        lambda text: [1 if letter == "a" else 2 for letter in text],
        environment.frame,
    )
    return Episodes(environment, "letters", texts, limit, 9)


def every_rollout(episodes: Episodes, limit: int = LIMIT) -> list[Rollout]:
    """All rollouts that a policy can sample, by going through all choices of tokens."""
    found, script = [], []
    while True:
        place = 0

        def generate(prompts: object, index: object, sampling: Sampling, ends: Ends | None) -> list[Rollout]:
            nonlocal place
            tokens: list[int] = []
            while len(tokens) < sampling.max_new_tokens and (
                not tokens or not (tokens[-1] == STOP or (ends is not None and ends(tokens)))
            ):
                script.extend([0] * (place == len(script)))
                tokens.append(script[place])
                place += 1
            return [Rollout.sampled(tokens)]

        found += roll_out(generate, [PROMPT], [0], Sampling(limit, [STOP]), [episodes.start(RECORD, "a")])
        while script and script[-1] == VOCABULARY - 1:
            script.pop()
        if not script:
            return found
        script[-1] += 1


def model(seed: int) -> Reader:
    torch.manual_seed(seed)
    config = llama_config(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, initializer_range=0.5)
    return reader(split(AutoModelForCausalLM.from_config(config).eval()))


def logprobs(lm: Reader, prompt: list[int], rollout: Rollout) -> torch.Tensor:
    """[T, V] by the model's own head."""
    logits = lm.model(torch.tensor([prompt + rollout.tokens])).logits[0]
    return logits[len(prompt) - 1 : -1].double().log_softmax(-1)


def chance(own: torch.Tensor, rollout: Rollout) -> torch.Tensor:
    """The probability of the choices in a rollout."""
    chosen = own.gather(1, torch.tensor(rollout.tokens)[:, None])[:, 0]
    return chosen[torch.tensor(rollout.by_model)].sum().exp()


def gradients(lm: Reader, value: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(value, list(lm.model.parameters())))


def group_of(*rollouts: Rollout) -> PackedBatch:
    return PackedBatch.of([PromptGroup(RECORD, PROMPT, list(rollouts))], torch.device("cpu"))


def distance(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The norm of the difference of two gradients over that of the second."""
    ours, theirs = (torch.cat([part.flatten().double() for part in parts]) for parts in (found, expected))
    return float((ours - theirs).norm() / theirs.norm())


EXACT = 1e-5
"""What float32 rounds off gradients of some sixty rollouts, eighty times its last bit."""


@pytest.mark.parametrize("environment", [Says, SaysInside])
@pytest.mark.parametrize(
    ("feedback", "credit_span", "is_exact"),
    [("correction", "future", True), ("trace", "sequence", True), ("trace", "future", False)],
)
@pytest.mark.parametrize("cost", ["ce", "kl"])
def test_the_expected_gradient_is_that_of_the_expected_cost(
    environment: type[Environment], feedback: str, credit_span: str, is_exact: bool, cost: str
) -> None:
    """Of a teacher that reads one thing, and of one that reads what the environment said in the end."""
    student, teacher = model(1), model(2)
    rollouts = every_rollout(letters(environment))
    assert len({tuple(rollout.tokens) for rollout in rollouts}) == len(rollouts)
    assert {len(rollout.outcome.turns) for rollout in rollouts} == {1, 2}
    config = Config(cost=cost, credit_span=credit_span, discount=1.0, baseline="none", **FULL_CREDIT)
    average = PositionAverage(LIMIT + 9, 0.1, torch.device("cpu"))
    total, expected_cost, found = 0.0, torch.zeros((), dtype=torch.float64), None
    for rollout in rollouts:
        hint = [2, 2] if feedback == "correction" else [1, *(1 if x == "a" else 2 for x in rollout.outcome.feedback)]
        rollout.teacher_prompt = hint + PROMPT
        batch = group_of(rollout)
        with torch.no_grad():
            taught = teacher.states(batch.teacher_prompts, batch.teacher_prompt_index, batch.completions)
            probability = float(chance(logprobs(student, PROMPT, rollout), rollout))
        hidden = student.states(batch.prompts, batch.prompt_index, batch.completions)
        loss, sums = distil_loss(
            student, hidden, HiddenTarget(taught, teacher.weight, None), batch, config, average, 1.0
        )
        assert sums.num_tokens == sum(rollout.by_model)
        gradient = gradients(student, loss)
        found = [0.0] * len(gradient) if found is None else found
        found = [before + probability * part for before, part in zip(found, gradient, strict=True)]

        own, by_teacher = logprobs(student, PROMPT, rollout), logprobs(teacher, rollout.teacher_prompt, rollout)
        difference = (by_teacher if cost == "kl" else 0.0) - own
        costs = (by_teacher.exp() * difference).sum(1)[torch.tensor(rollout.by_model)]
        total += probability
        expected_cost = expected_cost + chance(own, rollout) * costs.sum()
    assert total == pytest.approx(1.0, abs=1e-5)  # every rollout, and no chance for what is observed
    away = distance(found, gradients(student, expected_cost))
    assert away < EXACT if is_exact else away > 100 * EXACT


@pytest.mark.parametrize("environment", [Says, SaysInside])
def test_the_expected_policy_gradient_is_that_of_the_expected_reward(environment: type[Environment]) -> None:
    """Over all pairs of rollouts; a mean that has the rollout in it takes half of the gradient."""
    student, rollouts = model(1), every_rollout(letters(environment), limit=2)
    with torch.no_grad():
        chances = [float(chance(logprobs(student, PROMPT, rollout), rollout)) for rollout in rollouts]
    for rollout in rollouts:
        rollout.feedback = Feedback(rollout.outcome.reward or 0.0, "", "")
    config, found = Config(objective="policy_gradient", normalize_advantages=False), None
    pairs = [pair for pair in combinations_with_replacement(range(len(rollouts)), 2)]
    for one, other in pairs:
        if rollouts[one].feedback.score == rollouts[other].feedback.score:
            continue
        batch = group_of(rollouts[one], rollouts[other])
        hidden = student.states(batch.prompts, batch.prompt_index, batch.completions)
        gradient = gradients(student, policy_loss(student, hidden, batch, config, 2.0)[0])
        weight = 2 * chances[one] * chances[other]
        found = [0.0] * len(gradient) if found is None else found
        found = [before + weight * part for before, part in zip(found, gradient, strict=True)]
    expected = sum(chance(logprobs(student, PROMPT, rollout), rollout) * rollout.feedback.score for rollout in rollouts)
    assert distance(found, gradients(student, -0.5 * expected)) < EXACT


def say(*texts: str) -> Callable[..., list[Rollout]]:
    """A `Generate` that writes these texts of one rollout, a turn each."""
    left = list(texts)

    def generate(prompts: list[list[int]], index: object, sampling: Sampling, ends: Ends | None) -> list[Rollout]:
        read.append(TOKENIZER.decode(prompts[0]))
        return [Rollout.sampled(TOKENIZER(left.pop(0), add_special_tokens=False).input_ids)]

    read: list[str] = []
    generate.read = read  # type: ignore[attr-defined]
    return generate


TOKENIZER = byte_tokenizer()


def episodes_of(environment: type[Environment], layout: str = "examples", **options: object) -> Episodes:
    prompts = Prompts(TOKENIZER, [], layout, end_ids=[0])
    texts = Texts(prompts.answer, prompts.ids, prompts.frame([0]))
    return Episodes(environment, "mine:World", texts, **{"max_observations": 2, "max_tokens": 5, **options})


def run(episodes: Episodes, *texts: str, limit: int = 90, stop: str = "\n") -> Rollout:
    sampling = Sampling(limit, TOKENIZER(stop).input_ids)
    (rollout,) = roll_out(say(*texts), [[1]], [0], sampling, [episodes.start(RECORD, "a")])
    return rollout


class Echo(Environment):
    """Says what it was told, until it is told x."""

    def step(self, text: str) -> tuple[str, float | None, bool]:
        if text.strip() == "raise":
            raise KeyError("x")
        if text.strip() == "sleep":
            time.sleep(5)
        return text.strip(), {"half": 0.5, "x": 0.25}.get(text.strip()), text.strip() == "x"


def test_turns_of_questions_and_answers() -> None:
    rollout = run(episodes_of(Echo), " half\n", " ab\n", " x\n")
    assert TOKENIZER.decode(rollout.tokens) == " half\nQ: half\nA: ab\nQ: ab\nA: x\n"
    observed = [token for token, own in zip(rollout.tokens, rollout.by_model, strict=True) if not own]
    assert TOKENIZER.decode(observed) == "Q: half\nA:Q: ab\nA:"
    assert rollout.outcome.turns == ((" half", "half"), (" ab", "ab"), (" x", "x"))
    assert rollout.outcome.reward == 0.75 and rollout.outcome.is_finished and rollout.outcome.answer == " x"
    assert rollout.outcome.feedback == "turn 1: half; turn 2: ab; turn 3: x; score 0.75"


def test_turns_of_a_chat_are_as_its_template_writes_them() -> None:
    rollout = run(episodes_of(Echo, "chat"), "a<eos>", "x<eos>", stop="<eos>")
    messages = [{"role": "assistant", "content": "a"}, {"role": "user", "content": "a"}]
    whole = TOKENIZER.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert TOKENIZER.decode(rollout.tokens) == "a<eos>" + whole.removeprefix("<assistant>a") + "x<eos>"
    ended = byte_tokenizer()
    ended.chat_template = ended.chat_template.replace("}}\n", "}}<eos>\n")
    prompts = Prompts(ended, [], "chat", end_ids=[0])
    assert prompts.frame([0]) == ("\n<user>", "<eos>\n<assistant>")  # the model has written the first <eos>
    deaf = byte_tokenizer()
    deaf.chat_template = "{{ messages[-1].content }}"
    with pytest.raises(ValueError, match=r"\[layout\] the chat template leaves out an answer"):
        Prompts(deaf, [], "chat", end_ids=[0]).frame([0])


def test_limits() -> None:
    long = run(episodes_of(Echo, max_tokens=2), " abc\n", " x\n")
    assert TOKENIZER.decode(long.tokens) == " abc\nQ: a\nA: x\n"  # a blank and a letter
    endless = run(episodes_of(Echo), " a\n", " b\n", " c\n")
    assert len(endless.outcome.turns) == 3 and not endless.outcome.is_finished and endless.outcome.reward is None
    cut = run(episodes_of(Echo), " ha", limit=3)
    assert cut.outcome.turns == ((" ha", "ha"),) and all(cut.by_model) and cut.is_truncated([10])
    ended = run(episodes_of(Echo), " x", limit=2)  # the environment has heard enough, of what was cut off
    assert ended.outcome.reward == 0.25 and not ended.outcome.is_finished and ended.is_truncated([10])
    full = run(episodes_of(Echo), " a\n", limit=3)  # no token is left for another turn
    assert full.outcome.turns == ((" a", "a"),) and all(full.by_model) and not full.outcome.is_finished
    assert len(run(episodes_of(Echo), " a\n", " b\n", " c\n").tokens) <= 9 + episodes_of(Echo).longest


def test_a_worked_example_is_an_episode() -> None:
    class Solved(Echo):
        def solution(self, record: Problem) -> list[str]:
            return ["half", "x"]

    outcome = episodes_of(Solved).worked(RECORD)
    assert outcome.reward == 0.75 and outcome.turns == (("half", "half"), ("x", "x"))
    prompts = Prompts(TOKENIZER, [Example(RECORD, Feedback(1.0, "fine", ""), outcome.turns)])
    assert TOKENIZER.decode(prompts.student(RECORD)) == "Q: a\nA: half\n\nQ: half\nA: x\n\nQ: a\nA:"
    taught = TOKENIZER.decode(prompts.teacher(RECORD, Feedback(0.0, "no", "")))
    assert taught == "Q: a\nFeedback: fine\nA: half\n\nQ: half\nA: x\n\nQ: a\nFeedback: no\nA:"


@pytest.mark.parametrize(("gives", "expected"), [("x", "a list of turns"), ([], "a list of turns"), ([3], "a text")])
def test_a_solution_is_some_turns(gives: object, expected: str) -> None:
    wrong = type("Wrong", (Echo,), {"solution": lambda self, record: gives})
    with pytest.raises(RuntimeError, match=rf"\[environment\] mine:World.solution gave .*, expected {expected}"):
        episodes_of(wrong).worked(RECORD)


class Fault(Echo):
    """Gives what it is made to give."""

    gives: object = None

    def step(self, text: str) -> object:  # type: ignore[override]
        return self.gives


@pytest.mark.parametrize(
    ("gives", "message"),
    [
        (None, r"mine:World.step gave None, expected \(observation, reward or None, whether it is over\)"),
        (("a", 1.0), r"mine:World.step gave \('a', 1.0\), expected"),
        (("a", "1", True), r"step gave \('a', '1', True\)"),
        (("a", math.nan, True), r"step gave \('a', nan, True\)"),
        ((7, 1.0, True), r"mine:World.step gave 7, expected a text"),
        (("a", 1.5, True), r"the rewards of mine:World add up to 1.5, expected 0 to 1"),
    ],
)
def test_what_an_environment_may_not_give(gives: object, message: str) -> None:
    with pytest.raises(RuntimeError, match=rf"\[environment\] .*{message}"):
        run(episodes_of(type("Wrong", (Fault,), {"gives": gives})), " a\n")


def test_errors_and_time() -> None:
    with pytest.raises(RuntimeError, match=r"\[environment\] mine:World raised KeyError: 'x' \(.*test_episodes.py, l"):
        run(episodes_of(Echo), " a\n", " raise\n")
    slow = run(episodes_of(Echo, seconds=0.2), " half\n", " sleep\n")
    assert math.isnan(slow.outcome.reward) and slow.outcome.turns == ((" half", "half"), (" sleep", ""))
    with pytest.raises(RuntimeError, match=r"\[environment\] mine:World reset to 'a', expected what it said of"):
        episodes_of(Echo).start(RECORD, "b")


def test_environments_by_name() -> None:
    assert environment_class("shop").__name__ == "Shop"
    for name, message in {
        "shopp": "expected one of python, shop, or module:name of a class with reset and step, got 'shopp'",
        "nowhere:World": r"cannot import 'nowhere:World': ModuleNotFoundError",
        "math:sqrt": "expected one of python, shop",
        "decimal:Decimal": "expected one of python, shop",
    }.items():
        with pytest.raises(ValueError, match=rf"\[environment\] {message}"):
            environment_class(name)
    plain = environment_class("test_episodes:Plain")
    assert issubclass(plain, Environment) and plain().reset(RECORD) == "plain" and plain().answer(["a", "b"]) == "b"


class Plain:
    """A class that knows nothing of ours."""

    def reset(self, record: Problem) -> str:
        return "plain"

    def step(self, text: str) -> tuple[str, float, bool]:
        return "", 1.0, True
