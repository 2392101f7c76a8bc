"""Four tasks on digits, as tensors of characters, each with a habit that the models are pre-trained to have.

    question > correction =  answer .            the correction is blank for the student, the answer for its teacher

Every prompt of a task has one width, so no batch needs padding on the left. A problem is a number; those divisible by
HELD_OUT are never trained on. What decides whether one-bit rewards suffice is the habit: how often the right answer is
sampled before training, and whether it is ever sampled where the habit is wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Generator, Tensor

CHARACTERS = "0123456789+>=. "
PLUS, READ, EQUALS, END, BLANK = range(10, 15)
SIGNS = (PLUS, READ, EQUALS)
HELD_OUT = 7


class Task(NamedTuple):
    title: str
    digits: int
    """Of a problem."""
    answer_width: int
    """Most characters of an answer, END included."""
    question: Callable[[Tensor], Tensor]
    """[B, digits] to [B, Q]."""
    answer: Callable[[Tensor], Tensor]
    """[B, digits] to [B, answer_width], BLANK after END."""
    habit: Callable[[Tensor, Generator], Tensor]
    """What is answered without a correction after pre-training: [B, answer_width], sampled."""

    def problems(self, count: int, generator: Generator, held_out: bool = False) -> Tensor:
        """[count, digits] random problems, of the held-out ones or of all others."""
        numbers = torch.randint(0, 10**self.digits // HELD_OUT, (count,), generator=generator) * HELD_OUT
        if not held_out:
            numbers += torch.randint(1, HELD_OUT, (count,), generator=generator)
        return digits_of(numbers, self.digits)

    def prompts(self, problems: Tensor, corrections: Tensor | None = None) -> Tensor:
        """[B, P]; corrections [B, answer_width] are read by the teacher, None for the student."""
        question = self.question(problems)
        if corrections is None:
            corrections = question.new_full((len(question), self.answer_width), BLANK)
        column = question.new_ones(len(question), 1)
        return torch.cat([question, READ * column, corrections[:, :-1], EQUALS * column], 1)


def digits_of(numbers: Tensor, count: int) -> Tensor:
    """[B] to [B, count], the most significant first."""
    return numbers[:, None] // 10 ** torch.arange(count - 1, -1, -1) % 10


def cut(answers: Tensor) -> tuple[Tensor, Tensor]:
    """Answers [B, A] with BLANK after their first END; bool [B, A] of what belongs to them, END included."""
    ended = (answers == END).long().cumsum(1) - (answers == END).long()
    belongs = ended == 0
    return answers.masked_fill(~belongs, BLANK), belongs


def any_signs(answers: Tensor, generator: Generator) -> Tensor:
    """Answers with each PLUS replaced by one of the SIGNS at random: ways to write what is equally right."""
    signs = torch.tensor(SIGNS)[torch.randint(0, len(SIGNS), answers.shape, generator=generator)]
    return torch.where(answers == PLUS, signs, answers)


def one_sign(answers: Tensor) -> Tensor:
    """Answers with PLUS for any of the SIGNS, as they are compared."""
    return answers.masked_fill(torch.isin(answers, torch.tensor(SIGNS)), PLUS)


def _ended(digits: Tensor) -> Tensor:
    return torch.cat([digits, torch.full_like(digits[:, :1], END)], 1)


def _sorted(digits: Tensor) -> Tensor:
    return _ended(digits.sort(1).values)


def _careless(digits: Tensor, generator: Generator) -> Tensor:
    """Sorted, with about every fifth digit another one."""
    slips = torch.rand(digits.shape, generator=generator) < 0.22
    return _ended(torch.where(slips, torch.randint(0, 10, digits.shape, generator=generator), digits.sort(1).values))


def _listed(digits: Tensor) -> Tensor:
    """A sign after each digit but the last, which END follows."""
    followed = torch.stack([digits, torch.full_like(digits, PLUS)], 2).flatten(1)
    followed[:, -1] = END
    return followed


def _sorted_list(digits: Tensor) -> Tensor:
    return _listed(digits.sort(1).values)


def _careless_list(digits: Tensor, generator: Generator) -> Tensor:
    """As `_careless`, and ended after each character with probability .02."""
    answers = _listed(_careless(digits, generator)[:, :-1])
    answers[torch.rand(answers.shape, generator=generator) < 0.02] = END
    return cut(answers)[0]


def _descending(digits: Tensor) -> Tensor:
    return _ended(digits.sort(1, descending=True).values)


def _mostly_ascending(digits: Tensor, generator: Generator) -> Tensor:
    right = torch.rand(len(digits), 1, generator=generator) < 0.15
    return torch.where(right, _descending(digits), _sorted(digits))


def _summands(digits: Tensor) -> Tensor:
    return torch.cat([digits[:, :3], torch.full_like(digits[:, :1], PLUS), digits[:, 3:]], 1)


def _sum(digits: Tensor) -> Tensor:
    """Least significant digit first; three digits, or four ending in 1."""
    weights = torch.tensor([100, 10, 1])
    total = (digits[:, :3] * weights).sum(1) + (digits[:, 3:] * weights).sum(1)
    places = digits_of(total, 4).flip(1)
    fourth = places[:, 3:]
    ends = torch.where(fourth == 1, torch.tensor([1, END]), torch.tensor([END, BLANK]))
    return torch.cat([places[:, :3], ends], 1)


def _sum_without_carries(digits: Tensor, generator: Generator) -> Tensor:
    places = ((digits[:, :3] + digits[:, 3:]) % 10).flip(1)
    return torch.cat([_ended(places), torch.full_like(places[:, :1], BLANK)], 1)


TASKS = {
    "sort": Task("sort five digits", 5, 6, lambda digits: digits, _sorted, _careless),
    "list": Task("sort, any signs between", 5, 10, lambda digits: digits, _sorted_list, _careless_list),
    "descend": Task("largest first", 5, 6, lambda digits: digits, _descending, _mostly_ascending),
    "add": Task("add three digits", 6, 5, _summands, _sum, _sum_without_carries),
}
